"""Write one page to look at a collection of images.

Map, neighbors, near duplicates, outliers, clusters.

hexa explore W IMAGES... [--output=page.html]

W             workdir of a pre-training run, or a weights file
IMAGES        folders, or one source that training takes, such as arrays:FILE.npz or tfds:NAME:SPLIT
--output      the page; page.html by default
--map         tsne (default), umap (needs umap-learn) or pca; pca is there in any case
--limit       at most so many images, evenly spread over the collection; 20000 by default, 0: all
--neighbors   nearest neighbors of each image; 12 by default
--clusters    number of clusters; by default the square root of half the images, at most 100
--title       of the page; by default the name of the images
--size        side in pixels of what the network sees; by default that of its training
--batch_size  images of a forward pass; 64 by default
--threads     that decode images; by default one for each CPU
--seed        of the clustering and the map; 0 by default
--data_dir    where tfds data sets were prepared

The page is one file without any address: open it in a browser. It holds thumbnails and the paths
of the images; where the files are still at their paths, it shows them in full size.
"""

import argparse
import functools
import os
import pathlib
import sys

import numpy as np

from hexa_jax.cli.collection import (
    all_devices,
    class_names,
    embed_collection,
    limited,
    make_parser,
    open_collection,
)
from hexa_jax.cli.guard import guarded
from hexa_jax.cli.words import Mistake
from hexa_jax.core.console import log
from hexa_jax.explore.duplicates import SHOWN, THRESHOLD, find_pairs, signature
from hexa_jax.explore.maps import METHODS, import_umap, make_maps
from hexa_jax.explore.page import page_data, render_page
from hexa_jax.explore.structure import find_clusters, find_neighbors
from hexa_jax.explore.thumbnails import make_atlases, make_thumbnail, thumbnail_side


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    return guarded("explore", lambda: _explore(_options(argv)))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("explore")
    parser.add_argument("--map", choices=METHODS, default="tsne")
    parser.add_argument("--limit", type=int, default=20_000)
    parser.add_argument("--title")
    parser.set_defaults(output=pathlib.Path("page.html"), neighbors=12)
    options = parser.parse_args(argv)
    if options.output.suffix not in (".html", ".htm"):
        raise Mistake(f"--output={options.output} must end in .html")
    if not options.output.parent.is_dir():
        raise Mistake(f"--output={options.output}: there is no folder {options.output.parent}")
    if options.limit < 0:
        raise Mistake(f"--limit={options.limit} must be a number of images, or 0: all")
    if options.map == "umap":
        import_umap()
    return options


def _summary(pixels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnail and signature of an image."""
    return make_thumbnail(pixels, side), signature(pixels)


def _last_part(path: str) -> str:
    return os.path.basename(os.path.normpath(path))


def _explore(options: argparse.Namespace) -> int:
    mesh = all_devices()
    backbone, whole, size = open_collection(options)
    source = limited(whole, options.limit)
    if len(source) < len(whole):
        log(f"the page shows {len(source)} of {len(whole)} images, evenly spread; see --limit")
    side = thumbnail_side(len(source))
    summarize = functools.partial(_summary, side=side)
    images = embed_collection(options, mesh, (backbone, source, size), summarize)
    neighbors = find_neighbors(images.values, options.neighbors, mesh)
    clusters = find_clusters(images.values, options.clusters, seed=options.seed, mesh=mesh)
    pairs, correlation = find_pairs(np.stack([s for _, s in images.summaries]), SHOWN, mesh)
    log(f"map of {len(images.names)} images by {options.map}")
    data = page_data(
        images,
        title=options.title or ", ".join(map(_last_part, options.images)),
        weights=_last_part(options.weights),
        total=len(whole),
        is_folder=os.path.isfile(images.names[0]),
        labels=class_names(images, source),
        maps=make_maps(images.values, options.map, options.seed),
        clusters=clusters,
        neighbors=neighbors,
        pairs=pairs,
        correlation=correlation,
        thumbnails=(*make_atlases([thumbnail for thumbnail, _ in images.summaries]), side),
    )
    temporary = options.output.with_name(f".{options.output.name}.unfinished")
    try:
        temporary.write_text(render_page(data), encoding="utf-8")
        os.replace(temporary, options.output)
    finally:
        temporary.unlink(missing_ok=True)
    found = f"{len(clusters.sizes)} clusters, {int(np.sum(correlation >= THRESHOLD))} near-duplicate pairs"
    megabytes = options.output.stat().st_size / 1e6
    log(f"{len(images.names)} images, {found}: {options.output} ({megabytes:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
