"""SwAV: predict the code of the same image's other view.

A code is a soft assignment to trained prototypes.

Legend: M microbatches, n rows of a microbatch, N rows, V crops, A assign crops, K prototypes, D
    embedding, B batch, Q queue steps.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hexa_jax.core.batch import Batch
from hexa_jax.losses import sinkhorn
from hexa_jax.methods.base import (
    LabelsFromOutputs,
    Spec,
    Targets,
    check_not_negative,
    check_positive,
)


class SwAVState(NamedTuple):
    """State of SwAV.

    The queue [Q, B, A, D] of the last clean embeddings, split over devices along axis 1, and the
    int32 step that writes it next.

    Steps count from the one in which the queue starts to fill; they are negative before.
    """

    step: jax.Array
    queue: jax.Array


@dataclasses.dataclass(frozen=True)
class SwAV(LabelsFromOutputs):
    """SwAV (facebookresearch/swav main_swav.py).

    The codes come from the clean crops of the whole step. An attacked or mixed crop keeps the codes
    of its clean crops.

    Attributes:
        num_prototypes: K.
        assign_crops: A, how many of the first crops get codes; crop v predicts the codes of the
            others.
        temperature: of the softmax.
        epsilon: of Sinkhorn-Knopp.
        iterations: of Sinkhorn-Knopp.
        queue_length: older embeddings that take part in Sinkhorn-Knopp, a multiple of the batch
            size; 0: none.
        queue_start_epoch: epoch (from 0) in which the queue starts to fill; it is used once it is
            full.
        freeze_steps: steps in which prototypes get no gradient.
    """

    num_prototypes: int
    assign_crops: int
    temperature: float
    epsilon: float
    iterations: int
    queue_length: int
    queue_start_epoch: int
    freeze_steps: int

    def __post_init__(self) -> None:
        check_positive(
            "swav",
            num_prototypes=self.num_prototypes,
            assign_crops=self.assign_crops,
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.iterations,
        )
        check_not_negative(
            "swav",
            queue_length=self.queue_length,
            queue_start_epoch=self.queue_start_epoch,
            freeze_steps=self.freeze_steps,
        )

    def check(self, spec: Spec) -> None:
        if self.assign_crops > spec.num_crops[0]:
            raise ValueError(
                f"swav.assign_crops={self.assign_crops} is more than the {spec.num_crops[0]} large "
                "crops"
            )
        if sum(spec.num_crops) < 2:
            raise ValueError(
                "swav predicts one crop's code from another: data.num_crops needs two crops or more"
            )
        if self.queue_length % spec.batch_size:
            below = self.queue_length // spec.batch_size * spec.batch_size
            raise ValueError(
                f"swav.queue_length={self.queue_length} is not a multiple of "
                f"batch_size={spec.batch_size}: "
                f"use {below} or {below + spec.batch_size}"
            )

    def init_params(self, key: jax.Array, spec: Spec) -> dict[str, jax.Array]:
        bound = 1 / math.sqrt(spec.embedding_dim)  # torch's nn.Linear
        prototypes = jax.random.uniform(
            key, (self.num_prototypes, spec.embedding_dim), minval=-bound, maxval=bound
        )
        return self.project({"prototypes": prototypes})

    def init(self, key: jax.Array, params: Any, spec: Spec) -> SwAVState | tuple:
        if not self.queue_length:
            return ()
        slots = self.queue_length // spec.batch_size
        # Counted from the step in which the queue starts to fill.
        step = jnp.asarray(-self.queue_start_epoch * spec.steps_per_epoch, jnp.int32)
        return SwAVState(
            step, jnp.zeros((slots, spec.batch_size, self.assign_crops, spec.embedding_dim))
        )

    def state_spec(self, spec: Spec) -> Any:
        return SwAVState(P(), P(None, "data")) if self.queue_length else P()

    def targets_from_outputs(
        self, params: dict, state: Any, batch: Batch, outputs: jax.Array
    ) -> Targets:
        outputs = jax.lax.stop_gradient(outputs[:, :, : self.assign_crops])
        prototypes = jax.lax.stop_gradient(params["prototypes"])
        shape = outputs.shape[:2]

        def codes(crop: int) -> jax.Array:
            z = outputs[:, :, crop].reshape(-1, outputs.shape[-1])
            mask = None
            if self.queue_length:
                queue = state.queue[:, :, crop].reshape(-1, z.shape[-1]).astype(z.dtype)
                full = state.step >= len(state.queue)
                mask = jnp.arange(len(queue) + len(z)) >= jnp.where(full, 0, len(queue))
                z = jnp.concatenate([queue, z])
            scores = jnp.matmul(z, prototypes.T, precision="highest")
            assigned = sinkhorn(scores, self.epsilon, self.iterations, mask=mask, axis_name="data")
            return assigned[-math.prod(shape) :].reshape(*shape, -1)

        y = jnp.stack([codes(crop) for crop in range(self.assign_crops)], axis=2)  # [M, n, A, K]
        return Targets(y=y, dictionary=(), known=jnp.ones(shape, bool))

    def loss(self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: Any) -> jax.Array:
        """Swapped prediction: crop v against the codes of every assign crop but its own.

        The reference averages over the V - 1 other crops of a code, then over the A codes; the mean
        over V here is the same.
        """
        num_crops, assign = outputs.shape[1], self.assign_crops
        scores = jnp.einsum("nvd,kd->nvk", outputs, params["prototypes"], precision="highest")
        log_probability = jax.nn.log_softmax(scores / self.temperature, axis=-1)
        cross_entropy = -jnp.einsum("nak,nvk->nva", y, log_probability, precision="highest")
        others = ~jnp.eye(num_crops, assign, dtype=bool)
        return jnp.sum(cross_entropy * others[None], axis=-1) * (
            num_crops / (assign * (num_crops - 1))
        )

    def freeze(self, gradients: dict, step: jax.Array) -> dict:
        return jax.tree.map(lambda g: jnp.where(step < self.freeze_steps, 0, g), gradients)

    def project(self, params: dict) -> dict:
        """Prototypes of unit length, as the reference has them before each step."""
        prototypes = params["prototypes"]
        return {"prototypes": prototypes / jnp.linalg.norm(prototypes, axis=1, keepdims=True)}

    def update(
        self,
        state: Any,
        params: Any,
        batch: Batch,
        outputs: jax.Array,
        targets: Targets | None,
        step: jax.Array,
    ) -> Any:
        """Enqueue the step's clean embeddings; rows keep their devices."""
        if not self.queue_length:
            return state
        # Axis 1 is the split one: moving it to the front before joining the two keeps every row on
        # its device.
        rows = jnp.swapaxes(outputs[:, :, : self.assign_crops], 0, 1)
        rows = rows.reshape(1, -1, *rows.shape[2:]).astype(state.queue.dtype)
        slot = state.step % len(state.queue)
        queue = jax.lax.dynamic_update_slice_in_dim(state.queue, rows, slot, axis=0)
        return SwAVState(state.step + 1, queue)
