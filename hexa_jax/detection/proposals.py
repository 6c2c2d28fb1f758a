"""Region proposals: the best anchors of each level, moved by their deltas, deduplicated.

Their number per image is fixed.

Order of operations and tie rules are torchvision's (RegionProposalNetwork.filter_proposals).

Legend: P proposals of an image, n anchors of a level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax.detection.boxes import clip, decode, large_enough, nms

RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
NMS_THRESHOLD = 0.7
SMALLEST = 1e-3  # pixels


class Proposals(NamedTuple):
    """An image's proposals, best first.

    Boxes float32 [P, 4], scores [P] (probability of an object), valid bool [P].
    """

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


def propose(
    objectness: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    size: jax.Array,
    before: int,
    after: int,
) -> Proposals:
    """Proposals of one image.

    Args:
        objectness: logits [n] of each level.
        deltas: [n, 4] of each level.
        anchors: [n, 4] of each level.
        size: int [2], height and width of the content.
        before: best anchors of a level that are looked at.
        after: P, best boxes of all levels that are returned.
    """
    boxes, scores, kept = [], [], []
    for logits, delta, anchor in zip(objectness, deltas, anchors, strict=True):
        # top_k of equal logits takes the lower index, and so does nms.
        best, index = jax.lax.top_k(logits, min(before, len(logits)))
        level = clip(decode(delta[index], anchor[index], RPN_WEIGHTS), size)
        score = jax.nn.sigmoid(best)
        boxes.append(level)
        scores.append(score)
        kept.append(nms(level, score, NMS_THRESHOLD, large_enough(level, SMALLEST)))
    all_boxes, all_scores, valid = (jnp.concatenate(parts) for parts in (boxes, scores, kept))
    missing = max(0, after - len(all_scores))
    ranked, index = jax.lax.top_k(
        jnp.pad(jnp.where(valid, all_scores, -1), (0, missing), constant_values=-1), after
    )
    found = ranked >= 0
    chosen = jnp.pad(all_boxes, ((0, missing), (0, 0)))[index]
    return Proposals(jnp.where(found[:, None], chosen, 0), jnp.where(found, ranked, 0), found)
