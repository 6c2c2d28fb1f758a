"""Spherical k-means: cluster unit vectors by their cosine.

Rows are visited in chunks, so that the [N, K] scores never exist at once; devices communicate once
per iteration. Shapes: N rows, D dimensions, K clusters.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# By default accelerators round the factors of a product to bfloat16 or TF32.
PRECISION = jax.lax.Precision.HIGHEST
CHUNK_SCORES = 1 << 24  # scores that exist at once, at most


class Clustering(NamedTuple):
    """Result of k-means.

    Attributes:
        centroids: float [K, D], unit norm.
        assignments: int32 [N], -1 for rows left out.
        objective: scalar, mean cosine of the rows to their centroids.
    """

    centroids: jax.Array
    assignments: jax.Array
    objective: jax.Array


def _normalize(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)


def _argmax_in_blocks(scores: jax.Array) -> jax.Array:
    """Find each row's first maximum, [rows, K] -> [rows]: first its block, then its place there.

    On a CPU, XLA's argmax takes more time than the product that makes the scores; its max takes
    hardly any.
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
    """Sum the rows of each cluster, [rows, F] and int32 [rows] -> [K, F], without label -1.

    Accelerators multiply faster than they scatter; on a CPU the product would double the time of
    an iteration.
    """

    def by_scatter(x: jax.Array, label: jax.Array) -> jax.Array:
        return (
            jnp.zeros((num_clusters, x.shape[1]), x.dtype)
            .at[label]
            .add(x, mode="drop", wrap_negative_indices=False)
        )

    return jax.lax.platform_dependent(
        x,
        label,
        cpu=by_scatter,
        default=functools.partial(_sum_by_matmul, num_clusters=num_clusters),
    )


def _chunks(x: jax.Array, num_clusters: int) -> tuple[int, int]:
    """Return the number of chunks and of rows in each; the last chunk may be padded."""
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
    """Run Lloyd's algorithm on the unit sphere, as DeepCluster-v2 does.

    The rule of facebookresearch/swav, main_deepclusterv2.py: `iterations` updates of the
    centroids, then one last assignment. A cluster without rows keeps its centroid.

    Args:
        key: typed PRNG key, used only where `init` is None.
        x: float [N, D], unit vectors.
        num_clusters: K.
        iterations: number of centroid updates.
        mask: bool [N], False for rows to leave out; None: all take part.
        init: float [K, D], first centroids; None: K distinct rows at random.
        axis_name: mesh axis over which the rows are split, inside shard_map.

    Returns:
        The clustering; a higher objective is better.

    Raises:
        ValueError: more clusters than rows, or `init` missing inside shard_map.
    """
    num_rows, dim = x.shape
    if axis_name is not None and init is None:
        raise ValueError(
            "rows are split over devices here: pass init, so that every device starts from the "
            "same centroids"
        )
    if axis_name is None and num_clusters > num_rows:
        raise ValueError(
            f"{num_clusters} clusters need at least as many rows, there are {num_rows}"
        )
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
            # A column of ones lets the same sum count the rows: counting apart doubles the time.
            counted = jnp.concatenate([chunk[0], jnp.ones((rows, 1), x.dtype)], axis=1)
            return totals + _sum_by_cluster(counted, label, num_clusters), None

        totals = jax.lax.scan(
            add, jnp.zeros((num_clusters, dim + 1), x.dtype), (x_chunks, mask_chunks)
        )[0]
        totals = reduce(totals)
        return jnp.where(totals[:, dim:] > 0, _normalize(totals[:, :dim]), centroids)

    centroids = jax.lax.fori_loop(0, iterations, update, _normalize(init.astype(x.dtype)))
    labels, cosine = jax.lax.map(lambda chunk: assign(centroids, *chunk), (x_chunks, mask_chunks))
    objective = reduce(jnp.sum(cosine)) / jnp.maximum(reduce(jnp.sum(mask)), 1)
    return Clustering(centroids, labels.reshape(-1)[:num_rows], objective)


def distances_by_cluster(
    x: jax.Array, centroids: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum the Euclidean distances of each cluster's members to its centroid, and count them.

    Args:
        x: float [N, D].
        centroids: float [K, D].
        labels: int32 [N], the cluster of each row; -1 for rows to leave out.
        axis_name: mesh axis over which the rows are split, inside shard_map.

    Returns:
        Distances [K] and counts [K], both of x's dtype.
    """
    num_clusters, dim = centroids.shape
    count, rows = _chunks(x, num_clusters)
    padding = count * rows - x.shape[0]
    x_chunks = jnp.pad(x, ((0, padding), (0, 0))).reshape(count, rows, dim)
    label_chunks = jnp.pad(labels, (0, padding), constant_values=-1).reshape(count, rows)

    def add(totals: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, label = chunk
        # Not from the cosine: near a centroid, 2 - 2 cos has no digits left.
        distance = jnp.linalg.norm(row - centroids[jnp.maximum(label, 0)], axis=1)
        counted = jnp.stack([distance, jnp.ones_like(distance)], axis=1)
        return totals + _sum_by_cluster(counted, label, num_clusters), None

    totals = jax.lax.scan(add, jnp.zeros((num_clusters, 2), x.dtype), (x_chunks, label_chunks))[0]
    totals = jax.lax.psum(totals, axis_name) if axis_name else totals
    return totals[:, 0], totals[:, 1]
