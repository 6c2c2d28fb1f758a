"""The interface of a method: where pseudo-labels come from and how a prediction is scored.

A loss is per example and a pseudo-label is a leaf with leading axis N; so attacks (grad of the
loss) and CutMix (labels of a permuted batch) are written once, in the views and the step, and no
method mentions them.

Legend: M microbatches, n rows of a microbatch, V crops, D embedding. Whole-step arrays are [M, n,
    ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hexa_jax.core.batch import Batch


class Encode(NamedTuple):
    """Functions of a target network's parameters that return its projections.

    Training mode; no statistics are written, and no gradient flows.

    Attributes:
        key_crops: -> [M, n, 1, D] of the batch's key crops, in their shuffled order
            (`Batch.key_row` puts them back).
        crops: -> [M, n, V, D] of the crops that the network itself learns from.
    """

    key_crops: Callable[[Any], jax.Array]
    crops: Callable[[Any], jax.Array]


class Targets(NamedTuple):
    """Pseudo-labels of a step.

    Attributes:
        y: leaves [M, n, ...], one pseudo-label per example; CutMix permutes it.
        dictionary: shared by the batch (queue, centroids); never permuted, constant for
            differentiation.
        known: bool [M, n], False where an example has no pseudo-label yet; those rows are left out
            of means.
    """

    y: Any
    dictionary: Any
    known: jax.Array


class Spec(NamedTuple):
    """Sizes that a method's state depends on.

    Attributes:
        batch_size: examples of a step.
        steps_per_epoch: whole batches in the data set.
        num_examples: of the data set.
        embedding_dim: length of an output.
        num_crops: per resolution, without the crops of a target encoder.
        total_steps: of the run.
        num_classes: of the data set; None without labels.
        clean_share: share of the rows of a step that have clean outputs, once all hard views count.
        turned: whether augmentation may show a crop upside down or turned by a quarter.
    """

    batch_size: int
    steps_per_epoch: int
    num_examples: int
    embedding_dim: int
    num_crops: tuple[int, ...] = (2,)
    total_steps: int = 1
    num_classes: int | None = None
    clean_share: float = 1.0
    turned: bool = False


def check_positive(block: str, **fields: float) -> None:
    """Raise ValueError, one line, where a field of the block `config.BLOCK` is not above 0."""
    for name, value in fields.items():
        if value <= 0:
            raise ValueError(f"{block}.{name}={value} must be positive")


def check_not_negative(block: str, **fields: float) -> None:
    """Raise ValueError, one line, where a field of the block `config.BLOCK` is below 0."""
    for name, value in fields.items():
        if value < 0:
            raise ValueError(f"{block}.{name}={value} must be 0 or more")


class Method:
    """What the train step asks of a method; what most methods do alike is done here.

    A subclass is a frozen dataclass whose fields are its block `config.NAME`. Its `__post_init__`
    raises ValueError, one line that begins with NAME.FIELD, for a value that cannot work. It is one
    of two kinds: `LabelsBeforeStep` or `LabelsFromOutputs`. Its own trainable parameters, if it has
    any, are `params["method"]`.
    """

    key_crops = 0  # views per example that only a target encoder sees
    needs_first_pass = False  # whether an epoch of forward passes comes before the first step
    # whether the clean loss, and the attack on it, differentiate through the dictionary
    live_dictionary = False
    has_head = True  # whether outputs are unit vectors from a projection head; else pooled features
    pairs_own_crop = False  # whether a view may predict its own clean crop (`own_crop_labels`)

    def check(self, spec: Spec) -> None:
        """Raises ValueError, one line, if the sizes do not fit together."""

    def warnings(self, spec: Spec) -> list[str]:
        """Return a line for each thing that works, but hardly as it is meant."""
        return []

    def for_run(self, spec: Spec) -> "Method":
        """Return the method for a run of these sizes.

        For schedules over the run, which may be extended later.
        """
        return self

    def prepare(self, keys: jax.Array, crops: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Return the network's input, for methods whose task is a change of the input.

        Crops are as in `Batch`; keys [N] are those of the examples.
        """
        return crops

    def make_predictor(
        self, embedding_dim: int, dtype: Any, auxiliary_norm: bool
    ) -> nn.Module | None:
        """Return a module behind the projection head of the online network only, or None.

        It maps (z [R, D], mode: NormMode) to [R, D].

        Args:
            embedding_dim: D.
            dtype: compute precision.
            auxiliary_norm: whether its BatchNorm needs an adversarial set.
        """
        return None

    def init_params(self, key: jax.Array, spec: Spec) -> dict[str, jax.Array]:
        """The method's own trainable parameters; empty if there are none."""
        return {}

    def init(self, key: jax.Array, params: Any, spec: Spec) -> Any:
        """The method's state before the first step; params as in `TrainState`."""
        return ()

    def state_spec(self, spec: Spec) -> Any:
        """PartitionSpecs: a tree prefix of the state."""
        return P()

    def targets(
        self, encode: Encode, params: Any, state: Any, batch: Batch, keys: jax.Array
    ) -> Targets:
        """Pseudo-labels of the whole step, from whole arrays, before its outputs are known.

        Args:
            encode: target networks' projections.
            params: all parameters, before the step.
            state: the method's.
            batch: leaves [M, n, ...].
            keys: [M, n], those that `prepare` gets.
        """
        raise NotImplementedError

    def loss(self, params: dict, outputs: jax.Array, y: Any, dictionary: Any) -> jax.Array:
        """Return losses [N, V] of outputs [N, V, D].

        The objective is their mean over V, then over the valid N.
        """
        raise NotImplementedError

    def mixed_loss(
        self,
        params: dict,
        outputs: jax.Array,
        y: Any,
        y_partner: Any,
        lam: jax.Array,
        dictionary: Any,
    ) -> jax.Array:
        """Return losses [N, V] of mixed images (equation 9).

        lam [N, V] is the share of y; y_partner has the rest.
        """
        own = self.loss(params, outputs, y, dictionary)
        return lam * own + (1 - lam) * self.loss(params, outputs, y_partner, dictionary)

    def own_crop_labels(self, y: Any, dictionary: Any, outputs: jax.Array) -> tuple[Any, Any]:
        """Return (y, dictionary) by which each crop predicts its own clean output.

        Args:
            y: leaves [N, ...].
            dictionary: as `loss` gets it.
            outputs: clean outputs [N, V, D].
        """
        raise NotImplementedError(f"{type(self).__name__} has no label for a crop of its own")

    def freeze(self, gradients: dict, step: jax.Array) -> dict:
        """Return the gradients of the method's own parameters that the optimizer gets."""
        return gradients

    def project(self, params: dict) -> dict:
        """Return the method's own parameters, put back in place after the optimizer's step."""
        return params

    def update(
        self,
        state: Any,
        params: Any,
        batch: Batch,
        outputs: jax.Array,
        targets: Targets | None,
        step: jax.Array,
    ) -> Any:
        """The state after a step.

        Args:
            state: before the step.
            params: all parameters, after the step.
            batch: leaves [M, n, ...].
            outputs: clean outputs [M, n, V, D]; where `batch.clean` is False, those of the view
                that replaced the clean one.
            targets: what `targets` returned; None in the first pass.
            step: int32, optimizer steps taken before this one.
        """
        return state

    def refresh(self, key: jax.Array, state: Any) -> Any:
        """The state at the start of an epoch."""
        return state

    def describe(self, before: Any, after: Any) -> dict[str, jax.Array]:
        """Scalars about a refresh, for the log."""
        return {}


class LabelsBeforeStep(Method):
    """A method that knows its pseudo-labels before the step: it defines `targets`."""


class LabelsFromOutputs(Method):
    """A method whose pseudo-labels come from the step's own clean outputs.

    It defines `targets_from_outputs`.
    """

    def targets(
        self, encode: Encode, params: Any, state: Any, batch: Batch, keys: jax.Array
    ) -> Targets:
        """Nothing yet."""
        return Targets(y=(), dictionary=(), known=jnp.ones(batch.valid.shape, bool))

    def targets_from_outputs(
        self, params: dict, state: Any, batch: Batch, outputs: jax.Array
    ) -> Targets:
        """Pseudo-labels of the whole step from its clean outputs [M, n, V, D].

        Runs on one device's rows; what needs all rows communicates over the mesh axis "data".
        `params` are the method's own.
        """
        raise NotImplementedError
