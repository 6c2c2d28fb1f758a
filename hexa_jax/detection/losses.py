"""The four losses of Faster R-CNN, as sums over an image and numbers to divide by.

The rules of torchvision's rpn.py and roi_heads.py.

Legend: A anchors of an image, S sampled regions, C classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hexa_jax.detection.targets import AnchorTargets, RegionTargets

BETA = 1 / 9  # where the box losses turn from squares to absolute values


class LossSums(NamedTuple):
    """Scalars of one or more images: sums of losses, numbers of sampled anchors and regions."""

    objectness: jax.Array
    rpn_box: jax.Array
    classifier: jax.Array
    box: jax.Array
    anchors: jax.Array
    regions: jax.Array

    def means(self) -> dict[str, jax.Array]:
        """The losses; box losses are divided by all that were sampled, not by the positive ones."""
        anchors, regions = jnp.maximum(self.anchors, 1), jnp.maximum(self.regions, 1)
        return {
            "loss_objectness": self.objectness / anchors,
            "loss_rpn_box": self.rpn_box / anchors,
            "loss_classifier": self.classifier / regions,
            "loss_box": self.box / regions,
        }


def smooth_l1(error: jax.Array) -> jax.Array:
    """Sum over [...]: error^2 / (2 BETA) within BETA, |error| - BETA / 2 beyond."""
    size = jnp.abs(error)
    return jnp.sum(jnp.where(size < BETA, 0.5 * size**2 / BETA, size - 0.5 * BETA))


def loss_sums(
    objectness: jax.Array,
    deltas: jax.Array,
    anchors: AnchorTargets,
    scores: jax.Array,
    box_deltas: jax.Array,
    regions: RegionTargets,
) -> LossSums:
    """Of one image.

    Args:
        objectness: logits [A] of all levels.
        deltas: [A, 4].
        anchors: their targets.
        scores: logits [S, C + 1].
        box_deltas: [S, C + 1, 4].
        regions: their targets.
    """
    used = anchors.positive | anchors.negative
    binary = optax.sigmoid_binary_cross_entropy(
        objectness, anchors.positive.astype(objectness.dtype)
    )
    labels = jnp.maximum(regions.labels, 0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    # each class has deltas of its own
    own = jnp.take_along_axis(box_deltas, labels[:, None, None], axis=1)[:, 0]
    return LossSums(
        objectness=jnp.sum(jnp.where(used, binary, 0)),
        rpn_box=smooth_l1(jnp.where(anchors.positive[:, None], deltas - anchors.deltas, 0)),
        classifier=jnp.sum(jnp.where(regions.labels >= 0, entropy, 0)),
        box=smooth_l1(jnp.where(regions.labels[:, None] > 0, own - regions.deltas, 0)),
        anchors=jnp.sum(used).astype(scores.dtype),
        regions=jnp.sum(regions.labels >= 0).astype(scores.dtype),
    )
