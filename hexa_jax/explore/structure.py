"""Structure of embedded images: nearest neighbors, clusters, outliers.

Everything goes by the cosine of the features, as the kNN evaluation does. Legend: N images,
F features, K clusters, k neighbors.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hexa_jax.data.subset import spread
from hexa_jax.evals.knn import nearest
from hexa_jax.kmeans import spherical_kmeans

MAX_CLUSTERS = 100
KMEANS_ROWS = 100_000
KMEANS_ITERATIONS = 30
KMEANS_RESTARTS = 4


class Neighbors(NamedTuple):
    """The other images nearest to each image, nearest first.

    Attributes:
        rows: int32 [N, k].
        similarity: float32 [N, k] cosines.
    """

    rows: np.ndarray
    similarity: np.ndarray


class Clusters(NamedTuple):
    """Clusters, the largest first.

    Attributes:
        labels: int32 [N].
        similarity: float32 [N] cosine of each image to the centroid of its cluster.
        sizes: int64 [K].
    """

    labels: np.ndarray
    similarity: np.ndarray
    sizes: np.ndarray


def find_neighbors(values: np.ndarray, count: int, mesh: Mesh | None = None) -> Neighbors:
    """The `count` most similar other images of each image, in blocks: no [N, N] matrix exists.

    Args:
        values: float [N, F].
        count: k; N - 1 where there are fewer other images.
        mesh: of the devices among which the images are split.
    """
    count = min(count, len(values) - 1)
    if count < 1:
        return Neighbors(
            np.zeros((len(values), 0), np.int32), np.zeros((len(values), 0), np.float32)
        )
    similarity, rows = nearest(values, values, count, own=np.arange(len(values)), mesh=mesh)
    return Neighbors(rows.astype(np.int32), similarity)


def default_clusters(num_images: int) -> int:
    """K where nobody says: the square root of N / 2, at least 2 and at most `MAX_CLUSTERS`."""
    return max(1, min(num_images, MAX_CLUSTERS, max(2, round(math.sqrt(num_images / 2)))))


def find_clusters(
    values: np.ndarray, num_clusters: int | None = None, *, seed: int = 0, mesh: Mesh | None = None
) -> Clusters:
    """Cluster images by spherical k-means: the best of a few restarts, by the mean cosine.

    The centroids come from at most `KMEANS_ROWS` evenly spread images. Clusters to which no image
    belongs are dropped, so there may be fewer than asked for.

    Args:
        values: float [N, F].
        num_clusters: K; `default_clusters` where nobody says, and N where that is less.
        seed: of the first centroids.
        mesh: of the devices among which the centroids are split for the assignment.
    """
    num_clusters = min(num_clusters or default_clusters(len(values)), len(values), KMEANS_ROWS)
    sample = _unit(values[spread(len(values), KMEANS_ROWS)])
    fit = jax.jit(spherical_kmeans, static_argnums=(2, 3))
    keys = jax.random.split(jax.random.key(seed), KMEANS_RESTARTS)
    fits = [fit(key, jnp.asarray(sample), num_clusters, KMEANS_ITERATIONS) for key in keys]
    best = max(fits, key=lambda found: float(found.objective))
    similarity, rows = nearest(np.asarray(best.centroids), values, 1, mesh=mesh)
    # Number the clusters by size, so that cluster 0 is the largest.
    counts = np.bincount(rows[:, 0], minlength=num_clusters)
    order = np.argsort(-counts, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(num_clusters)
    sizes = counts[order]
    return Clusters(place[rows[:, 0]].astype(np.int32), similarity[:, 0], sizes[sizes > 0])


def outlier_scores(neighbors: Neighbors) -> np.ndarray:
    """float32 [N]: 1 minus the mean cosine to the nearest neighbors; the higher, the more apart.

    The k-nearest-neighbor distance of Ramaswamy et al., 2000, averaged over the neighbors.
    """
    if neighbors.similarity.shape[1] == 0:
        return np.zeros(len(neighbors.similarity), np.float32)
    return (1 - neighbors.similarity.mean(axis=1)).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
