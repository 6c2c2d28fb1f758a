"""Per-example losses (equations 1 to 4 of the paper) and SwAV's soft assignment.

Shapes: N examples, D dimensions of an embedding, K keys, negatives or clusters. Embeddings are
expected to have unit L2 norm.
"""

import jax
import jax.numpy as jnp


def info_nce(
    query: jax.Array, positive: jax.Array, negatives: jax.Array, temperature: float
) -> jax.Array:
    """Compute InfoNCE against a queue of negatives (equation 2).

    Args:
        query: float [N, D], embeddings of the views to classify.
        positive: float [N, D], the key of each query's own example.
        negatives: float [K, D], keys of other examples, shared by all queries.
        temperature: softmax temperature; 0.2 in MoCo-v2.

    Returns:
        Losses [N]: the negative log-probability of the positive among K + 1 candidates.
    """
    own = jnp.sum(query * positive, axis=-1) / temperature  # [N]
    others = jnp.matmul(query, negatives.T, precision="highest") / temperature  # [N, K]
    return jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own


def nt_xent(z1: jax.Array, z2: jax.Array, temperature: float) -> jax.Array:
    """Compute SimCLR's NT-Xent: find each view's sibling among the other 2N - 1 views.

    Args:
        z1: float [N, D], embeddings of the first views.
        z2: float [N, D], embeddings of the second views, in the same order.
        temperature: softmax temperature.

    Returns:
        Losses [N], the mean of both directions.
    """
    own = jnp.sum(z1 * z2, axis=-1) / temperature  # [N]
    itself = jnp.eye(z1.shape[0], dtype=bool)

    def direction(a: jax.Array, b: jax.Array) -> jax.Array:
        siblings = a @ b.T / temperature  # [N, N]
        same_side = jnp.where(itself, -jnp.inf, a @ a.T / temperature)
        return jax.nn.logsumexp(jnp.concatenate([siblings, same_side], axis=1), axis=1) - own

    return (direction(z1, z2) + direction(z2, z1)) / 2


def prototype_cross_entropy(
    z: jax.Array, prototypes: jax.Array, labels: jax.Array, temperature: float
) -> jax.Array:
    """Compute the softmax cross-entropy of the cluster index over cosine scores (equation 4).

    Args:
        z: float [N, D], embeddings.
        prototypes: float [K, D], centroids of unit norm.
        labels: int [N], cluster indices; -1 marks an example without a cluster.
        temperature: softmax temperature; 0.1 in DeepCluster-v2.

    Returns:
        Losses [N]; exactly 0 where the label is -1: the caller leaves those rows out of its mean.
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
    """Assign the batch softly and in equal shares to the prototypes (Sinkhorn-Knopp).

    The rule of facebookresearch/swav, main_swav.py.

    Args:
        scores: float [N, K], cosine scores of examples against prototypes.
        epsilon: weight of the entropy; 0.05 in SwAV.
        iterations: rounds of column and row normalization; 3 in SwAV.
        mask: bool [N], rows that take part; None: all.
        axis_name: mesh axis over which the rows are split. The rows of all devices then share
            the prototypes, at the cost of one reduction of [K] numbers per iteration.

    Returns:
        Codes [N, K]; each row sums to 1, a row that takes no part to 0.
    """

    def over_rows(log_codes: jax.Array) -> jax.Array:
        """Log-sum-exp over the rows of all devices, [1, K]."""
        top = jnp.max(log_codes, axis=0, keepdims=True)
        if axis_name is not None:
            top = jax.lax.pmax(top, axis_name)
        total = jnp.sum(jnp.exp(log_codes - top), axis=0, keepdims=True)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        return top + jnp.log(total)

    # In log space nothing overflows; scaling a row or column does not change the result.
    log_codes = scores / epsilon
    absent = None if mask is None else ~mask[:, None]
    for _ in range(iterations):
        if absent is not None:
            log_codes = jnp.where(absent, -jnp.inf, log_codes)
        # Each prototype gets an equal share of the batch, ...
        log_codes = log_codes - over_rows(log_codes)
        if absent is not None:
            log_codes = jnp.where(absent, 0, log_codes)
        # ... and each example gives one unit.
        log_codes = log_codes - jax.nn.logsumexp(log_codes, axis=1, keepdims=True)
    codes = jnp.exp(log_codes)
    return codes if absent is None else jnp.where(absent, 0, codes)
