"""Supervised learning: the label of an example is its class.

With adversarial views this is AdvProp, with cut-mixed ones CutMix.

Legend: M microbatches, n rows of a microbatch, N rows, V crops, D feature, C classes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hexa_jax.core.batch import Batch
from hexa_jax.methods.base import Encode, LabelsBeforeStep, Spec, Targets


@dataclasses.dataclass(frozen=True)
class Supervised(LabelsBeforeStep):
    """Supervised learning: a linear classifier on pooled features, every crop against its label.

    Attributes:
        label_smoothing: Share of the label that is spread evenly over all classes.
    """

    label_smoothing: float

    has_head = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"supervised.label_smoothing={self.label_smoothing} must be at least 0 and below 1"
            )

    def check(self, spec: Spec) -> None:
        if spec.num_classes is None:
            raise ValueError("supervised learns from labels and the source has none")

    def init_params(self, key: jax.Array, spec: Spec) -> dict[str, jax.Array]:
        """Kernel [D, C] and bias [C], both uniform in +-1/sqrt(D): torch's nn.Linear."""
        assert spec.num_classes is not None
        bound = spec.embedding_dim**-0.5
        shapes = {"kernel": (spec.embedding_dim, spec.num_classes), "bias": (spec.num_classes,)}
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.uniform(own, shape, minval=-bound, maxval=bound)
            for own, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def targets(
        self, encode: Encode, params: Any, state: Any, batch: Batch, keys: jax.Array
    ) -> Targets:
        return Targets(y=batch.label, dictionary=(), known=batch.label >= 0)

    def loss(self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: Any) -> jax.Array:
        """Return cross-entropies [N, V]; 0 where y int32 [N] is -1.

        The partner of a mixed image may have no label.
        """
        logits = jnp.matmul(outputs, params["kernel"], precision="highest")
        log_probability = jax.nn.log_softmax(logits + params["bias"][None, None])
        own = jnp.take_along_axis(log_probability, jnp.maximum(y, 0)[:, None, None], axis=-1)
        smoothing = self.label_smoothing
        losses = -(1 - smoothing) * own[..., 0] - smoothing * jnp.mean(log_probability, axis=-1)
        return jnp.where(y[:, None] >= 0, losses, 0)
