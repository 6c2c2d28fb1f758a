"""MoCo-v2: find the query's own key among a queue of older keys.

Equations 1 and 2, Algorithm 1.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax.core.batch import Batch
from hexa_jax.losses import info_nce
from hexa_jax.methods.base import Encode, LabelsBeforeStep, Spec, Targets, check_positive


class MoCoState(NamedTuple):
    """State of MoCo.

    Attributes:
        key_params: parameters of the key encoder.
        queue: [K, D] keys of unit norm.
        position: int32, the row of the queue that is overwritten next.
    """

    key_params: Any
    queue: jax.Array
    position: jax.Array


def check_queue(block: str, queue_size: int, spec: Spec) -> None:
    """Check that crops and queue fit a query and its key.

    Raises:
        ValueError: they do not; one line that names the method's block.
    """
    if spec.num_crops != (1,):
        raise ValueError(
            f"{block} takes two crops of one size, a query and a key: data.num_crops=(2,) with one "
            "data.crop_size; "
            "deepcluster and swav take more"
        )
    if queue_size % spec.batch_size:
        below = queue_size // spec.batch_size * spec.batch_size
        near = ", ".join(str(size) for size in (below, below + spec.batch_size) if size)
        raise ValueError(
            f"{block}.queue_size={queue_size} is not a multiple of batch_size={spec.batch_size}: "
            f"use {near}"
        )


def queue_warnings(block: str, queue_size: int, spec: Spec) -> list[str]:
    """Return a line if the negatives are older keys of the very same images."""
    images = spec.num_examples
    if queue_size <= images:
        return []
    return [
        f"{block}.queue_size={queue_size} is more than the {images} images: the queue holds each "
        "image's own keys of up "
        f"to {-(-queue_size // images)} earlier epochs as negatives; use fewer, such as "
        f"--config.{block}.queue_size={images // spec.batch_size * spec.batch_size}"
    ]


@dataclasses.dataclass(frozen=True)
class MoCo(LabelsBeforeStep):
    """MoCo-v2 (facebookresearch/moco).

    Attributes:
        queue_size: K, number of negatives; a multiple of the batch size.
        momentum: of the key encoder: 0.999 in MoCo-v2, 0.99 in Algorithm 1 of the paper.
        temperature: of the softmax.
    """

    queue_size: int
    momentum: float
    temperature: float

    key_crops = 1
    pairs_own_crop = True

    def __post_init__(self) -> None:
        check_positive("moco", queue_size=self.queue_size, temperature=self.temperature)

    def check(self, spec: Spec) -> None:
        check_queue("moco", self.queue_size, spec)

    def warnings(self, spec: Spec) -> list[str]:
        return queue_warnings("moco", self.queue_size, spec)

    def init(self, key: jax.Array, params: Any, spec: Spec) -> MoCoState:
        queue = jax.random.normal(key, (self.queue_size, spec.embedding_dim))
        queue = queue / jnp.linalg.norm(queue, axis=1, keepdims=True)
        return MoCoState(jax.tree.map(jnp.copy, params["network"]), queue, jnp.zeros([], jnp.int32))

    def targets(
        self, encode: Encode, params: Any, state: MoCoState, batch: Batch, keys: jax.Array
    ) -> Targets:
        encoded = encode.key_crops(state.key_params)  # [M, n, 1, D], rows in shuffled order
        shape = encoded.shape[:2]
        assert batch.key_row is not None
        # Only embeddings travel back to their rows; the images were shuffled by the input
        # (shuffle-BN).
        positives = encoded.reshape(-1, encoded.shape[-1])[batch.key_row.reshape(-1)].reshape(
            *shape, -1
        )
        return Targets(y=positives, dictionary=state.queue, known=jnp.ones(shape, bool))

    def loss(
        self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: jax.Array
    ) -> jax.Array:
        score = lambda query: info_nce(query, y, dictionary, self.temperature)  # noqa: E731
        return jax.vmap(score, in_axes=1, out_axes=1)(outputs)

    def own_crop_labels(
        self, y: jax.Array, dictionary: jax.Array, outputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return jax.lax.stop_gradient(outputs[:, 0]), dictionary

    def update(
        self,
        state: MoCoState,
        params: Any,
        batch: Batch,
        outputs: jax.Array,
        targets: Targets | None,
        step: jax.Array,
    ) -> MoCoState:
        # Algorithm 1 moves the key encoder after the step; the reference moves it at the start of
        # the next, which is the same.
        assert targets is not None
        m = self.momentum
        key_params = jax.tree.map(
            lambda k, q: (m * k + (1 - m) * q).astype(k.dtype), state.key_params, params["network"]
        )
        keys = targets.y.reshape(-1, targets.y.shape[-1]).astype(state.queue.dtype)
        queue = jax.lax.dynamic_update_slice_in_dim(state.queue, keys, state.position, axis=0)
        return MoCoState(key_params, queue, (state.position + len(keys)) % self.queue_size)
