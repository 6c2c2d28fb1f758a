"""Two-dimensional maps of embedded images: PCA always, and t-SNE or UMAP, which show groups."""

from typing import Any

import numpy as np

from hexa_jax.core.errors import ConfigError

METHODS = ("tsne", "umap", "pca")
TITLES = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}
COMPONENTS = 50  # principal components that t-SNE and UMAP start from
SMALLEST = 8  # with fewer images, only PCA makes sense
TSNE_ITERATIONS = 500


def import_umap() -> Any:
    """The class UMAP of umap-learn.

    Raises:
        ConfigError: it is missing, or cannot be imported.
    """
    try:
        from umap import UMAP
    # umap also imports torch and TensorFlow where it finds them, and fails in many ways with them.
    except Exception as error:
        reason = (
            "" if isinstance(error, ModuleNotFoundError) else f" ({type(error).__name__}: {error})"
        )
        raise ConfigError(
            f"--map=umap needs umap-learn: pip install umap-learn, or use --map=tsne{reason}"
        ) from None
    return UMAP


def make_maps(values: np.ndarray, method: str = "tsne", seed: int = 0) -> dict[str, np.ndarray]:
    """Maps of the images, the wanted one first.

    Features count by their direction: they are normalized first, as for the neighbors.

    Args:
        values: float [N, F].
        method: one of METHODS.
        seed: of the random numbers of t-SNE and UMAP.

    Returns:
        {title: float32 [N, 2] in [0, 1]}; the larger extent of a map fills the interval.

    Raises:
        ConfigError: see `import_umap`.
    """
    from sklearn.decomposition import PCA

    unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    if len(unit) == 1:
        return {TITLES["pca"]: np.full((1, 2), 0.5, np.float32)}
    components = min(COMPONENTS, *unit.shape)
    reduced = PCA(components, random_state=seed).fit_transform(unit)
    maps = {}
    if method != "pca" and len(unit) >= SMALLEST:
        maps[TITLES[method]] = _tsne(reduced, seed) if method == "tsne" else _umap(reduced, seed)
    # Features of one number have one component.
    maps[TITLES["pca"]] = np.pad(reduced, ((0, 0), (0, 2)))[:, :2]
    return {title: _fitted(points) for title, points in maps.items()}


def _tsne(reduced: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(reduced) - 1) / 3)
    return TSNE(
        perplexity=perplexity,
        init="pca",
        learning_rate="auto",
        max_iter=TSNE_ITERATIONS,
        n_jobs=-1,
        random_state=seed,
    ).fit_transform(reduced)


def _umap(reduced: np.ndarray, seed: int) -> np.ndarray:
    # With a seed UMAP runs on one thread anyway; saying so spares its warning.
    model = import_umap()(n_neighbors=min(15, len(reduced) - 1), random_state=seed, n_jobs=1)
    return model.fit_transform(reduced)


def _fitted(points: np.ndarray) -> np.ndarray:
    """Moved and scaled into the unit square, shape kept."""
    points = np.nan_to_num(np.asarray(points, np.float64))
    low, high = points.min(axis=0), points.max(axis=0)
    extent = max(float((high - low).max()), 1e-12)
    return (0.5 + (points - (low + high) / 2) / extent).astype(np.float32)
