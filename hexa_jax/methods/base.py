"""The interface of a method: where pseudo-labels come from and how a prediction is scored.

A loss is per example and a pseudo-label is a leaf with leading axis N; so attacks (grad of the loss) and CutMix (labels of a
permuted batch) are written once, in the views and the step, and no method mentions them.

Legend: M microbatches, n rows of a microbatch, V crops, D embedding. Whole-step arrays are [M, n, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

EncodeKeys = Callable[[Any], jax.Array]


class Batch(NamedTuple):
    """One step's examples; leaves are [M, n, ...], split over devices along axis 1.

    Attributes:
        index: int32, the example's identity in the data set (and the key of all its random draws).
        row: int32, position in the step's batch, 0 to M * n - 1.
        valid: bool, False where an unreadable image was replaced.
        label: int32, -1 where there is none; never used for training.
        crops: per resolution [M, n, V_r, S, S, 3], uint8 from the host; empty when crops are cut on the device.
        key_crops: [M, n, 1, S, S, 3] views for a target encoder, in the order of `key_index`; None if the method has none.
        key_index: int32, the example that each row of `key_crops` shows.
        key_row: int32, for each row, the row of `key_crops` that shows the same example.
    """

    index: jax.Array
    row: jax.Array
    valid: jax.Array
    label: jax.Array
    crops: tuple[jax.Array, ...] = ()
    key_crops: jax.Array | None = None
    key_index: jax.Array | None = None
    key_row: jax.Array | None = None


class Targets(NamedTuple):
    """Pseudo-labels of a step.

    Attributes:
        y: leaves [M, n, ...], one pseudo-label per example; CutMix permutes it.
        dictionary: shared by the batch (queue, centroids); never permuted, constant for differentiation.
        known: bool [M, n], False where an example has no pseudo-label yet; those rows are left out of means.
    """

    y: Any
    dictionary: Any
    known: jax.Array


class Spec(NamedTuple):
    """Sizes that a method's state depends on; `num_crops` per resolution, without the crops of a target encoder."""

    batch_size: int
    steps_per_epoch: int
    num_examples: int
    embedding_dim: int
    num_crops: tuple[int, ...] = (2,)


class Method:
    """What the train step asks of a method; what most methods do alike is done here.

    A method either knows its pseudo-labels before the step (`targets`) or makes them from the step's own clean outputs
    (`needs_outputs`, `targets_from_outputs`). Its own trainable parameters, if it has any, are `params["method"]`.
    """

    key_crops = 0  # views per example that only a target encoder sees
    needs_first_pass = False  # whether an epoch of forward passes comes before the first step
    needs_outputs = False  # whether pseudo-labels depend on the step's clean outputs
    live_dictionary = False  # whether the clean loss, and the attack on it, differentiate through the dictionary
    has_head = True  # whether outputs are unit vectors from a projection head; else pooled features

    def check(self, spec: Spec) -> None:
        """Raises ValueError, one line, if the sizes do not fit together."""

    def prepare(self, keys: jax.Array, crops: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The network's input, where the task is a change of the input; crops as in `Batch`, keys [N] of the examples."""
        return crops

    def init_params(self, key: jax.Array, spec: Spec) -> dict[str, jax.Array]:
        """The method's own trainable parameters; empty if there are none."""
        return {}

    def init(self, key: jax.Array, params: Any, spec: Spec) -> Any:
        """The method's state before the first step."""
        return ()

    def state_spec(self, spec: Spec) -> Any:
        """PartitionSpecs: a tree prefix of the state."""
        return P()

    def targets(self, encode_keys: EncodeKeys, state: Any, batch: Batch, keys: jax.Array) -> Targets:
        """Pseudo-labels of the whole step, from whole arrays.

        `encode_keys(params)` gives embeddings [M, n, key_crops, D] of the batch's key crops, in their shuffled order: a
        training-mode forward pass that writes nothing and takes no gradient. `keys` [M, n] are those that `prepare` gets.
        """
        raise NotImplementedError(f"{type(self).__name__} makes its pseudo-labels from outputs")

    def targets_from_outputs(self, params: dict, state: Any, batch: Batch, outputs: jax.Array) -> Targets:
        """Pseudo-labels of the whole step from its clean outputs [M, n, V, D].

        Runs on one device's rows; what needs all rows communicates over the mesh axis "data". `params` are the method's own.
        """
        raise NotImplementedError(f"{type(self).__name__} knows its pseudo-labels before the step")

    def loss(self, params: dict, outputs: jax.Array, y: Any, dictionary: Any) -> jax.Array:
        """Losses [N, V] of outputs [N, V, D]; the objective is the mean over V, then over valid N."""
        raise NotImplementedError

    def freeze(self, gradients: dict, step: jax.Array) -> dict:
        """Gradients of the method's own parameters as the optimiser shall see them at step `step` (from 0)."""
        return gradients

    def project(self, params: dict) -> dict:
        """The method's own parameters after the optimiser's step, put back where they have to be."""
        return params

    def update(self, state: Any, params: Any, batch: Batch, outputs: jax.Array, targets: Targets | None) -> Any:
        """The state after a step, from all new parameters and the clean outputs [M, n, V, D].

        `targets` is None in the first pass, and for methods that make them from outputs.
        """
        return state

    def refresh(self, key: jax.Array, state: Any) -> Any:
        """The state at the start of an epoch."""
        return state

    def describe(self, before: Any, after: Any) -> dict[str, jax.Array]:
        """Scalars about a refresh, for the log."""
        return {}
