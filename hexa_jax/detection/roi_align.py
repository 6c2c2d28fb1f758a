"""RoIAlign: cut each box out of the pyramid level that fits its size.

Mask R-CNN; FPN, equation 1.

A gather of the four corners of each sample, with the levels laid end to end: one gather for all
boxes, whatever their levels.

Legend: R boxes, S = output_size * sampling_ratio samples along a side, C channels.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# a box of ImageNet's size belongs to the level of stride 16
CANONICAL_SIDE, CANONICAL_LEVEL = 224.0, 4


def assign_levels(boxes: jax.Array, num_levels: int = 4, finest: int = 2) -> jax.Array:
    """The level of each box [R, 4], int32 [R], 0 the finest; `finest` is log2 of its stride."""
    side = jnp.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    # Empty boxes give -inf, which the clamp brings to the finest level.
    level = jnp.floor(CANONICAL_LEVEL + jnp.log2(side / CANONICAL_SIDE) + 1e-6)
    return (jnp.clip(level, finest, finest + num_levels - 1) - finest).astype(jnp.int32)


def pyramid_roi_align(
    pyramid: Sequence[jax.Array],
    boxes: jax.Array,
    scales: Sequence[float],
    output_size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> jax.Array:
    """Features of boxes [R, output_size, output_size, C], in the dtype of the pyramid.

    Args:
        pyramid: maps [H, W, C] of an image, finest first.
        boxes: [R, 4] in pixels of the input.
        scales: size of each map over that of the input, powers of two.
        output_size: bins along a side.
        sampling_ratio: samples along a side of a bin, which are averaged.
        aligned: shift by half a cell, so that cell centres lie at half numbers (Detectron2's
            "ROIAlignV2"); torchvision's detectors do not.
    """
    finest = -round(math.log2(scales[0]))
    level = (
        assign_levels(boxes, len(pyramid), finest)
        if len(pyramid) > 1
        else jnp.zeros(len(boxes), jnp.int32)
    )
    sizes = np.array([feature.shape[:2] for feature in pyramid], np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))[:-1]]).astype(np.int32)
    channels = pyramid[0].shape[-1]
    flat = jnp.concatenate([feature.reshape(-1, channels) for feature in pyramid])
    wide = jnp.promote_types(jnp.float32, boxes.dtype)
    scale = jnp.asarray(np.array(scales), wide)[level][:, None]
    scaled = boxes.astype(wide) * scale - (0.5 if aligned else 0.0)
    height, width = jnp.asarray(sizes[:, 0])[level], jnp.asarray(sizes[:, 1])[level]
    y = _samples(scaled[:, 1], scaled[:, 3], height, output_size, sampling_ratio, aligned)
    x = _samples(scaled[:, 0], scaled[:, 2], width, output_size, sampling_ratio, aligned)
    start = jnp.asarray(starts)[level]
    total = None
    for row, row_weight in y:
        for column, column_weight in x:
            # [R, S, S]
            place = (
                start[:, None, None] + row[:, :, None] * width[:, None, None] + column[:, None, :]
            )
            weight = row_weight[:, :, None] * column_weight[:, None, :]
            corner = flat[place] * weight[..., None]  # in float32 or wider, as weights are
            total = corner if total is None else total + corner
    assert total is not None
    bins = total.reshape(-1, output_size, sampling_ratio, output_size, sampling_ratio, channels)
    return jnp.mean(bins, axis=(2, 4)).astype(flat.dtype)


def roi_align(
    features: jax.Array,
    boxes: jax.Array,
    scale: float,
    output_size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> jax.Array:
    """`pyramid_roi_align` from one map [H, W, C]."""
    return pyramid_roi_align([features], boxes, [scale], output_size, sampling_ratio, aligned)


def _samples(
    low: jax.Array,
    high: jax.Array,
    size: jax.Array,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> list[tuple[jax.Array, jax.Array]]:
    """The two neighbours of each sample along an axis: (index int32 [R, S], weight [R, S]) each.

    Samples more than a cell outside the map count as 0, nearer ones as the edge.
    """
    length = high - low if aligned else jnp.maximum(high - low, 1)
    offsets = (np.arange(output_size * sampling_ratio) + 0.5) / (output_size * sampling_ratio)
    place = low[:, None] + length[:, None] * jnp.asarray(offsets, low.dtype)[None]
    limit = size[:, None]
    inside = (place >= -1) & (place <= limit.astype(place.dtype))
    place = jnp.maximum(place, 0)
    lower = jnp.minimum(jnp.floor(place).astype(jnp.int32), limit - 1)
    upper = jnp.minimum(lower + 1, limit - 1)
    fraction = jnp.where(lower >= limit - 1, 0, place - lower.astype(place.dtype))
    return [(lower, (1 - fraction) * inside), (upper, fraction * inside)]
