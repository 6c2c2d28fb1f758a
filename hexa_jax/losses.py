"""Per-example losses: how well a prediction fits its pseudo-label (equations 1 to 4 of the paper, and the assignment rule of SwAV).

Legend: N examples, D embedding, K keys, negatives or clusters. Embeddings are expected L2-normalised.
"""

import jax
import jax.numpy as jnp


def info_nce(query: jax.Array, positive: jax.Array, negatives: jax.Array, temperature: float) -> jax.Array:
    """InfoNCE against a queue of negatives (equation 2).

    Args:
        query: [N, D] embeddings of the views to classify.
        positive: [N, D] the key of each query's own example.
        negatives: [K, D] keys of other examples, shared by all queries.
        temperature: softmax temperature; 0.2 in MoCo-v2.

    Returns:
        [N] losses: minus the log-probability of the positive among K + 1 candidates.
    """
    own = jnp.sum(query * positive, axis=-1) / temperature  # [N]
    others = jnp.matmul(query, negatives.T, precision="highest") / temperature  # [N, K]
    return jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own


def nt_xent(z1: jax.Array, z2: jax.Array, temperature: float) -> jax.Array:
    """NT-Xent of SimCLR: each view finds its sibling among the other 2N - 1 views of the batch.

    Args:
        z1: [N, D] embeddings of the first views.
        z2: [N, D] embeddings of the second views, same order.
        temperature: softmax temperature.

    Returns:
        [N] losses, the mean of both directions.
    """
    own = jnp.sum(z1 * z2, axis=-1) / temperature  # [N]
    itself = jnp.eye(z1.shape[0], dtype=bool)

    def direction(a: jax.Array, b: jax.Array) -> jax.Array:
        siblings = a @ b.T / temperature  # [N, N]
        same_side = jnp.where(itself, -jnp.inf, a @ a.T / temperature)
        return jax.nn.logsumexp(jnp.concatenate([siblings, same_side], axis=1), axis=1) - own

    return (direction(z1, z2) + direction(z2, z1)) / 2


def prototype_cross_entropy(z: jax.Array, prototypes: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
    """Softmax cross-entropy of the cluster index over cosine scores (equation 4).

    Args:
        z: [N, D] embeddings.
        prototypes: [K, D] centroids, unit norm.
        labels: [N] int cluster indices; -1 marks an example without a cluster.
        temperature: softmax temperature; 0.1 in DeepCluster-v2.

    Returns:
        [N] losses; exactly 0 where the label is -1, and the caller leaves those rows out of its mean.
    """
    scores = jnp.matmul(z, prototypes.T, precision="highest") / temperature  # [N, K]
    own = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(labels >= 0, jax.nn.logsumexp(scores, axis=-1) - own, 0)


def sinkhorn(
    scores: jax.Array,
    epsilon: float,
    iterations: int,
    *,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Soft assignments that share the batch out equally among the prototypes (SwAV, facebookresearch/swav main_swav.py).

    Args:
        scores: [N, K] cosine scores of examples against prototypes.
        epsilon: entropy weight; 0.05 in SwAV.
        iterations: rounds of column and row normalisation; 3 in SwAV.
        mask: bool [N], rows that take part; all of them by default.
        axis_name: mesh axis that the rows are split over; prototypes are then shared out among the rows of all devices, with
            one reduction of [K] numbers per iteration.

    Returns:
        [N, K] codes; each row sums to 1, rows that take no part to 0.
    """

    def over_rows(log_codes: jax.Array) -> jax.Array:  # logsumexp over the rows of all devices, [1, K]
        top = jnp.max(log_codes, axis=0, keepdims=True)
        if axis_name is not None:
            top = jax.lax.pmax(top, axis_name)
        total = jnp.sum(jnp.exp(log_codes - top), axis=0, keepdims=True)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        return top + jnp.log(total)

    # In log space: a row or column scaled by a constant does not change the result, and nothing overflows.
    log_codes = scores / epsilon
    absent = None if mask is None else ~mask[:, None]
    for _ in range(iterations):
        if absent is not None:
            log_codes = jnp.where(absent, -jnp.inf, log_codes)
        log_codes = log_codes - over_rows(log_codes)  # each prototype gets an equal share
        if absent is not None:
            log_codes = jnp.where(absent, 0, log_codes)
        log_codes = log_codes - jax.nn.logsumexp(log_codes, axis=1, keepdims=True)  # each example gives one unit
    codes = jnp.exp(log_codes)
    return codes if absent is None else jnp.where(absent, 0, codes)
