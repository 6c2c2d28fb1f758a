"""Near duplicates: the same picture again, resized, encoded anew, or a little brighter.

The signature of an image is its luminance on a 16 x 16 grid (area averages of the whole picture,
whatever its shape), minus the mean, as a unit vector. The product of two signatures is the
correlation of the two small pictures: 1 for the same picture, and 0.97 or more is called a near
duplicate. Features of the network play no part: a cosine that means "the same picture" differs
from network to network.

How the threshold was chosen: `python benchmarks/duplicates.py` compares photographs with edited
copies of themselves and with each other; docs/explore.md has the figures. A crop of more than
about 2 % of each side, a mirror image or a rotation is another picture to this method; neighbors
of the features find those.
"""

import cv2
import numpy as np
from jax.sharding import Mesh

from hexa_jax.evals.knn import nearest

GRID = 16
THRESHOLD = 0.97
SHOWN = 0.90  # the page lets its user go down to this
CANDIDATES = 8  # most similar images that are looked at for each image
UNIFORM = 1.0  # standard deviation, in grey levels of 255, below which a picture shows nothing


def signature(pixels: np.ndarray) -> np.ndarray:
    """float32 [256] unit vector of an image, uint8 [H, W, 3] RGB.

    Images of one even colour have no structure to compare: all of them get the same constant
    vector, which is at right angles to every other signature.
    """
    small = cv2.resize(pixels, (GRID, GRID), interpolation=cv2.INTER_AREA)
    grey = small.reshape(-1, 3).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    centred = grey - grey.mean()
    if centred.std() < UNIFORM:
        return np.full(GRID**2, 1 / GRID, np.float32)
    return centred / np.linalg.norm(centred)


def find_pairs(
    signatures: np.ndarray, threshold: float = THRESHOLD, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images whose signatures agree, in blocks on the devices.

    Each image is compared with all; its `CANDIDATES` best matches count, so that a group of many
    copies is linked but not listed pair by pair.

    Args:
        signatures: float32 [N, 256].
        threshold: smallest correlation of a pair.
        mesh: of the devices.

    Returns:
        int64 [P, 2] rows of the pairs, the lower one first, and their correlations float32 [P];
        the most similar pairs first.
    """
    count = min(CANDIDATES, len(signatures) - 1)
    if count < 1:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    own = np.arange(len(signatures))
    similarity, rows = nearest(signatures, signatures, count, own=own, mesh=mesh)
    first, place = np.nonzero(similarity >= threshold)
    pairs = np.sort(np.stack([first, rows[first, place]], axis=1), axis=1)
    pairs, chosen = np.unique(pairs, axis=0, return_index=True)
    # Rounding can put the correlation of two equal signatures a little above 1.
    correlation = np.minimum(similarity[first, place][chosen], 1)
    order = np.argsort(-correlation, kind="stable")
    return pairs[order], correlation[order]


def groups_of(pairs: np.ndarray, num_images: int) -> list[list[int]]:
    """Images that pairs link, directly or through others: groups of two or more, largest first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (num_images, num_images))
    _, component = connected_components(links, directed=False)
    order = np.argsort(component, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted((part.tolist() for part in parts if len(part) > 1), key=lambda g: (-len(g), g))
