"""What a hard view may ask of the step that it is a part of."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from hexa_jax.core.rngs import Purpose, Rngs, purpose_of
from hexa_jax.training.row_share import RowShare
from hexa_jax.views import Attack, HardView
from hexa_jax.views.base import block_permutation

if TYPE_CHECKING:
    from hexa_jax.training.objective import Inputs, Objective


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What a view may ask of the step (`hexa_jax.views.Context`).

    For N rows of one device and microbatch.

    Attributes:
        objective: equation 10.
        params: all parameters.
        crops: clean crops, per resolution [N, V_r, H, W, 3].
        inputs: pseudo-labels and weights of the rows.
        rngs: seed, pass and step.
        data: the resident data set, or None.
        view: the view that asks.
        rows: which rows of the microbatch these are; None: all.
        outputs: clean outputs [N, V, D]; () where the view replaces the clean pass.
        attack_gradient: the losses' gradient at the crops, where the clean pass gave it.
        attacked: the clean crops after the attack on their own labels; () where no view asks for
            them.
    """

    objective: "Objective"
    params: Any
    crops: tuple[jax.Array, ...]
    inputs: "Inputs"
    rngs: Rngs
    data: jax.Array | None
    view: HardView | None = None
    rows: RowShare | None = None
    outputs: Any = ()
    attack_gradient: Any = None
    attacked: Any = ()

    def take(self, rows: RowShare) -> "StepContext":
        """Return the context of `rows` alone; what was computed for all rows is not in it."""
        if rows.whole:
            return self
        inputs = self.inputs
        batch, y, weight = rows.take((inputs.batch, inputs.y, inputs.weight))
        inputs = inputs._replace(batch=batch, y=y, weight=weight)
        return StepContext(
            self.objective,
            self.params,
            rows.take(self.crops),
            inputs,
            self.rngs,
            self.data,
            rows=rows,
        )

    @property
    def attack(self) -> Attack:
        """Settings of the attack."""
        return self.objective.scheme.attack

    def keys(self, purpose: str) -> jax.Array:
        """Typed PRNG keys [N], a function of (seed, purpose, epoch, example) only."""
        return self.rngs.per_example_keys(purpose_of(purpose), self.inputs.batch.index)

    def step_key(self, purpose: str) -> jax.Array:
        """A typed PRNG key, a function of (seed, purpose, step) only."""
        return self.rngs.per_row_keys(purpose_of(purpose), jnp.zeros(1, jnp.int32))[0]

    def partners(self) -> jax.Array:
        """Return partners int32 [N] from the same block of rows, hence on the same device.

        Keyed by (seed, step, block).
        """
        row, block = self.inputs.batch.row, self.objective.layout.cutmix_block
        if self.rows is not None:
            block = block * (self.rows.stop - self.rows.first) // self.rows.unit
        keys = self.rngs.per_row_keys(Purpose.PARTNER, row[::block])
        return block_permutation(keys, row.shape[0], block)

    def new_crops(self, number: int) -> tuple[jax.Array, ...]:
        """The number-th of the view's own sets of augmented clean crops, shaped like `crops`."""
        assert self.view is not None
        crop_set = self.objective.scheme.first_crop_set(self.view) + number
        return self.objective.online_crops(self.inputs.batch, self.rngs, self.data, crop_set)

    def losses(self, crops: tuple[jax.Array, ...]) -> jax.Array:
        """Return the method's own losses [N, V] of crops, by the view's BatchNorm set.

        No statistics are written.
        """
        assert self.view is not None
        outputs, _ = self.objective.forward(self.params, crops, self.view.norm)
        losses = self.objective.method.loss(
            self.params["method"], outputs, self.inputs.y, self.inputs.dictionary
        )
        return jax.lax.stop_gradient(losses)
