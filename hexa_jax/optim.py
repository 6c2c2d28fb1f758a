"""Optimizers and learning-rate schedules of the reference recipes, built from optax."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(
    base: float, final: float, steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> Schedule:
    """Warm up linearly, then decay by a cosine, both per step.

    The rule of facebookresearch/swav, main_deepclusterv2.py.

    Args:
        base: highest learning rate.
        final: value that the cosine approaches; the last step is just above it.
        steps: all steps, warm-up included.
        warmup_steps: steps of the warm-up, the last of which has `base`.
        warmup_start: learning rate of the first step of the warm-up.
    """
    cosine = optax.cosine_decay_schedule(
        base, max(steps - warmup_steps, 1), alpha=final / base if base else 0.0
    )
    # One step less than optax's own warm-up: the last step of the warm-up already has `base`.
    warmup = optax.linear_schedule(warmup_start, base, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def epoch_cosine(base: float, epochs: int, steps_per_epoch: int) -> Schedule:
    """Decay by a cosine that changes once per epoch and ends just above zero.

    The rule of facebookresearch/moco, main_moco.py.
    """
    cosine = optax.cosine_decay_schedule(base, epochs)
    return lambda step: cosine(step // steps_per_epoch)


def epoch_steps(
    base: float, milestones: Sequence[float], decay: float, steps_per_epoch: int
) -> Schedule:
    """Multiply `base` by `decay` at each milestone, in epochs from 0; fractions are allowed."""
    reached = collections.Counter(math.ceil(epoch * steps_per_epoch) for epoch in milestones)
    return optax.piecewise_constant_schedule(
        base, {step: decay**times for step, times in reached.items()}
    )


def warmed_up(schedule: Schedule, steps: int, start: float) -> Schedule:
    """Scale the first `steps` of a schedule by a factor that grows linearly from `start` to 1.

    The warm-up of detectron2.
    """
    if not steps:
        return schedule
    factor = optax.linear_schedule(start, 1.0, steps)
    return lambda step: schedule(step) * factor(step)


def adam(learning_rate: float | Schedule, weight_decay: float) -> optax.GradientTransformation:
    """torch's Adam: weight decay is part of the gradient."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))


def lars(
    learning_rate: float | Schedule, momentum: float, weight_decay: float, trust_coefficient: float
) -> optax.GradientTransformation:
    """SimCLR's LARS: vectors (BatchNorm and biases) are neither decayed nor adapted.

    The rule of google-research/simclr, lars_optimizer.py.
    """

    def matrices(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.lars(
        learning_rate, weight_decay, matrices, trust_coefficient, 0.0, matrices, momentum
    )


def sgd(
    learning_rate: float | Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """torch's SGD: all parameters are decayed, momentum has no dampening, the rate comes last."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(learning_rate, momentum))


def larc(
    learning_rate: float | Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """apex's LARC(clip=False) around torch's SGD, as DeepCluster-v2 and SwAV use it.

    Args:
        learning_rate: number, or schedule of the step count.
        momentum: momentum of the buffer.
        weight_decay: L2 coefficient inside the adaptation.
        trust_coefficient: trust of `scale_by_larc`.
    """
    return optax.chain(
        scale_by_larc(weight_decay, trust_coefficient),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_larc(weight_decay: float, trust_coefficient: float) -> optax.GradientTransformation:
    """Scale each tensor's gradient by the ratio of its norms (NVIDIA/apex, LARC.py).

    A parameter p with gradient g, biases and BatchNorm included, gets
    (g + wd p) * trust |p| / (|g| + wd |p| + 1e-8). Where |p| or |g| is zero it keeps g, without
    weight decay. optax.lars differs in both points, and applies the learning rate before momentum.
    """

    def adapt(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        p_norm, g_norm = jnp.linalg.norm(parameter.ravel()), jnp.linalg.norm(gradient.ravel())
        rate = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
        adapted = rate * (gradient + weight_decay * parameter)
        return jnp.where((p_norm > 0) & (g_norm > 0), adapted, gradient)

    def update(updates: optax.Updates, params: optax.Params | None) -> Any:
        if params is None:
            raise ValueError(
                "larc scales each gradient by its parameter's norm: pass params to update"
            )
        return jax.tree.map(adapt, updates, params)

    return optax.stateless(update)
