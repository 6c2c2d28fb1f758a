"""Spherical k-means: cluster unit vectors by cosine, in chunks, with one reduction across devices per iteration.

Legend: N rows, D embedding, K clusters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PRECISION = jax.lax.Precision.HIGHEST  # by default accelerators round the factors to bfloat16 or TF32
CHUNK_SCORES = 1 << 24  # at most this many of the N x K scores exist at once


class Clustering(NamedTuple):
    """What k-means returns: centroids [K, D], assignments [N] int32, objective (scalar, mean cosine)."""

    centroids: jax.Array
    assignments: jax.Array
    objective: jax.Array


def _normalise(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)


def _chunks(x: jax.Array, num_clusters: int) -> tuple[int, int]:
    """How many chunks, and rows in each; the last one may be padded."""
    rows = max(1, min(x.shape[0], CHUNK_SCORES // num_clusters))
    count = -(-x.shape[0] // rows)
    return count, -(-x.shape[0] // count)


def spherical_kmeans(
    key: jax.Array,
    x: jax.Array,
    num_clusters: int,
    iterations: int,
    *,
    mask: jax.Array | None = None,
    init: jax.Array | None = None,
    axis_name: str | None = None,
) -> Clustering:
    """Lloyd's algorithm on the unit sphere, as DeepCluster-v2 runs it (facebookresearch/swav main_deepclusterv2.py).

    `iterations` updates of the centroids and one last assignment. A cluster that gets no row keeps its centroid.

    Args:
        key: typed key; read only when `init` is None.
        x: [N, D] unit vectors, float.
        num_clusters: K.
        iterations: number of centroid updates.
        mask: bool [N], False for rows to leave out; their assignment is -1.
        init: [K, D] first centroids; None picks K distinct unmasked rows at random.
        axis_name: mesh axis over which the rows are split when called inside shard_map; sums are reduced over it.

    Returns:
        Clustering; the objective is the mean cosine of the unmasked rows to their centroids (higher is better).

    Raises:
        ValueError: more clusters than rows, or `init` missing inside shard_map.
    """
    num_rows, dim = x.shape
    if axis_name is not None and init is None:
        raise ValueError(
            "rows are split over devices here: pass init, so that every device starts from the same centroids"
        )
    if axis_name is None and num_clusters > num_rows:
        raise ValueError(f"{num_clusters} clusters need at least as many rows, there are {num_rows}")
    mask = jnp.ones(num_rows, bool) if mask is None else mask
    if init is None:
        priority = jnp.where(mask, jax.random.uniform(key, (num_rows,)), -1)
        init = x[jax.lax.top_k(priority, num_clusters)[1]]
    count, rows = _chunks(x, num_clusters)
    padding = count * rows - num_rows
    x_chunks = jnp.pad(x, ((0, padding), (0, 0))).reshape(count, rows, dim)
    mask_chunks = jnp.pad(mask, (0, padding)).reshape(count, rows)

    def reduce(value: jax.Array) -> jax.Array:
        return jax.lax.psum(value, axis_name) if axis_name else value

    def assign(centroids: jax.Array, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.matmul(x, centroids.T, precision=PRECISION)  # [rows, K]
        label = jnp.where(mask, jnp.argmax(scores, axis=1), -1).astype(jnp.int32)
        return label, jnp.sum(jnp.where(mask, jnp.max(scores, axis=1), 0))

    def update(_: int, centroids: jax.Array) -> jax.Array:
        def add(totals: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            label, _ = assign(centroids, *chunk)
            # The column of ones makes the same product count the rows: counting separately doubles the time.
            ones = jnp.ones((rows, 1), x.dtype)
            one_hot = jax.nn.one_hot(label, num_clusters, dtype=x.dtype)  # label -1 gives a row of zeros
            sums = jnp.matmul(one_hot.T, jnp.concatenate([chunk[0], ones], axis=1), precision=PRECISION)
            return totals + sums, None

        totals = jax.lax.scan(add, jnp.zeros((num_clusters, dim + 1), x.dtype), (x_chunks, mask_chunks))[0]
        totals = reduce(totals)
        return jnp.where(totals[:, dim:] > 0, _normalise(totals[:, :dim]), centroids)

    centroids = jax.lax.fori_loop(0, iterations, update, _normalise(init.astype(x.dtype)))
    labels, cosine = jax.lax.map(lambda chunk: assign(centroids, *chunk), (x_chunks, mask_chunks))
    objective = reduce(jnp.sum(cosine)) / jnp.maximum(reduce(jnp.sum(mask)), 1)
    return Clustering(centroids, labels.reshape(-1)[:num_rows], objective)
