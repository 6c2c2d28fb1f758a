"""Spherical k-means: cluster unit vectors by cosine, in chunks, with one reduction across devices per iteration.

Legend: N rows, D embedding, K clusters.
"""

import functools
import math
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


def _argmax_in_blocks(scores: jax.Array) -> jax.Array:
    """Index of each row's first maximum, [rows, K] -> [rows]: the block that holds it, then its place in the block.

    On a CPU, XLA's argmax takes more time than the product that makes the scores, and its max hardly any.
    """
    num = scores.shape[1]
    size = max(size for size in range(1, math.isqrt(num) + 1) if num % size == 0)
    blocks = scores.reshape(-1, num // size, size)
    block = jnp.argmax(jnp.max(blocks, axis=2), axis=1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * size + jnp.argmax(inside, axis=1)


def _argmax(scores: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        scores, cpu=_argmax_in_blocks, default=lambda scores: jnp.argmax(scores, axis=1)
    ).astype(jnp.int32)


def _sum_by_matmul(x: jax.Array, label: jax.Array, num_clusters: int) -> jax.Array:
    one_hot = jax.nn.one_hot(label, num_clusters, dtype=x.dtype)  # label -1 gives a row of zeros
    return jnp.matmul(one_hot.T, x, precision=PRECISION)


def _sum_by_cluster(x: jax.Array, label: jax.Array, num_clusters: int) -> jax.Array:
    """Sums of the rows of each cluster, [rows, F] and int32 [rows] -> [K, F]; rows with label -1 are left out.

    Accelerators multiply faster than they scatter; on a CPU the product would double the time of an iteration.
    """

    def by_scatter(x: jax.Array, label: jax.Array) -> jax.Array:
        return jnp.zeros((num_clusters, x.shape[1]), x.dtype).at[label].add(x, mode="drop", wrap_negative_indices=False)

    return jax.lax.platform_dependent(
        x, label, cpu=by_scatter, default=functools.partial(_sum_by_matmul, num_clusters=num_clusters)
    )


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
        label = jnp.where(mask, _argmax(scores), -1)
        return label, jnp.sum(jnp.where(mask, jnp.max(scores, axis=1), 0))

    def update(_: int, centroids: jax.Array) -> jax.Array:
        def add(totals: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            label, _ = assign(centroids, *chunk)
            # The column of ones makes the same sum count the rows: counting separately doubles the time.
            counted = jnp.concatenate([chunk[0], jnp.ones((rows, 1), x.dtype)], axis=1)
            return totals + _sum_by_cluster(counted, label, num_clusters), None

        totals = jax.lax.scan(add, jnp.zeros((num_clusters, dim + 1), x.dtype), (x_chunks, mask_chunks))[0]
        totals = reduce(totals)
        return jnp.where(totals[:, dim:] > 0, _normalise(totals[:, :dim]), centroids)

    centroids = jax.lax.fori_loop(0, iterations, update, _normalise(init.astype(x.dtype)))
    labels, cosine = jax.lax.map(lambda chunk: assign(centroids, *chunk), (x_chunks, mask_chunks))
    objective = reduce(jnp.sum(cosine)) / jnp.maximum(reduce(jnp.sum(mask)), 1)
    return Clustering(centroids, labels.reshape(-1)[:num_rows], objective)


def distances_by_cluster(
    x: jax.Array, centroids: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of Euclidean distances of each cluster's members to its centroid, and their number.

    Args:
        x: [N, D] rows.
        centroids: [K, D].
        labels: int32 [N], the cluster of each row; -1 for rows to leave out.
        axis_name: mesh axis over which the rows are split when called inside shard_map; sums are reduced over it.

    Returns:
        (distances [K], counts [K]), both of x's type.
    """
    num_clusters, dim = centroids.shape
    count, rows = _chunks(x, num_clusters)
    padding = count * rows - x.shape[0]
    x_chunks = jnp.pad(x, ((0, padding), (0, 0))).reshape(count, rows, dim)
    label_chunks = jnp.pad(labels, (0, padding), constant_values=-1).reshape(count, rows)

    def add(totals: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, label = chunk
        # From the difference, not from the cosine: near a centroid 2 - 2 cos has no digits left.
        distance = jnp.linalg.norm(row - centroids[jnp.maximum(label, 0)], axis=1)
        counted = jnp.stack([distance, jnp.ones_like(distance)], axis=1)
        return totals + _sum_by_cluster(counted, label, num_clusters), None

    totals = jax.lax.scan(add, jnp.zeros((num_clusters, 2), x.dtype), (x_chunks, label_chunks))[0]
    totals = jax.lax.psum(totals, axis_name) if axis_name else totals
    return totals[:, 0], totals[:, 1]
