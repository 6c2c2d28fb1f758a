"""Boxes (x1, y1, x2, y2) in continuous pixels: areas, overlaps, coding, suppression.

Legend: A and B, R boxes.
"""

import math

import jax
import jax.numpy as jnp

# a prediction may not stretch a box further: exp of it stays finite
LARGEST_LOG_SCALE = math.log(1000 / 16)
Weights = tuple[float, float, float, float]


def area(boxes: jax.Array) -> jax.Array:
    """[..., 4] -> [...] square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return intersection over union [A, B] of boxes [A, 4] and [B, 4]; 0 where both are empty."""
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    union = area(a)[:, None] + area(b)[None] - intersection
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 0)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes [..., 4] cut off at the edges of an image of `size` [..., 2] = (height, width)."""
    size = jnp.asarray(size).astype(boxes.dtype)
    limit = jnp.stack([size[..., 1], size[..., 0], size[..., 1], size[..., 0]], axis=-1)
    limit = jnp.broadcast_to(
        limit.reshape(limit.shape[:-1] + (1,) * (boxes.ndim - limit.ndim) + (4,)), boxes.shape
    )
    return jnp.clip(boxes, 0, limit)


def large_enough(boxes: jax.Array, side: float) -> jax.Array:
    """bool [...]: both sides of a box [..., 4] are at least `side` pixels."""
    return (boxes[..., 2] - boxes[..., 0] >= side) & (boxes[..., 3] - boxes[..., 1] >= side)


def _centres(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centres and sizes, [..., 2] each, x first."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def _scales(weights: Weights, dtype: jnp.dtype, ndim: int) -> jax.Array:
    return jnp.asarray(weights, dtype).reshape((1,) * (ndim - 1) + (4,))


def encode(boxes: jax.Array, references: jax.Array, weights: Weights) -> jax.Array:
    """Encode what turns references into boxes (R-CNN, appendix C), all [..., 4].

    Args:
        boxes: targets.
        references: anchors or proposals, with sides above 0.
        weights: of x, y, width and height, which bring predictions to unit variance.
    """
    (centre, size), (ref_centre, ref_size) = _centres(boxes), _centres(references)
    deltas = jnp.concatenate([(centre - ref_centre) / ref_size, jnp.log(size / ref_size)], axis=-1)
    return deltas * _scales(weights, deltas.dtype, deltas.ndim)


def decode(deltas: jax.Array, references: jax.Array, weights: Weights) -> jax.Array:
    """Boxes [..., 4] that predictions make of references; the inverse of `encode`."""
    deltas = deltas / _scales(weights, deltas.dtype, deltas.ndim)
    ref_centre, ref_size = _centres(references)
    centre = deltas[..., :2] * ref_size + ref_centre
    size = jnp.exp(jnp.minimum(deltas[..., 2:], LARGEST_LOG_SCALE)) * ref_size
    return jnp.concatenate([centre - 0.5 * size, centre + 0.5 * size], axis=-1)


def nms(
    boxes: jax.Array, scores: jax.Array, threshold: float, valid: jax.Array | None = None
) -> jax.Array:
    """Greedy non-maximum suppression: which boxes stay, bool [R].

    A box goes when one that stays, with a higher score (or the same one and a lower index),
    overlaps it by more than `threshold`.

    All boxes are decided at once, again and again until nothing changes. What is said of a box
    depends only on better ones, so after n rounds the best n are right; in practice a few rounds
    are enough. A loop over boxes would be slow on accelerators.

    Args:
        boxes: [R, 4].
        scores: [R].
        threshold: IoU above which the lower score goes.
        valid: bool [R]; others neither stay nor suppress. None: all.
    """
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
    kept = valid[order]
    ranked = boxes[order]
    better = jnp.arange(len(scores))[:, None] < jnp.arange(len(scores))[None]
    suppresses = (iou(ranked, ranked) > threshold) & better  # [by, whom]

    def again(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(state[0] != state[1])

    def decide(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        now, _ = state
        return kept & ~jnp.any(suppresses & now[:, None], axis=0), now

    stays, _ = jax.lax.while_loop(again, decide, (decide((kept, kept))[0], kept))
    return jnp.zeros_like(valid).at[order].set(stays)
