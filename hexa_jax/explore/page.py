"""One self-contained HTML file that shows a collection, thumbnails inside."""

import importlib.resources
import json
import os
from typing import Any

import numpy as np

from hexa_jax.explore.duplicates import SHOWN, THRESHOLD
from hexa_jax.explore.embedding import Embedded
from hexa_jax.explore.structure import Clusters, Neighbors, outlier_scores

PRECISION = 10_000  # coordinates and similarities are whole numbers of these
MAX_COLOURED_FOLDERS = 60


def page_data(
    images: Embedded,
    *,
    title: str,
    weights: str,
    total: int,
    is_folder: bool,
    labels: list[str],
    maps: dict[str, np.ndarray],
    clusters: Clusters,
    neighbors: Neighbors,
    pairs: np.ndarray,
    correlation: np.ndarray,
    thumbnails: tuple[list[str], int, int],
) -> dict[str, Any]:
    """What the page knows, in plain values. Legend: N images, k neighbors, P pairs.

    Args:
        images: N embedded images.
        title: of the page.
        weights: how the network is called.
        total: images of the collection, of which `images` may be a sample.
        is_folder: names are paths of files, which the page then tries to show in full size.
        labels: [N] class names, empty where there is none.
        maps: from `make_maps`.
        clusters: of the images.
        neighbors: of the images.
        pairs: int [P, 2] near duplicates, from a threshold of `SHOWN` on.
        correlation: float [P] of the pairs.
        thumbnails: data URIs of the atlases, thumbnails in a row, and their side in pixels.
    """
    root, names = _shortened(images.names) if is_folder else ("", images.names)
    atlases, columns, side = thumbnails
    classes = _category(labels)
    folders = _category([name.rpartition("/")[0] for name in names] if is_folder else [])
    if classes and folders and classes["of"] == folders["of"]:
        folders = None  # the folders are the classes
    return {
        "title": title,
        "weights": weights,
        "total": total,
        "root": root,
        "names": names,
        "labels": classes,
        "folders": folders,
        "maps": [
            {"title": name, "x": _whole(points[:, 0]), "y": _whole(points[:, 1])}
            for name, points in maps.items()
        ],
        "precision": PRECISION,
        "clusters": clusters.labels.tolist(),
        "clusterSimilarity": _whole(clusters.similarity),
        "neighbors": neighbors.rows.tolist(),
        "similarity": _whole(neighbors.similarity),
        "outlier": _whole(outlier_scores(neighbors)),
        "pairs": pairs.tolist(),
        "correlation": _whole(correlation),
        "threshold": THRESHOLD,
        "lowestThreshold": SHOWN,
        "unreadable": [[error.name, error.reason] for error in images.unreadable],
        "side": side,
        "columns": columns,
        "atlases": atlases,
    }


def render_page(data: dict[str, Any]) -> str:
    """The page; `data` is from `page_data`."""
    assets = importlib.resources.files("hexa_jax.explore") / "assets"
    page = (assets / "page.html").read_text(encoding="utf-8")
    parts = {name: (assets / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    # Names of files are text of strangers: without "<" none of them can end the script element.
    # Characters beyond ASCII are escaped, so that names which are not UTF-8 pass, too.
    parts["data"] = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    before, *pieces = page.split("<!--hexa:")
    filled = [before]
    for piece in pieces:
        name, _, rest = piece.partition("-->")
        filled += [parts[name], rest]
    return "".join(filled)


def _whole(values: np.ndarray) -> list:
    return np.round(np.asarray(values, np.float64) * PRECISION).astype(int).tolist()


def _shortened(paths: list[str]) -> tuple[str, list[str]]:
    """The folder that all files share, and their paths below it with forward slashes."""
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return root, [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]


def _category(values: list[str]) -> dict[str, list] | None:
    """Distinct names and the number of each image's; None where they tell nothing apart."""
    names, rows = np.unique(np.array(values, dtype=object), return_inverse=True)
    if not 2 <= len(names) <= MAX_COLOURED_FOLDERS:
        return None
    return {"names": names.tolist(), "of": rows.tolist()}
