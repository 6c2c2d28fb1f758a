"""Equation 10 on the rows of one device, with its gradients.

    L = L_clean + alpha1 L_adversarial + alpha2 L_cutmix (+ alpha3 L_cutmix of adversarial views, Fig. 2's "CmxA")

Nothing in here communicates, except BatchNorm groups that span devices: an image never leaves its device.

Legend: N rows of one device and microbatch, V crops, H W C image, D embedding.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hexa_jax import draws, views
from hexa_jax.draws import Draws
from hexa_jax.mesh import Layout
from hexa_jax.methods.base import Batch, Method
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import ADVERSARIAL, CLEAN

CUTMIX, CUTMIX_ADVERSARIAL = "cutmix", "cutmix_adversarial"
UNATTACKED = "unattacked"  # clean crops through the adversarial BatchNorm set, to compare adversarial ones with
PICTURES = 8  # rows of `Objective.views_of`


class Crops(Protocol):
    """Makes float crops in [0, 1] from a batch [N, ...]; `data` is the whole data set when it lives on the device."""

    @property
    def resolutions(self) -> Sequence[Any]:
        """Each with `count` crops of side `size`."""

    def online(self, keys: jax.Array, batch: Batch, data: jax.Array | None) -> tuple[jax.Array, ...]:
        """Per resolution [N, V_r, S, S, 3], drawn from one key per example."""

    def target(self, keys: jax.Array, batch: Batch, data: jax.Array | None) -> jax.Array:
        """Key crops [N, 1, S, S, 3] of the examples `batch.key_index`."""


@dataclasses.dataclass(frozen=True)
class ViewSettings:
    """Weights of equation 10 and the two hard views; epsilon and step_size in pixels of [0, 1]."""

    alpha1: float = 0.0
    alpha2: float = 0.0
    alpha3: float = 0.0
    average: bool = False  # whether the step divides equation 10 by the sum of its weights
    epsilon: float = 1 / 255
    step_size: float = 1 / 255
    steps: int = 1
    norm: str = "linf"
    random_start: bool = False
    attack_branch: str = "auxiliary"  # BatchNorm set used while making the attack: "auxiliary" or "main"
    share_gradient: bool = True  # take the first attack gradient from the clean backward pass where that is possible
    cutmix_alpha: float = 5.0
    cutmix_beta: float = 3.0
    one_box: bool = False

    @property
    def attacks(self) -> bool:
        """Whether any term needs adversarial views."""
        return bool(self.alpha1 or self.alpha3)

    @property
    def ball(self) -> views.Ball:
        """Where the attack may go."""
        return views.Ball(self.epsilon, self.step_size, self.norm)

    @property
    def shared_gradient(self) -> bool:
        """Whether the clean pass's own backward also gives the attack's first gradient."""
        return self.attacks and self.attack_branch == "main" and not self.random_start and self.share_gradient

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each training pass, in order; equation 10."""
        weights = {CLEAN: 1.0, ADVERSARIAL: self.alpha1, CUTMIX: self.alpha2, CUTMIX_ADVERSARIAL: self.alpha3}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def divisor(self) -> float:
        """What the step divides equation 10 and its gradients by."""
        return sum(self.weights.values()) if self.average else 1.0


def norm_branch(view: str) -> str:
    """BatchNorm set of a training pass: whatever was attacked uses the adversarial one."""
    return ADVERSARIAL if view in (ADVERSARIAL, CUTMIX_ADVERSARIAL) else CLEAN


def own_params(params: Any) -> dict:
    """The method's own part of all parameters."""
    return params.get("method", {})


class Rows(NamedTuple):
    """What the objective sees of one device and microbatch.

    Attributes:
        batch: leaves [N, ...].
        y: pseudo-labels, leaves [N, ...].
        weight: [N] each row's share in the mean of the whole step.
        dictionary: shared by all rows.
    """

    batch: Batch
    y: Any
    weight: jax.Array
    dictionary: Any


class Gradients(NamedTuple):
    """Result of the objective; all but the outputs add up over microbatches and devices.

    Attributes:
        params: gradients, like the parameters.
        moments: per training pass, the BatchNorm moments it sowed.
        losses: per training pass, the weighted sum of its example losses, without the pass's own weight.
        outputs: clean embeddings [N, V, D].
    """

    params: Any
    moments: dict[str, Any]
    losses: dict[str, jax.Array]
    outputs: jax.Array


class Shown(NamedTuple):
    """Views to look at; leaves [N, ...], images at most PICTURES rows.

    Attributes:
        images: per view, per resolution [N, V, S, S, 3].
        mask: per resolution bool [N, V, S, S, 1], where the cut-mixed view shows the partner; () without such views.
        lam: per cut-mixed view [N, V], the share of the image itself.
        row: int32 position in the step's batch.
        partner: int32, that of the CutMix partner; its own without such views.
        index: int32 example.
        outputs: per view, and UNATTACKED where there is an attack, [N, V, D].
        y: pseudo-labels.
    """

    images: dict[str, Any]
    mask: Any
    lam: dict[str, jax.Array]
    row: jax.Array
    partner: jax.Array
    index: jax.Array
    outputs: dict[str, jax.Array]
    y: Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective as a function of parameters and rows."""

    network: Network
    method: Method
    views: ViewSettings
    layout: Layout
    crops: Crops

    def forward(self, params: Any, crops: tuple[jax.Array, ...], view: str = CLEAN) -> tuple[jax.Array, Any]:
        """Training-mode outputs [N, V, D] and the pass's BatchNorm moments."""
        mode = self.layout.norm_mode(norm_branch(view))
        network = {name: part for name, part in params.items() if name != "method"}
        outputs, sown = self.network.apply({"params": network}, crops, mode, mutable=["moments"])
        return outputs, sown["moments"]

    def online_crops(self, batch: Batch, at: Draws, data: jax.Array | None) -> tuple[jax.Array, ...]:
        """Augmented crops that the network learns from."""
        crops = self.crops.online(at.of_examples(draws.AUGMENT, batch.index), batch, data)
        return self.method.prepare(at.of_examples(draws.TASK, batch.index), crops)

    def encode_keys(self, params: Any, batch: Batch, at: Draws, data: jax.Array | None) -> jax.Array:
        """Embeddings [N, 1, D] of the key crops."""
        return self.forward(params, (self.key_crops(batch, at, data),))[0]

    def key_crops(self, batch: Batch, at: Draws, data: jax.Array | None) -> jax.Array:
        """Augmented crops [N, 1, H, W, 3] that the target encoder sees."""
        return self.crops.target(at.of_examples(draws.AUGMENT, batch.key_index), batch, data)

    def row_losses(self, params: Any, x: Any, rows: Rows, view: str, mix: Any = None) -> tuple[jax.Array, Any]:
        """Weighted losses [N, V] of a view, summing to its part of the objective; and (moments, outputs) of the pass."""
        outputs, moments = self.forward(params, x, view)
        losses = self.method.loss(own_params(params), outputs, rows.y, rows.dictionary)
        if mix is not None:
            lam, y_partner = mix
            partner_losses = self.method.loss(own_params(params), outputs, y_partner, rows.dictionary)
            losses = lam * losses + (1 - lam) * partner_losses
        return losses * rows.weight[:, None] / losses.shape[1], (moments, outputs)

    def attack(self, params: Any, x: Any, rows: Rows, at: Draws, gradient: Any = None) -> Any:
        """Adversarial views of the crops x against their own pseudo-labels; statistics of BatchNorm are not written."""
        settings = self.views
        view = self.attack_view
        return views.adversarial(
            at.of_examples(draws.ATTACK, rows.batch.index),
            x,
            lambda x: self.row_losses(params, x, rows, view)[0],
            epsilon=settings.epsilon,
            step_size=settings.step_size,
            steps=settings.steps,
            norm=settings.norm,
            random_start=settings.random_start,
            gradient=gradient,
        )

    @property
    def attack_view(self) -> str:
        """The view whose BatchNorm set is used while making the attack."""
        return ADVERSARIAL if self.views.attack_branch == "auxiliary" else CLEAN

    def mix(self, x: Any, rows: Rows, at: Draws, purpose: int = draws.CUTMIX) -> tuple[Any, tuple[jax.Array, Any]]:
        """Cut-mixed views of the crops x, and (lambda [N, V], the partners' pseudo-labels)."""
        settings = self.views
        partner = self._partners(at, rows.batch.row)
        mixed, lam, _ = views.cutmix(
            at.of_examples(purpose, rows.batch.index),
            x,
            alpha=settings.cutmix_alpha,
            beta=settings.cutmix_beta,
            permutation=partner,
            one_box=settings.one_box,
        )
        y_partner = jax.tree.map(lambda leaf: leaf[partner], rows.y)
        return mixed, (jnp.concatenate(lam, axis=1), y_partner)

    def gradients(self, params: Any, rows: Rows, at: Draws, data: jax.Array | None) -> Gradients:
        """Gradients of equation 10 for N rows whose pseudo-labels are known."""
        x = self.online_crops(rows.batch, at, data)

        def clean(params: Any, x: Any) -> tuple[jax.Array, Any]:
            losses, (moments, outputs) = self.row_losses(params, x, rows, CLEAN)
            loss = jnp.sum(losses)
            return loss, (loss, moments, outputs)

        # Where the attack shares this pass, one backward gives both gradients.
        shared = self.views.shared_gradient
        slopes, (loss, moments, outputs) = jax.grad(clean, (0, 1) if shared else 0, has_aux=True)(params, x)
        grads, x_slope = slopes if shared else (slopes, None)
        attacked = self.attack(params, x, rows, at, x_slope) if self.views.attacks else None
        plain = Gradients(grads, {CLEAN: moments}, {CLEAN: loss}, outputs)
        return self.add_hard_views(plain, params, x, attacked, rows, at)

    def add_hard_views(self, plain: Gradients, params: Any, x: Any, attacked: Any, rows: Rows, at: Draws) -> Gradients:
        """The clean part's gradients plus those of the hard views of the crops x; `attacked` are their adversarial views."""
        grads, all_moments, losses = plain.params, dict(plain.moments), dict(plain.losses)
        inputs = self._hard_inputs(x, attacked, rows, at)
        for view, weight in self.views.weights.items():
            if view == CLEAN:
                continue

            def weighted(params: Any, x: Any, mix: Any, view: str = view, weight: float = weight) -> tuple:
                row_losses, (moments, _) = self.row_losses(params, x, rows, view, mix)
                loss = jnp.sum(row_losses)
                return weight * loss, (loss, moments)

            more, (losses[view], all_moments[view]) = jax.grad(weighted, has_aux=True)(params, *inputs[view])
            grads = jax.tree.map(jnp.add, grads, more)
        return Gradients(grads, all_moments, losses, plain.outputs)

    def _hard_inputs(self, x: Any, attacked: Any, rows: Rows, at: Draws) -> dict[str, tuple[Any, Any]]:
        """Per hard view of the objective: its images, and how its pseudo-labels are mixed (None: not at all)."""
        weights = self.views.weights
        inputs: dict[str, tuple[Any, Any]] = {}
        if ADVERSARIAL in weights:
            inputs[ADVERSARIAL] = (attacked, None)
        if CUTMIX in weights:
            inputs[CUTMIX] = self.mix(x, rows, at)
        if CUTMIX_ADVERSARIAL in weights:
            inputs[CUTMIX_ADVERSARIAL] = self.mix(attacked, rows, at, draws.SECOND_CUTMIX)
        return inputs

    def views_of(self, params: Any, x: Any, attacked: Any, rows: Rows, at: Draws) -> "Shown":
        """What a step learns from, to look at: PICTURES rows of images, all rows of outputs."""
        inputs = self._hard_inputs(x, attacked, rows, at)
        lam = {view: mix[0] for view, (_, mix) in inputs.items() if mix is not None}
        images = {CLEAN: x} | {view: view_inputs[0] for view, view_inputs in inputs.items()}
        outputs = {view: self.forward(params, crops, view)[0] for view, crops in images.items()}
        if attacked is not None:
            # Through the same BatchNorm set as the attacked ones: what differs is the attack alone.
            outputs[UNATTACKED] = self.forward(params, x, ADVERSARIAL)[0]
        row = rows.batch.row
        partner, mask = self._cut(x, rows, at) if CUTMIX in inputs else (jnp.arange(len(row)), ())
        cut = lambda tree: jax.tree.map(lambda leaf: leaf[:PICTURES], tree)  # noqa: E731
        return Shown(cut(images), cut(mask), lam, row, row[partner], rows.batch.index, outputs, rows.y)

    def _cut(self, x: Any, rows: Rows, at: Draws) -> tuple[jax.Array, Any]:
        """Partners [N], and where the cut-mixed crops show them: bool like x with one channel. Found by mixing numbers."""
        number = jnp.arange(x[0].shape[0], dtype=x[0].dtype)

        def numbers(crops: jax.Array) -> jax.Array:
            return jnp.broadcast_to(number.reshape(-1, 1, 1, 1, 1), (*crops.shape[:-1], 1))

        own = tuple(numbers(crops) for crops in x)
        mixed, _ = self.mix(own, rows, at)
        mask = jax.tree.map(lambda a, b: a != b, mixed, own)
        return self._partners(at, rows.batch.row), mask

    def _partners(self, at: Draws, row: jax.Array) -> jax.Array:
        """CutMix partners from the same block of rows, hence from the same device; keyed by (seed, step, block)."""
        block = self.layout.cutmix_block
        keys = at.of_rows(draws.PARTNER, row[::block])
        return views.block_permutation(keys, row.shape[0], block)
