"""The examples of one training step, as every part of the program passes them on."""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """One step's examples; leaves are [M, n, ...], split over devices along axis 1.

    Attributes:
        index: int32, the example's identity in the data set (and the key of all its random draws).
        row: int32, position in the step's batch, 0 to M * n - 1.
        valid: bool, False where an unreadable image was replaced.
        label: int32, -1 where there is none; only a supervised method learns from it.
        crops: per resolution [M, n, V_r, S, S, 3], uint8 from the host; empty when crops are cut on
            the device.
        key_crops: [M, n, 1, S, S, 3] views for a target encoder, in the order of `key_index`; None
            if the method has none.
        key_index: int32, the example that each row of `key_crops` shows.
        key_row: int32, for each row, the row of `key_crops` that shows the same example.
        clean: bool, False where `Method.update` gets another view's outputs for the clean ones; set
            by the step, None where all outputs are clean.
    """

    index: jax.Array
    row: jax.Array
    valid: jax.Array
    label: jax.Array
    crops: tuple[jax.Array, ...] = ()
    key_crops: jax.Array | None = None
    key_index: jax.Array | None = None
    key_row: jax.Array | None = None
    clean: jax.Array | None = None
