"""Which box each anchor or proposal should find, and which of them the losses look at.

Legend: G boxes of an image, A anchors or proposals.
"""

import jax
import jax.numpy as jnp

NEGATIVE, IGNORED = -1, -2


def match(
    overlaps: jax.Array, valid: jax.Array, high: float, low: float, allow_low_quality: bool
) -> jax.Array:
    """Match each anchor with a box, int32 [A].

    Its index; NEGATIVE below `low`, IGNORED from `low` to `high`.

    Args:
        overlaps: IoU [G, A].
        valid: bool [G]; the other rows are padding.
        high: IoU from which an anchor belongs to the box that it overlaps most.
        low: IoU below which it is background.
        allow_low_quality: the anchors that overlap a box most belong to their own best box however
            little they overlap it, so that each box has anchors (Faster R-CNN, section 3.1.2). As
            in torchvision, all anchors with that same overlap do.
    """
    overlaps = jnp.where(valid[:, None], overlaps, -1)
    best, box = jnp.max(overlaps, axis=0), jnp.argmax(overlaps, axis=0).astype(jnp.int32)
    found = jnp.where(best >= high, box, jnp.where(best < low, NEGATIVE, IGNORED))
    if allow_low_quality:
        best_of_box = jnp.max(overlaps, axis=1, keepdims=True)
        forced = jnp.any((overlaps == best_of_box) & valid[:, None], axis=0)
        found = jnp.where(forced, box, found)
    return found.astype(jnp.int32)


def sample(
    key: jax.Array, labels: jax.Array, count: int, positive_fraction: float
) -> tuple[jax.Array, jax.Array]:
    """Draw the anchors that enter the losses: positives and negatives, bool [A] each.

    Without replacement.

    Args:
        key: typed key.
        labels: int [A]: 1 positive, 0 negative, anything else is never drawn.
        count: of both together, if there are as many.
        positive_fraction: at most this part of `count` is positive; negatives fill up the rest.
    """
    priority = jax.random.uniform(key, labels.shape)

    def first(candidates: jax.Array, limit: jax.Array | int) -> jax.Array:
        rank = jnp.argsort(jnp.argsort(jnp.where(candidates, priority, 2.0)))
        return candidates & (rank < limit)

    positive = first(labels == 1, int(count * positive_fraction))
    negative = first(labels == 0, count - jnp.sum(positive))
    return positive, negative
