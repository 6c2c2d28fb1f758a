"""Equation 10 for methods whose pseudo-labels come from the step's own outputs (SimCLR, SwAV), in microbatches that are exact.

Gradients are cached at the embeddings, in three phases on each device's rows: embed all microbatches; make pseudo-labels,
loss and its gradient with respect to the embeddings, which needs all of them but no image; then replay each microbatch to
carry that gradient on to the parameters. With one microbatch nothing is replayed. Only embeddings are held for the whole step.

Where the clean loss also differentiates through its dictionary (SimCLR), so does the attack, and it takes the same three phases.

Legend: M microbatches, n rows of a microbatch, V crops, D embedding. Arrays are [M, n, ...] unless said otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax import draws
from hexa_jax.draws import Draws
from hexa_jax.methods.base import Batch, Targets
from hexa_jax.microbatch import accumulate, twice
from hexa_jax.models.norm import CLEAN
from hexa_jax.objective import Gradients, Objective, Rows, Shown, own_params


class Known(NamedTuple):
    """What has to be known of the whole step before its hard views: leaves [M, ...] of one device.

    Attributes:
        targets: pseudo-labels, constants from here on.
        slope: gradient of the clean loss with respect to the clean outputs [M, n, V, D].
        own_slope: of the clean loss with respect to the method's own parameters.
        loss: this device's part of the clean loss.
        outputs: clean outputs [M, n, V, D].
        point: images that the attack's last step starts from, or () where they are made anew.
        attack_slope: gradient of the attacked loss with respect to its outputs at `point`, or ().
    """

    targets: Targets
    slope: jax.Array
    own_slope: Any
    loss: jax.Array
    outputs: jax.Array
    point: Any = ()
    attack_slope: Any = ()


@dataclasses.dataclass(frozen=True)
class WholeStep:
    """One device's part of a step.

    Attributes:
        objective: equation 10.
        params: all parameters.
        state: the method's state, this device's part.
        batch: the step's rows on this device.
        weight: [M, n] each row's share in the mean of the whole step.
        at: seed, pass and step.
        data: the resident data set, or None.
    """

    objective: Objective
    params: Any
    state: Any
    batch: Batch
    weight: jax.Array
    at: Draws
    data: jax.Array | None

    def gradients(self) -> Gradients:
        """This device's part; outputs [M, n, V, D], moments averaged over microbatches."""
        known, clean_again, attack_again = self._know()

        def one(leaves: Any) -> tuple[Any, Any]:
            rows, slope, attack = self._rows(leaves, known)
            _, (x, pull, moments) = clean_again(rows.batch)
            grads, x_slope = pull(slope)
            attacked = self._attacked(x, rows, x_slope, attack, attack_again)
            plain = Gradients(grads, {CLEAN: moments}, {}, ())
            result = self.objective.add_hard_views(plain, self.params, x, attacked, rows, self.at)
            return (result.params, result.moments, result.losses), ()

        (grads, moments, losses), _ = accumulate(one, self._leaves(known))
        if "method" in grads:
            grads = grads | {"method": jax.tree.map(jnp.add, grads["method"], known.own_slope)}
        moments = jax.tree.map(lambda m: m / len(self.weight), moments)
        return Gradients(grads, moments, {CLEAN: known.loss} | losses, known.outputs)

    def views(self) -> Shown:
        """`Objective.views_of` for each microbatch."""
        known, clean_again, attack_again = self._know()

        def one(leaves: Any) -> tuple[Any, Shown]:
            rows, slope, attack = self._rows(leaves, known)
            _, (x, pull, _) = clean_again(rows.batch)
            attacked = self._attacked(x, rows, pull(slope)[1], attack, attack_again)
            return (), self.objective.views_of(self.params, x, attacked, rows, self.at)

        return accumulate(one, self._leaves(known))[1]

    # ---- Phases -------------------------------------------------------------------------------------------------------

    def _know(self) -> tuple[Known, Callable, Callable]:
        """What the hard views wait for, and functions that give a microbatch's clean and attacked passes (again)."""

        def clean(batch: Batch) -> tuple[jax.Array, Any]:
            x = self._crops(batch)
            forward = lambda params, x: self.objective.forward(params, x, CLEAN)  # noqa: E731
            outputs, pull, moments = jax.vjp(forward, self.params, x, has_aux=True)
            return outputs, (x, pull, moments)

        outputs, clean_again = twice(clean, self.batch)
        own = own_params(self.params)
        (loss, targets), (slope, own_slope) = jax.value_and_grad(self._score, (0, 1), has_aux=True)(outputs, own)
        known = Known(jax.lax.stop_gradient(targets), slope, own_slope, loss, outputs)
        if not self._attacks_whole:
            return known, clean_again, clean_again
        point, attack_slope, attack_again = self._attack()
        return known._replace(point=point, attack_slope=attack_slope), clean_again, attack_again

    def _score(self, outputs: jax.Array, own: dict) -> tuple[jax.Array, Targets]:
        """This device's part of the loss of outputs [M, n, V, D], with the pseudo-labels that they give."""
        method = self.objective.method
        targets = method.targets_from_outputs(own, self.state, self.batch, outputs)
        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        losses = method.loss(own, flat(outputs), jax.tree.map(flat, targets.y), targets.dictionary)
        return jnp.sum(losses * flat(self.weight)[:, None]) / losses.shape[1], targets

    @property
    def _attacks_whole(self) -> bool:
        """Whether the attack needs all outputs, too, and cannot take its gradient from the clean pass."""
        views = self.objective.views
        alone = views.shared_gradient and views.steps == 1
        return views.attacks and self.objective.method.live_dictionary and not alone

    def _attack(self) -> tuple[Any, jax.Array, Callable]:
        """All steps of the attack but the last half: its starting point, and the gradient at the outputs there."""
        objective, ball = self.objective, self.objective.views.ball
        own = own_params(self.params)

        def attacked(leaves: Any) -> tuple[jax.Array, Any]:
            batch, point = leaves
            x = self._crops(batch)
            point = point or self._start(x, batch)
            forward = lambda x: objective.forward(self.params, x, objective.attack_view)[0]  # noqa: E731
            outputs, pull = jax.vjp(forward, point)
            return outputs, (x, point, pull)

        points: Any = ()
        for step in range(objective.views.steps):
            outputs, again = twice(attacked, (self.batch, points))
            slope = jax.grad(self._score, has_aux=True)(outputs, own)[0]
            if step < objective.views.steps - 1:

                def move(leaves: Any, again: Callable = again) -> tuple[Any, Any]:
                    split, slope = leaves
                    _, (x, point, pull) = again(split)
                    return (), ball.ascend(x, point, pull(slope)[0])

                points = accumulate(move, ((self.batch, points), slope))[1]
        return points, slope, again

    def _start(self, x: Any, batch: Batch) -> Any:
        views = self.objective.views
        if not views.random_start:
            return x
        return views.ball.random_point(self.at.of_examples(draws.ATTACK, batch.index), x)

    # ---- One microbatch -----------------------------------------------------------------------------------------------

    def _crops(self, batch: Batch) -> tuple[jax.Array, ...]:
        return self.objective.online_crops(batch, self.at, self.data)

    def _leaves(self, known: Known) -> Any:
        return self.batch, self.weight, known.targets.y, known.slope, known.point, known.attack_slope

    def _rows(self, leaves: Any, known: Known) -> tuple[Rows, jax.Array, Any]:
        batch, weight, y, slope, point, attack_slope = leaves
        return Rows(batch, y, weight, known.targets.dictionary), slope, (point, attack_slope)

    def _attacked(self, x: Any, rows: Rows, x_slope: Any, attack: Any, attack_again: Callable) -> Any:
        """Adversarial views of the crops x, or None where there are none."""
        views = self.objective.views
        if not views.attacks:
            return None
        if not self._attacks_whole:
            shared = x_slope if views.shared_gradient else None
            return self.objective.attack(self.params, x, rows, self.at, shared)
        point, slope = attack
        _, (_, point, pull) = attack_again((rows.batch, point))
        return jax.lax.stop_gradient(views.ball.ascend(x, point, pull(slope)[0]))
