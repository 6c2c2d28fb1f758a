"""Measures of a representation that need no labels, as plain functions of arrays.

* RankMe: the effective rank of the features (Garrido et al., 2023, arXiv:2210.02885).
* Alignment and uniformity of unit vectors (Wang and Isola, 2020, arXiv:2005.10242).
* Agreement of nearest neighbors between two augmented crops of each image.
* Clusters of the features: whether they are the same as before, and how even their sizes are.

Legend: N images, F feature, D embedding, K clusters.
"""

from typing import NamedTuple

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

NEIGHBORS = 10  # compared per image
IMAGES_PER_CLUSTER = 20
MAX_CLUSTERS = 50
# Keeps the logarithm finite where a singular value is 0, as in the paper.
RANK_EPSILON = 1e-7


class Health(NamedTuple):
    """What `measure` finds.

    Attributes:
        values: the measures by name, as `NAMES` lists them.
        clusters: int32 [N], of the clean features, to compare the next ones with.
    """

    values: dict[str, float]
    clusters: np.ndarray


# Whether more is better, for those measures that may choose the best checkpoint.
HIGHER_IS_BETTER = {
    "rankme": True,
    "rankme_embedding": True,
    "alignment": False,
    "uniformity": False,
    "neighbor_agreement": True,
    "cluster_stability": True,
    "cluster_evenness": True,
}


def measure(
    features: np.ndarray,
    embeddings: np.ndarray,
    view_features: np.ndarray,
    view_embeddings: np.ndarray,
    clusters_before: np.ndarray | None = None,
) -> Health:
    """Return every measure of a sample of images.

    Args:
        features: [N, F] of the images themselves, pooled outputs of the backbone.
        embeddings: [N, D] of the images themselves, outputs of the head.
        view_features: [2, N, F] of two augmented crops of each image.
        view_embeddings: [2, N, D] of the same crops.
        clusters_before: int [N] clusters that an earlier call returned for the same images;
            None: there is no `cluster_stability`.

    Raises:
        ValueError: fewer than three images, too few for neighbors and clusters.
    """
    if len(features) < 3:
        raise ValueError(f"health needs at least 3 images, not {len(features)}")
    clusters = cluster(features)
    values = {
        "rankme": rankme(features),
        "rankme_embedding": rankme(embeddings),
        "alignment": alignment(*view_embeddings),
        "uniformity": uniformity(view_embeddings[0]),
        "neighbor_agreement": neighbor_agreement(features, *view_features),
        "cluster_evenness": cluster_evenness(clusters),
    }
    if clusters_before is not None and len(clusters_before) == len(clusters):
        values["cluster_stability"] = cluster_stability(clusters_before, clusters)
    return Health(values, clusters)


def rankme(features: np.ndarray) -> float:
    """Return exp of the entropy of the normalized singular values of features [N, F].

    It is between 1 (all features lie on one line through the origin) and min(N, F). Features that
    are all zero have rank 1.
    """
    x = np.asarray(features, np.float64)
    # Eigenvalues of the smaller product take a tenth of the time of singular values.
    eigenvalues = np.linalg.eigvalsh(x @ x.T if x.shape[0] < x.shape[1] else x.T @ x)
    singular = np.sqrt(np.maximum(eigenvalues, 0))
    if not singular.any():
        return 1.0
    p = singular / singular.sum() + RANK_EPSILON
    return float(np.exp(-np.sum(p * np.log(p))))


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean squared distance of two crops of an image, from [N, D] each.

    Vectors are scaled to unit length, so it is 0 for equal crops and about 2 for unrelated ones.
    """
    return float(np.mean(np.sum((unit(first) - unit(second)) ** 2, axis=1)))


def uniformity(embeddings: np.ndarray) -> float:
    """Return log E exp(-2 |x - y|^2) over pairs of different images, from [N, D].

    Vectors are scaled to unit length. It is 0 where all are the same, and close to -4 where they
    are spread over a sphere of many dimensions.
    """
    x = unit(embeddings)
    cosines = (x @ x.T)[np.triu_indices(len(x), k=1)]
    return float(np.log(np.mean(np.exp(-2 * (2 - 2 * cosines)))))


def neighbor_agreement(
    features: np.ndarray, first: np.ndarray, second: np.ndarray, count: int = NEIGHBORS
) -> float:
    """Return the share of nearest images that two crops of an image have in common.

    Args:
        features: [N, F] of the images among which neighbors are looked for, by cosine.
        first: [N, F] of a crop of each image; the image itself is no neighbor of its crops.
        second: the same for another crop.
        count: neighbors of each crop; at most N - 2, so that there is a choice.
    """
    count = min(count, len(features) - 2)
    near_first, near_second = (nearest(features, crops, count) for crops in (first, second))
    shared = [np.intersect1d(a, b).size for a, b in zip(near_first, near_second, strict=True)]
    return float(np.mean(shared)) / count


def nearest(features: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Return int64 [N, count], the images with the highest cosine, nearest first.

    Query n is a picture of image n, which is left out. Equal cosines: the lower number comes first.
    """
    cosines = unit(queries) @ unit(features).T
    np.fill_diagonal(cosines, -np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :count]


def cluster(features: np.ndarray) -> np.ndarray:
    """Return int32 [N] clusters of features [N, F] by k-means on unit vectors.

    There is one for every IMAGES_PER_CLUSTER images, at least 2 and at most MAX_CLUSTERS. Equal
    features give equal clusters.
    """
    x = unit(features).astype(np.float32)
    wanted = min(max(len(x) // IMAGES_PER_CLUSTER, 2), MAX_CLUSTERS, len(np.unique(x, axis=0)))
    kmeans = KMeans(wanted, n_init=1, max_iter=50, tol=1e-3, random_state=0)
    return kmeans.fit_predict(x).astype(np.int32)


def cluster_stability(before: np.ndarray, after: np.ndarray) -> float:
    """Return the adjusted Rand index of two clusterings int [N] of the same images.

    It is 1 for the same groups, whatever their numbers, and 0 on average for unrelated ones.
    """
    return float(adjusted_rand_score(before, after))


def cluster_evenness(clusters: np.ndarray) -> float:
    """Return exp of the entropy of the sizes of clusters int [N], as a share of their number.

    It is 1 where all are of one size, and close to 0 where nearly all images are in one of many.
    """
    share = np.bincount(clusters) / len(clusters)
    present = share[share > 0]
    return float(np.exp(-np.sum(present * np.log(present))) / len(present))


def unit(x: np.ndarray) -> np.ndarray:
    """Return float64 rows of unit length; rows of zeros stay as they are."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
