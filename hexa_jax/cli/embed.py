"""Write one row per image: path, embedding, cluster and nearest neighbors.

hexa embed W IMAGES... --output=FILE

W             workdir of a pre-training run, or a weights file
IMAGES        folders, or one source that training takes, such as arrays:FILE.npz or tfds:NAME:SPLIT
--output      FILE.parquet (needs pyarrow), FILE.csv or FILE.npz
--neighbors   nearest neighbors of each image; 10 by default
--clusters    number of clusters; by default the square root of half the images, at most 100
--size        side in pixels of what the network sees; by default that of its training
--batch_size  images of a forward pass; 64 by default
--threads     that decode images; by default one for each CPU
--seed        of the clustering; 0 by default
--data_dir    where tfds data sets were prepared

Images that cannot be read are named and left out. Neighbors are rows of the table, counted from 0.
Pixels are read as they are needed; the features (4 bytes each) are held in memory.
"""

import sys

from hexa_jax.cli.collection import (
    all_devices,
    class_names,
    embed_collection,
    make_parser,
    open_collection,
)
from hexa_jax.cli.guard import guarded
from hexa_jax.cli.words import Mistake
from hexa_jax.core.console import log
from hexa_jax.explore.structure import find_clusters, find_neighbors
from hexa_jax.explore.tables import check_table, write_table


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0

    def work() -> int:
        options = make_parser("embed").parse_args(argv)
        if options.output is None:
            raise Mistake("--output is missing: a file that ends in .parquet, .csv or .npz")
        check_table(options.output)
        mesh = all_devices()
        opened = open_collection(options)
        images = embed_collection(options, mesh, opened)
        neighbors = find_neighbors(images.values, options.neighbors, mesh)
        clusters = find_clusters(images.values, options.clusters, seed=options.seed, mesh=mesh)
        labels = class_names(images, opened[1])
        write_table(options.output, images, labels, clusters, neighbors)
        shape = f"{len(images.names)} x {images.values.shape[1]} features"
        log(f"{shape}, {len(clusters.sizes)} clusters: {options.output}")
        return 0

    return guarded("embed", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
