"""Equation 10 on the rows of one device, with its gradients.

    L = L_clean + sum over hard views of weight * L_view

A view says which input is scored and with which mixture of labels (`hexa_jax.views`), a method
where labels come from and how a prediction is scored (`hexa_jax.methods`); here they meet. Nothing
in here communicates, except BatchNorm groups that span devices: an image never leaves its device.

Legend: M microbatches, n rows of a microbatch on one device, N the same, V crops, H W C image, D
    embedding.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hexa_jax.core.batch import Batch
from hexa_jax.core.rngs import Purpose, Rngs
from hexa_jax.methods.base import Method
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import CLEAN
from hexa_jax.parallel.mesh import Layout
from hexa_jax.training.microbatch import accumulate
from hexa_jax.training.row_share import RowShare, rejoin
from hexa_jax.training.step_context import StepContext
from hexa_jax.views import HardView, View, adversarial
from hexa_jax.views.base import OWN_CROP
from hexa_jax.views.preview import PICTURES, UNATTACKED, ViewPreview
from hexa_jax.views.scheme import Scheme

Views = tuple[HardView, ...]


class Crops(Protocol):
    """Makes float crops in [0, 1] from a batch [N, ...].

    `data` is the whole data set where it lives on the device.
    """

    @property
    def resolutions(self) -> Sequence[Any]:
        """Each with `count` crops of side `size`."""

    def online(
        self, keys: jax.Array, batch: Batch, data: jax.Array | None, crop_set: int = 0
    ) -> tuple[jax.Array, ...]:
        """Return crops [N, V_r, S, S, 3] per resolution, keyed by example.

        `crop_set` numbers independent sets.
        """

    def target(self, keys: jax.Array, batch: Batch, data: jax.Array | None) -> jax.Array:
        """Key crops [N, 1, S, S, 3] of the examples `batch.key_index`."""


class Inputs(NamedTuple):
    """What a device knows of its rows before the step.

    Attributes:
        batch: leaves [M, n, ...], or [N, ...] of one microbatch.
        y: pseudo-labels, leaves alike; () where they come from the step's own outputs.
        weight: [M, n] or [N], each row's share in the mean over the whole step.
        dictionary: shared by all rows; () where it comes from the step's own outputs.
        method_state: the method's state, this device's part.
    """

    batch: Batch
    y: Any
    weight: jax.Array
    dictionary: Any
    method_state: Any


class Gradients(NamedTuple):
    """Result of the objective; all but the outputs add up over microbatches and devices.

    Attributes:
        params: gradients, like the parameters.
        moments: per training pass, the BatchNorm moments it sowed.
        losses: per training pass, the weighted sum of its example losses, without the pass's own
            weight.
        outputs: embeddings [N, V, D], or [M, n, V, D]: clean ones, or those of the view that
            replaced the clean one.
    """

    params: Any
    moments: dict[str, Any]
    losses: dict[str, jax.Array]
    outputs: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective of a method that knows its pseudo-labels before the step.

    A function of parameters and rows.
    """

    network: Network
    method: Method
    scheme: Scheme
    layout: Layout
    crops: Crops

    # ---- One device ------------------------------------------------------------------------------

    def device_gradients(
        self, params: Any, inputs: Inputs, rngs: Rngs, data: jax.Array | None
    ) -> Gradients:
        """Gradients of one device's rows [M, n, ...]; moments are averaged over microbatches.

        The set of active views changes at each start epoch; `lax.switch` selects the branch of the
        current phase.
        """
        (_, first), *later = self.scheme.phases
        if not later:
            return self._phase_gradients(first, params, inputs, rngs, data)

        def branch(views: Views) -> Callable[..., Gradients]:
            return lambda *arguments: self._complete(self._phase_gradients(views, *arguments))

        branches = [branch(views) for _, views in self.scheme.phases]
        return jax.lax.switch(self.scheme.phase(rngs.step), branches, params, inputs, rngs, data)

    def _complete(self, result: Gradients) -> Gradients:
        """Add zero losses and moments for passes that are not made.

        All branches then return the same tree.
        """
        moments = jax.tree.map(jnp.zeros_like, next(iter(result.moments.values())))
        names = [CLEAN, *(view.name for view in self.scheme.views)]
        zero = jnp.zeros((), next(iter(result.losses.values())).dtype)
        return result._replace(
            moments={name: result.moments.get(name, moments) for name in names},
            losses={name: result.losses.get(name, zero) for name in names},
        )

    def _phase_gradients(
        self, views: Views, params: Any, inputs: Inputs, rngs: Rngs, data: jax.Array | None
    ) -> Gradients:
        def one(leaves: Any) -> tuple[Any, jax.Array]:
            batch, y, weight = leaves
            rows = inputs._replace(batch=batch, y=y, weight=weight)
            result = self.gradients(views, params, rows, rngs, data)
            return result[:3], result.outputs

        (grads, moments, losses), outputs = accumulate(one, inputs[:3])
        moments = jax.tree.map(lambda m: m / len(inputs.weight), moments)
        return Gradients(grads, moments, losses, outputs)

    def device_preview(
        self, params: Any, inputs: Inputs, rngs: Rngs, data: jax.Array | None
    ) -> ViewPreview:
        """All views of one device's rows [M, n, ...], to look at."""

        def one(leaves: Any) -> tuple[Any, ViewPreview]:
            batch, y, weight = leaves
            rows = inputs._replace(batch=batch, y=y, weight=weight)
            context = StepContext(
                self, params, self.online_crops(batch, rngs, data), rows, rngs, data
            )
            if self.scheme.attacks:
                context = dataclasses.replace(context, attacked=self.attacked(params, context))
            return (), self.preview(context)

        return accumulate(one, inputs[:3])[1]

    # ---- One microbatch --------------------------------------------------------------------------

    def gradients(
        self, views: Views, params: Any, inputs: Inputs, rngs: Rngs, data: jax.Array | None
    ) -> Gradients:
        """Gradients of equation 10 for N rows: the clean pass, and each of `views`."""
        x = self.online_crops(inputs.batch, rngs, data)
        rows = self.rows_of(views)
        kept, whole = rows[CLEAN], StepContext(self, params, x, inputs, rngs, data)
        added_attacks = any(view.attacks and not view.replace for view in views)
        # Where the attack shares the clean pass, one backward gives both gradients.
        shared = added_attacks and kept.whole and self.scheme.attack.shares_gradient
        result, at_crops = self._clean_gradients(params, whole.take(kept), shared)
        whole = dataclasses.replace(whole, outputs=result.outputs, attack_gradient=at_crops)
        if added_attacks:
            whole = dataclasses.replace(whole, attacked=self.attacked(params, whole))
        outputs = {CLEAN: result.outputs}
        for view in views:
            context = whole.take(rows[view.name]) if view.replace else whole
            if view.replace and view.attacks:
                context = dataclasses.replace(context, attacked=self.attacked(params, context))
            result, outputs[view.name] = self.add_view(result, view, context)
        if kept.whole:
            return result
        parts = {name: share for name, share in rows.items() if not share.empty}
        return result._replace(
            outputs=rejoin([outputs[name] for name in parts], list(parts.values()))
        )

    def _clean_gradients(
        self, params: Any, context: StepContext, at_crops: bool
    ) -> tuple[Gradients, Any]:
        """The clean pass, and with `at_crops` the loss's gradient at the crops, else None."""
        if context.inputs.weight.size == 0:  # a view replaces all of it
            zeros = jax.tree.map(jnp.zeros_like, params)
            return Gradients(
                zeros, {}, {CLEAN: jnp.zeros((), context.inputs.weight.dtype)}, jnp.zeros(())
            ), None

        def clean(params: Any, x: Any) -> tuple[jax.Array, Any]:
            losses, (moments, outputs) = self.row_losses(params, View(x), context.inputs, CLEAN)
            loss = jnp.sum(losses)
            return loss, (loss, moments, outputs)

        wanted = (0, 1) if at_crops else 0
        grads, (loss, moments, outputs) = jax.grad(clean, wanted, has_aux=True)(
            params, context.crops
        )
        grads, crop_grads = grads if at_crops else (grads, None)
        return Gradients(grads, {CLEAN: moments}, {CLEAN: loss}, outputs), crop_grads

    def add_view(
        self, total: Gradients, view: HardView, context: StepContext
    ) -> tuple[Gradients, jax.Array]:
        """`total` with a hard view's part added, and the view's own outputs [N, V, D]."""
        made = view.make(dataclasses.replace(context, view=view))
        inputs = context.inputs
        if view.target == OWN_CROP:
            y, dictionary = self.method.own_crop_labels(
                inputs.y, inputs.dictionary, context.outputs
            )
            inputs = inputs._replace(y=y, dictionary=dictionary)
        weight = self.scheme.weights(context.rngs.step)[view.name]

        def weighted(params: Any) -> tuple:
            losses, (moments, outputs) = self.row_losses(params, made, inputs, view.norm)
            loss = jnp.sum(losses)
            return weight * loss, (loss, moments, outputs)

        more, (loss, moments, outputs) = jax.grad(weighted, has_aux=True)(context.params)
        grads = jax.tree.map(jnp.add, total.params, more)
        result = total._replace(
            params=grads,
            moments=total.moments | {view.name: moments},
            losses=total.losses | {view.name: loss},
        )
        return result, outputs

    def row_losses(
        self, params: Any, view: View, inputs: Inputs, norm: str
    ) -> tuple[jax.Array, Any]:
        """Return a view's weighted losses [N, V], and (moments, outputs) of its pass.

        The losses sum to the view's part of the objective.
        """
        outputs, moments = self.forward(params, view.crops, norm)
        own = params["method"]
        if view.lam is None:
            losses = self.method.loss(own, outputs, inputs.y, inputs.dictionary)
        else:
            y_partner = jax.tree.map(lambda leaf: leaf[view.partner], inputs.y)
            losses = self.method.mixed_loss(
                own, outputs, inputs.y, y_partner, view.lam, inputs.dictionary
            )
        return losses * inputs.weight[:, None] / losses.shape[1], (moments, outputs)

    def forward(
        self, params: Any, crops: tuple[jax.Array, ...], norm: str = CLEAN
    ) -> tuple[jax.Array, Any]:
        """Training-mode outputs [N, V, D] and the pass's BatchNorm moments."""
        mode = self.layout.norm_mode(norm)
        outputs, sown = self.network.apply(
            {"params": params["network"]}, crops, mode, mutable=["moments"]
        )
        return outputs, sown["moments"]

    def encode(self, network_params: Any, crops: tuple[jax.Array, ...]) -> jax.Array:
        """Return projections [N, V, D] by a target network.

        Training mode, without predictor; nothing is written.
        """
        mode = self.layout.norm_mode(CLEAN)
        return self.network.apply(
            {"params": network_params}, crops, mode, predict=False, mutable=["moments"]
        )[0]

    def online_crops(
        self, batch: Batch, rngs: Rngs, data: jax.Array | None, crop_set: int = 0
    ) -> tuple[jax.Array, ...]:
        """Augmented crops that the network learns from."""
        crops = self.crops.online(
            rngs.per_example_keys(Purpose.AUGMENT, batch.index), batch, data, crop_set
        )
        return self.method.prepare(rngs.per_example_keys(Purpose.TASK, batch.index), crops)

    def key_crops(self, batch: Batch, rngs: Rngs, data: jax.Array | None) -> jax.Array:
        """Augmented crops [N, 1, H, W, 3] that only the target encoder sees."""
        return self.crops.target(
            rngs.per_example_keys(Purpose.AUGMENT, batch.key_index), batch, data
        )

    def attacked(self, params: Any, context: StepContext) -> Any:
        """Return the context's crops after the attack on their own pseudo-labels.

        No statistics are written.
        """
        attack, inputs = self.scheme.attack, context.inputs

        def losses(x: Any) -> jax.Array:
            return self.row_losses(params, View(x), inputs, attack.norm_set)[0]

        return adversarial(
            context.rngs.per_example_keys(Purpose.ATTACK, inputs.batch.index),
            context.crops,
            losses,
            epsilon=attack.epsilon,
            step_size=attack.step_size,
            steps=attack.steps,
            norm=attack.norm,
            random_start=attack.random_start,
            gradient=context.attack_gradient,
            max_increase=attack.max_increase,
            loss_scale=self.loss_scale(inputs.weight, context.crops),
        )

    def has_pass(self, name: str, step: jax.Array) -> bool | jax.Array:
        """Return whether the pass of this name is made at step int32.

        A Python bool where it always or never is.
        """
        if name != CLEAN:
            return self.scheme.active(
                next(view for view in self.scheme.views if view.name == name), step
            )
        if not self.scheme.replaces_all:
            return True
        return step < max(
            self.scheme.start_step(view) for view in self.scheme.views if view.replace
        )

    def loss_scale(self, weight: jax.Array, crops: tuple[jax.Array, ...]) -> jax.Array:
        """What `row_losses` multiplies each row's losses by, [N]."""
        return weight / sum(x.shape[1] for x in crops)

    def rows_of(self, views: Views) -> dict[str, RowShare]:
        """Return the rows of the clean pass and of each view that replaces it.

        A view gets its share of each `layout.unit` consecutive rows.
        """
        if not any(view.replace for view in views):
            return {CLEAN: RowShare(0, 1, 1)}
        unit, first = self.layout.unit, 0
        rows: dict[str, RowShare] = {}
        for view in views:
            if view.replace:
                count = round(view.replace * unit)
                rows[view.name] = RowShare(first, first + count, unit)
                first += count
        return {CLEAN: RowShare(first, unit, unit)} | rows

    def rows_of_passes(self, row: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
        """Return which rows the losses of each pass are of; none before its view starts.

        Args:
            row: int32, positions in the step's batch.
            step: int32.

        Returns:
            Per pass, the clean one among them, a bool array like `row`.
        """
        unit, phases = self.layout.unit, self.scheme.phases
        names = [CLEAN, *(view.name for view in self.scheme.views)]
        masks = {name: np.zeros((len(phases), unit), bool) for name in names}
        for number, (_, views) in enumerate(phases):
            shares = {view.name: RowShare(0, 1, 1) for view in views} | self.rows_of(views)
            for name, share in shares.items():
                scale = unit // share.unit
                masks[name][number, share.first * scale : share.stop * scale] = True
        number = self.scheme.phase(step)
        return {name: jnp.asarray(mask)[number][row % unit] for name, mask in masks.items()}

    def clean_rows(self, row: jax.Array, step: jax.Array) -> jax.Array | None:
        """Return which rows have clean outputs at step int32, bool like `row`; None: all."""
        if not any(view.replace for view in self.scheme.views):
            return None
        return self.rows_of_passes(row, step)[CLEAN]

    def mean_losses(
        self, losses: Mapping[str, jax.Array], inputs: Inputs, step: jax.Array
    ) -> dict[str, jax.Array]:
        """Return the mean loss of each pass over its own rows, 0 where it has none.

        Args:
            losses: per pass, as in `Gradients`.
            inputs: of the whole step.
            step: int32.
        """
        if not any(view.replace for view in self.scheme.views):
            return dict(losses)
        means = {}
        for name, rows in self.rows_of_passes(inputs.batch.row, step).items():
            share = jnp.sum(inputs.weight * rows)  # the weights of all rows sum to 1
            means[name] = losses[name] / jnp.where(share > 0, share, 1)
        return means

    def scored_passes(self, step: int) -> set[str]:
        """Return the names of the passes that have a loss at a step, the clean one among them."""
        views = self.scheme.phases[int(self.scheme.phase(step))][1]
        rows = {view.name for view in views}
        return rows if self.rows_of(views)[CLEAN].empty else rows | {CLEAN}

    def preview(self, context: StepContext) -> ViewPreview:
        """Return what a step learns from once all views count.

        PICTURES rows of images, all rows of outputs.
        """
        views = {
            view: view.make(dataclasses.replace(context, view=view)) for view in self.scheme.views
        }
        images = {CLEAN: context.crops} | {view.name: made.crops for view, made in views.items()}
        norms = {CLEAN: CLEAN} | {view.name: view.norm for view in views}
        outputs = {
            name: self.forward(context.params, crops, norms[name])[0]
            for name, crops in images.items()
        }
        if attacking := [view for view in views if view.attacks]:
            # Through the same BatchNorm set as the attacked ones: what differs is the attack alone.
            outputs[UNATTACKED] = self.forward(context.params, context.crops, attacking[0].norm)[0]
        row = context.inputs.batch.row
        partner = next(
            (made.partner for made in views.values() if made.partner is not None),
            jnp.arange(len(row)),
        )
        mask = next((made.mask for made in views.values() if made.mask), ())
        lam = {view.name: made.lam for view, made in views.items() if made.lam is not None}
        cut = lambda tree: jax.tree.map(lambda leaf: leaf[:PICTURES], tree)  # noqa: E731
        index = context.inputs.batch.index
        return ViewPreview(
            cut(images), cut(mask), lam, row, row[partner], index, outputs, context.inputs.y
        )
