"""Rotation prediction: the pseudo-label of a view is how far it was turned.

Legend: N rows, V crops, D feature.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hexa_jax.core.batch import Batch
from hexa_jax.methods.base import Encode, LabelsBeforeStep, Spec, Targets

TURNS = 4


@dataclasses.dataclass(frozen=True)
class Rotation(LabelsBeforeStep):
    """RotNet (Gidaris et al., 2018): tell how far each crop was turned.

    Every crop is seen in all four orientations, which a linear layer tells apart.

    The order of the four is drawn per example. So the two images in a cut-mixed view are turned
    differently, and its pseudo-label is a true mixture.
    """

    has_head = False

    def check(self, spec: Spec) -> None:
        if spec.turned:
            raise ValueError(
                "rotation predicts how far a crop was turned: data.quarter_turns must be False, "
                "and "
                "data.flip not both, which also turns by half"
            )

    def prepare(self, keys: jax.Array, crops: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Return the four orientations of each crop, [N, V, S, S, C] -> [N, 4 V, S, S, C].

        Their order is the example's own.
        """

        def all_turns(x: jax.Array) -> jax.Array:
            turned = jnp.stack(
                [jnp.rot90(x, turns, axes=(2, 3)) for turns in range(TURNS)], axis=2
            )  # [N, V, 4, S, S, C]
            order = self._order(keys)  # [N, 4]
            turned = jax.vmap(lambda image, order: image[:, order])(turned, order)
            return turned.reshape(len(x), -1, *x.shape[2:])

        return tuple(all_turns(x) for x in crops)

    def _order(self, keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.permutation(key, TURNS))(keys)

    def init_params(self, key: jax.Array, spec: Spec) -> dict[str, jax.Array]:
        bound = spec.embedding_dim**-0.5  # torch's nn.Linear
        kernel = jax.random.uniform(key, (spec.embedding_dim, TURNS), minval=-bound, maxval=bound)
        return {"kernel": kernel, "bias": jnp.zeros(TURNS)}

    def targets(
        self, encode: Encode, params: Any, state: Any, batch: Batch, keys: jax.Array
    ) -> Targets:
        order = jax.vmap(self._order)(keys)  # [M, n, 4]
        return Targets(y=order, dictionary=(), known=jnp.ones(order.shape[:2], bool))

    def loss(self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: Any) -> jax.Array:
        logits = (
            jnp.matmul(outputs, params["kernel"], precision="highest") + params["bias"][None, None]
        )
        # [N, V], the same order for every crop of an example
        labels = jnp.tile(y, (1, outputs.shape[1] // TURNS))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
