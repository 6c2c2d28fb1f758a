"""Equation 10 for methods whose pseudo-labels come from outputs (SimCLR, SwAV).

Microbatches are exact here, too.

Gradients are cached at the embeddings, in three phases on each device's rows: embed all
microbatches; make pseudo-labels, loss and its gradient with respect to the embeddings, which needs
all of them but no image; then replay each microbatch to carry that gradient on to the parameters.
With one microbatch nothing is replayed. Only embeddings are held for the whole step, and for an
attack of several steps through a live dictionary its iterates.

Where the clean loss also differentiates through its dictionary (SimCLR), so does the attack, and it
takes the same three phases. A view that replaces the clean one on some rows takes their weight in
the loss; their clean outputs are still computed, because the labels of others are made from them.

Legend: M microbatches, n rows of a microbatch, V crops, D embedding. Arrays are [M, n, ...] unless
    said otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax.core.batch import Batch
from hexa_jax.core.rngs import Purpose, Rngs
from hexa_jax.methods.base import LabelsFromOutputs, Targets
from hexa_jax.models.norm import CLEAN
from hexa_jax.training.microbatch import accumulate, map_with_recompute
from hexa_jax.training.objective import Gradients, Inputs, Objective, Views
from hexa_jax.training.step_context import StepContext
from hexa_jax.views.preview import ViewPreview

Again = Callable[[Any], tuple[Any, Any]]


class BatchTargets(NamedTuple):
    """What has to be known of the whole step before its hard views: leaves [M, ...] of one device.

    Attributes:
        targets: pseudo-labels, constants from here on.
        grad: gradient of the clean loss with respect to the clean outputs [M, n, V, D].
        method_grad: of the clean loss with respect to the method's own parameters.
        loss: this device's part of the clean loss.
        outputs: clean outputs [M, n, V, D].
        iterate: images that the attack's last step starts from, or () where they are made anew.
        radius: the attack's radius for each of them, or ().
        attack_grad: gradient of the attacked loss with respect to its outputs at `iterate`, or ().
    """

    targets: Targets
    grad: jax.Array
    method_grad: Any
    loss: jax.Array
    outputs: jax.Array
    iterate: Any = ()
    radius: Any = ()
    attack_grad: Any = ()


@dataclasses.dataclass(frozen=True)
class ObjectiveFromOutputs(Objective):
    """The objective of a method that makes its pseudo-labels from the step's own clean outputs."""

    method: LabelsFromOutputs

    def has_pass(self, name: str, step: jax.Array) -> bool | jax.Array:
        return name == CLEAN or super().has_pass(name, step)

    def clean_rows(self, row: jax.Array, step: jax.Array) -> jax.Array | None:
        return None  # labels are made from the clean outputs of all rows

    def _phase_gradients(
        self, views: Views, params: Any, inputs: Inputs, rngs: Rngs, data: jax.Array | None
    ) -> Gradients:
        step = _Step(self, views, params, inputs, rngs, data)
        known, clean_again, attack_again = step.first_phases()

        def one(leaves: Any) -> tuple[Any, Any]:
            context, grad = step.context(leaves, known, clean_again, attack_again)
            _, (_, pull, moments) = clean_again(context.inputs.batch)
            result = Gradients(pull(grad)[0], {CLEAN: moments}, {}, context.outputs)
            for view in views:
                result, _ = self.add_view(result, view, step.with_rows_of(view, context))
            return (result.params, result.moments, result.losses), ()

        (grads, moments, losses), _ = accumulate(one, step.leaves(known))
        grads = grads | {"method": jax.tree.map(jnp.add, grads["method"], known.method_grad)}
        moments = jax.tree.map(lambda m: m / len(inputs.weight), moments)
        return Gradients(grads, moments, {CLEAN: known.loss} | losses, known.outputs)

    def device_preview(
        self, params: Any, inputs: Inputs, rngs: Rngs, data: jax.Array | None
    ) -> ViewPreview:
        step = _Step(self, self.scheme.views, params, inputs, rngs, data)
        known, clean_again, attack_again = step.first_phases()

        def one(leaves: Any) -> tuple[Any, ViewPreview]:
            return (), self.preview(step.context(leaves, known, clean_again, attack_again)[0])

        return accumulate(one, step.leaves(known))[1]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One device's part of a step, phase by phase.

    Attributes are the arguments of `Objective.device_gradients`.
    """

    objective: ObjectiveFromOutputs
    views: Views
    params: Any
    inputs: Inputs
    rngs: Rngs
    data: jax.Array | None

    # ---- The whole step --------------------------------------------------------------------------

    def first_phases(self) -> tuple[BatchTargets, Again, Again]:
        """Run what needs the whole step.

        Returns:
            (what the hard views wait for; two functions that return, or recompute, a microbatch's
            clean and attacked forward passes).
        """

        def clean(batch: Batch) -> tuple[jax.Array, Any]:
            x = self.objective.online_crops(batch, self.rngs, self.data)
            forward = lambda params, x: self.objective.forward(params, x, CLEAN)  # noqa: E731
            outputs, pull, moments = jax.vjp(forward, self.params, x, has_aux=True)
            return outputs, (x, pull, moments)

        outputs, clean_again = map_with_recompute(clean, self.inputs.batch)
        score = jax.value_and_grad(self._score, (0, 1), has_aux=True)
        (loss, targets), (grad, method_grad) = score(
            outputs, self.params["method"], self._clean_weight()
        )
        known = BatchTargets(jax.lax.stop_gradient(targets), grad, method_grad, loss, outputs)
        if not self._attacks_whole_step:
            return known, clean_again, clean_again
        iterate, radius, attack_grad, attack_again = self._attack()
        return (
            known._replace(iterate=iterate, radius=radius, attack_grad=attack_grad),
            clean_again,
            attack_again,
        )

    def _clean_weight(self) -> jax.Array:
        """[M, n] weights of the clean loss: 0 for rows that a view takes the place of."""
        share = self.objective.rows_of(self.views)
        return (
            self.inputs.weight
            if share[CLEAN].whole
            else self.inputs.weight * self._mask(CLEAN)[None]
        )

    def _mask(self, name: str) -> jax.Array:
        """[n] 1 for the rows of a pass, 0 for others."""
        rows = self.objective.rows_of(self.views)[name]
        place = jnp.arange(self.inputs.weight.shape[1]) % rows.unit
        return ((place >= rows.first) & (place < rows.stop)).astype(self.inputs.weight.dtype)

    def _score(self, outputs: jax.Array, own: dict, weight: jax.Array) -> tuple[jax.Array, Targets]:
        """Return this device's part of the loss of outputs [M, n, V, D].

        The pseudo-labels come from the same outputs.
        """
        method = self.objective.method
        targets = method.targets_from_outputs(
            own, self.inputs.method_state, self.inputs.batch, outputs
        )
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        losses = method.loss(own, flat(outputs), jax.tree.map(flat, targets.y), targets.dictionary)
        return jnp.sum(losses * flat(weight)[:, None]) / losses.shape[1], targets

    @property
    def _attacks(self) -> bool:
        return any(view.attacks for view in self.views)

    @property
    def _shares_gradient(self) -> bool:
        """Return whether the clean pass's gradient serves the attack.

        It does not where some rows have no clean loss.
        """
        whole = self.objective.rows_of(self.views)[CLEAN].whole
        return self._attacks and whole and self.objective.scheme.attack.shares_gradient

    @property
    def _attacks_whole_step(self) -> bool:
        """Return whether the attack needs all outputs and a gradient of its own."""
        alone = self._shares_gradient and self.objective.scheme.attack.steps == 1
        return self._attacks and self.objective.method.live_dictionary and not alone

    def _attack(self) -> tuple[Any, Any, jax.Array, Again]:
        """Run the attack up to its last gradient.

        Returns:
            (the iterate there, the radius, the gradient with respect to the outputs there, attacked
            passes again).
        """
        objective, attack = self.objective, self.objective.scheme.attack

        def attacked(leaves: Any) -> tuple[jax.Array, Any]:
            batch, iterate = leaves
            x = objective.online_crops(batch, self.rngs, self.data)
            if not iterate:
                iterate = attack.start(self.rngs.per_example_keys(Purpose.ATTACK, batch.index), x)
            forward = lambda x: objective.forward(self.params, x, attack.norm_set)[0]  # noqa: E731
            outputs, pull = jax.vjp(forward, iterate)
            return outputs, (x, iterate, pull)

        iterates: Any = ()
        radii: Any = ()
        for step in range(attack.steps):
            outputs, again = map_with_recompute(attacked, (self.inputs.batch, iterates))
            grad = jax.grad(self._score, has_aux=True)(
                outputs, self.params["method"], self.inputs.weight
            )[0]
            if step < attack.steps - 1:

                def move(leaves: Any, again: Again = again) -> tuple[Any, Any]:
                    passed, grad, weight, radius = leaves
                    _, (x, iterate, pull) = again(passed)
                    crop_grads = pull(grad)[0]
                    radius = radius or attack.radius(crop_grads, objective.loss_scale(weight, x))
                    return (), (attack.ascend(x, iterate, crop_grads, radius), _arrays(radius, x))

                leaves = ((self.inputs.batch, iterates), grad, self.inputs.weight, radii)
                iterates, radii = accumulate(move, leaves)[1]
        return iterates, radii, grad, again

    # ---- One microbatch --------------------------------------------------------------------------

    def _rows(self, batch: Batch, y: Any = (), weight: Any = (), dictionary: Any = ()) -> Inputs:
        return Inputs(batch, y, weight, dictionary, self.inputs.method_state)

    def leaves(self, known: BatchTargets) -> Any:
        """What `context` needs of each microbatch: [M, ...]."""
        attack = known.iterate, known.radius, known.attack_grad
        return (
            self.inputs.batch,
            self.inputs.weight,
            known.targets.y,
            known.grad,
            known.outputs,
            attack,
        )

    def context(
        self, leaves: Any, known: BatchTargets, clean_again: Again, attack_again: Again
    ) -> tuple[StepContext, jax.Array]:
        """Return the context of a microbatch's hard views, and the clean loss's output gradient."""
        batch, weight, y, grad, outputs, (iterate, radius, attack_grad) = leaves
        _, (x, pull, _) = clean_again(batch)
        inputs = self._rows(batch, y, weight, known.targets.dictionary)
        context = StepContext(
            self.objective, self.params, x, inputs, self.rngs, self.data, outputs=outputs
        )
        if not self._attacks:
            return context, grad
        if not self._attacks_whole_step:
            shared = pull(grad)[1] if self._shares_gradient else None
            context = dataclasses.replace(context, attack_gradient=shared)
            attacked = self.objective.attacked(self.params, context)
        else:
            attack = self.objective.scheme.attack
            _, (_, iterate, attack_pull) = attack_again((batch, iterate))
            crop_grads = attack_pull(attack_grad)[0]
            radius = radius or attack.radius(crop_grads, self.objective.loss_scale(weight, x))
            attacked = jax.lax.stop_gradient(attack.ascend(x, iterate, crop_grads, radius))
        return dataclasses.replace(context, attacked=attacked), grad

    def with_rows_of(self, view: Any, context: StepContext) -> StepContext:
        """The context with weight 0 for rows that a replacing view leaves to others."""
        if not view.replace:
            return context
        inputs = context.inputs._replace(weight=context.inputs.weight * self._mask(view.name))
        return dataclasses.replace(context, inputs=inputs)


def _arrays(radius: Any, x: Any) -> Any:
    """The radius as arrays like x's crops [N, V, 1, 1, 1], so that microbatches can be stacked."""
    return jax.tree.map(
        lambda r, x: jnp.broadcast_to(jnp.asarray(r, x.dtype), (*x.shape[:-3], 1, 1, 1)), radius, x
    )
