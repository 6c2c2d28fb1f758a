"""What the two heads should predict: labels and box deltas (Faster R-CNN, section 3.1.2).

Legend: A anchors of an image, M its boxes with padding (label -1), S sampled regions, C classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax.detection.boxes import encode, iou
from hexa_jax.detection.matching import IGNORED, NEGATIVE, match, sample
from hexa_jax.detection.proposals import RPN_WEIGHTS, Proposals

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
ANCHORS_SAMPLED, ANCHOR_POSITIVES = 256, 0.5
REGIONS_SAMPLED, REGION_POSITIVES = 512, 0.25
UNIT_BOX = (0.0, 0.0, 1.0, 1.0)


class AnchorTargets(NamedTuple):
    """An image's masks bool [A] of sampled anchors, and deltas [A, 4] of the positive ones.

    Deltas are 0 elsewhere.
    """

    positive: jax.Array
    negative: jax.Array
    deltas: jax.Array


class RegionTargets(NamedTuple):
    """Sampled regions of an image.

    Attributes:
        boxes: [S, 4].
        labels: int32 [S]: 0 background, c + 1 for class c, -1 where there are fewer regions than S.
        deltas: [S, 4], 0 for background.
    """

    boxes: jax.Array
    labels: jax.Array
    deltas: jax.Array


def anchor_targets(
    key: jax.Array, anchors: jax.Array, boxes: jax.Array, labels: jax.Array
) -> AnchorTargets:
    """Targets of the proposal head.

    Args:
        key: typed key of the image.
        anchors: [A, 4].
        boxes: [M, 4].
        labels: int [M], -1 for padding.
    """
    known = labels >= 0
    found = match(iou(boxes, anchors), known, high=0.7, low=0.3, allow_low_quality=True)
    kind = jnp.where(found >= 0, 1, jnp.where(found == NEGATIVE, 0, -1))
    positive, negative = sample(key, kind, ANCHORS_SAMPLED, ANCHOR_POSITIVES)
    wanted = jnp.where(positive[:, None], boxes[jnp.maximum(found, 0)], anchors)
    return AnchorTargets(positive, negative, encode(wanted, anchors, RPN_WEIGHTS))


def region_targets(
    key: jax.Array,
    proposals: Proposals,
    boxes: jax.Array,
    labels: jax.Array,
    count: int = REGIONS_SAMPLED,
) -> RegionTargets:
    """Sample `count` regions of proposals and true boxes, with the box head's targets.

    Arguments as in `anchor_targets`.
    """
    known = labels >= 0
    unit = jnp.asarray(UNIT_BOX, boxes.dtype)[None]
    regions = jnp.concatenate([proposals.boxes, boxes])
    valid = jnp.concatenate([proposals.valid, known])
    regions = jax.lax.stop_gradient(jnp.where(valid[:, None], regions, unit))
    found = match(iou(boxes, regions), known, high=0.5, low=0.5, allow_low_quality=False)
    found = jnp.where(valid, found, IGNORED)
    kind = jnp.where(found >= 0, 1, jnp.where(found == NEGATIVE, 0, -1))
    positive, negative = sample(key, kind, count, REGION_POSITIVES)
    # Positives first; the order of the others is theirs.
    missing = max(0, count - len(kind))
    rank = jnp.pad(2 * positive.astype(jnp.int32) + negative, (0, missing))
    taken, index = jax.lax.top_k(rank, count)
    index = jnp.minimum(index, len(kind) - 1)
    sampled, is_positive = taken > 0, taken == 2
    box = jnp.maximum(found[index], 0)
    chosen = jnp.where(sampled[:, None], regions[index], unit)
    wanted = jnp.where(is_positive[:, None], boxes[box], chosen)
    classes = jnp.where(is_positive, labels[box] + 1, 0)
    return RegionTargets(
        boxes=chosen,
        labels=jnp.where(sampled, classes, -1).astype(jnp.int32),
        deltas=encode(wanted, chosen, BOX_WEIGHTS),
    )
