"""Optimisers and learning-rate schedules of the reference recipes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(base: float, final: float, steps: int, warmup_steps: int = 0, warmup_start: float = 0.0) -> Schedule:
    """Linear warm-up and cosine decay, both per step (facebookresearch/swav main_deepclusterv2.py).

    Args:
        base: highest learning rate.
        final: the cosine's end; the last step is just above it.
        steps: all steps, warm-up included.
        warmup_steps: steps of the warm-up, whose last one has `base`.
        warmup_start: learning rate of the first step of the warm-up.
    """

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.result_type(float))
        warm = warmup_start + (base - warmup_start) * step / max(warmup_steps - 1, 1)
        progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
        cosine = final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warm, cosine)

    return schedule


def epoch_cosine(base: float, epochs: int, steps_per_epoch: int) -> Schedule:
    """Cosine decay that changes once per epoch and ends just above zero (facebookresearch/moco main_moco.py)."""

    def schedule(step: jax.Array) -> jax.Array:
        epoch = (jnp.asarray(step) // steps_per_epoch).astype(jnp.result_type(float))
        return base * 0.5 * (1 + jnp.cos(jnp.pi * epoch / epochs))

    return schedule


def epoch_steps(base: float, milestones: Sequence[float], decay: float, steps_per_epoch: int) -> Schedule:
    """`base` times `decay` to the number of milestones (epochs, from 0, fractions too) that the step has reached."""

    def schedule(step: jax.Array) -> jax.Array:
        passed = sum(jnp.asarray(step) >= epoch * steps_per_epoch for epoch in milestones)
        return base * decay ** jnp.asarray(passed, jnp.result_type(float))

    return schedule


def warmed_up(schedule: Schedule, steps: int, start: float) -> Schedule:
    """The schedule, its first `steps` scaled by a factor that grows linearly from `start` to 1 (as in detectron2)."""

    def warm(step: jax.Array) -> jax.Array:
        share = jnp.minimum(step / max(steps, 1), 1.0)
        return schedule(step) * (start + (1 - start) * share if steps else 1.0)

    return warm


def adam(learning_rate: float | Schedule, weight_decay: float) -> optax.GradientTransformation:
    """torch's Adam: weight decay as part of the gradient."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))


def lars(
    learning_rate: float | Schedule, momentum: float, weight_decay: float, trust_coefficient: float
) -> optax.GradientTransformation:
    """SimCLR's LARS: vectors (BatchNorm and biases) are neither decayed nor adapted (google-research/simclr lars_optimizer.py)."""

    def matrices(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.lars(learning_rate, weight_decay, matrices, trust_coefficient, 0.0, matrices, momentum)


def sgd(learning_rate: float | Schedule, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """torch's SGD: weight decay on every parameter, momentum buffer without dampening, learning rate applied last."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))


class LarcState(NamedTuple):
    """Steps taken (int32) and the momentum buffers."""

    count: jax.Array
    momentum: optax.Updates


def larc(
    learning_rate: float | Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """apex's LARC(clip=False) around torch's SGD, as DeepCluster-v2 and SwAV use it (NVIDIA/apex LARC.py).

    Every tensor, biases and BatchNorm included, gets g <- (g + wd p) * trust |p| / (|g| + wd |p| + 1e-8); a tensor whose
    norm or gradient norm is zero keeps its plain gradient, without weight decay. The learning rate is applied after the
    momentum buffer. optax.lars differs in all three points.

    Args:
        learning_rate: number, or schedule of the step count.
        momentum: momentum of the buffer.
        weight_decay: L2 coefficient inside the adaptation.
        trust_coefficient: the `trust` above.
    """

    def init(params: optax.Params) -> LarcState:
        return LarcState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def adapt(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        p_norm, g_norm = jnp.linalg.norm(parameter.ravel()), jnp.linalg.norm(gradient.ravel())
        rate = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
        adapted = rate * (gradient + weight_decay * parameter)
        return jnp.where((p_norm > 0) & (g_norm > 0), adapted, gradient)

    def update(updates: optax.Updates, state: LarcState, params: optax.Params | None = None):
        if params is None:
            raise ValueError("larc scales each gradient by its parameter's norm: pass params to update")
        adapted = jax.tree.map(adapt, updates, params)
        buffers = jax.tree.map(lambda buffer, g: momentum * buffer + g, state.momentum, adapted)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        steps = jax.tree.map(lambda buffer: (-rate * buffer).astype(buffer.dtype), buffers)
        return steps, LarcState(state.count + 1, buffers)

    return optax.GradientTransformation(init, update)
