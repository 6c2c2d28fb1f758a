"""What `hexa embed` and `hexa explore` share: their options, and opening weights and images."""

import argparse
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hexa_jax.cli.words import Mistake, parser, source_of
from hexa_jax.core.arguments import Parser
from hexa_jax.core.console import log
from hexa_jax.data.source import Source
from hexa_jax.data.sources import make_source
from hexa_jax.data.subset import Subset, spread
from hexa_jax.evals.backbone import RANDOM, Backbone, load_backbone
from hexa_jax.evals.tasks.image_size import trained_size
from hexa_jax.explore.embedding import Embedded, embed
from hexa_jax.parallel.mesh import make_mesh


def make_parser(command: str) -> Parser:
    """Return a parser with the options that both commands take."""
    words = parser(command)
    words.add_argument("weights")
    words.add_argument("images", nargs="+")
    words.add_argument("--output", type=pathlib.Path)
    words.add_argument("--clusters", type=_positive)
    words.add_argument("--neighbors", type=_positive, default=10)
    words.add_argument("--size", type=_positive)
    words.add_argument("--batch_size", type=_positive, default=64)
    words.add_argument("--threads", type=_positive, default=os.cpu_count() or 2)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--data_dir")
    return words


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def open_collection(options: Any) -> tuple[Backbone, Source, tuple[int, int]]:
    """The backbone, the images, and the size at which the network sees them."""
    # Images that cannot be read are named by warnings.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    if options.weights == RANDOM:
        raise Mistake("random weights tell nothing about images: name a workdir or a weights file")
    backbone = load_backbone(options.weights)
    drawn = {}
    if backbone.config is not None:
        # Shapes as the run drew them, columns and seconds as it read them; other sources ignore it.
        data = backbone.config.data
        drawn = {"image_size": data.shapes_size, "num_examples": data.shapes_count}
        reading = ("image_column", "label_column", "video_seconds")
        # Runs of before these keys were there have none.
        drawn |= {name: data[name] for name in reading if name in data}
    source = make_source(source_of(options.images), data_dir=options.data_dir, **drawn)
    if options.clusters and options.clusters > len(source):
        raise Mistake(f"--clusters={options.clusters} is more than the {len(source)} images")
    resize, crop = trained_size(backbone.config)
    if options.size:
        resize, crop = round(options.size * resize / crop), options.size
    log(f"{len(source)} images, seen as a centre crop of {crop} pixels (short side {resize})")
    return backbone, source, (resize, crop)


def limited(source: Source, limit: int) -> Source:
    """At most `limit` images of a source (0: all), evenly spread."""
    return Subset(source, spread(len(source), limit)) if 0 < limit < len(source) else source


def embed_collection(
    options: Any,
    mesh: Mesh,
    opened: tuple[Backbone, Source, tuple[int, int]],
    summarize: Callable[[np.ndarray], Any] | None = None,
) -> Embedded:
    """Embed what `open_collection` opened; tells how many images were left out."""
    backbone, source, size = opened
    images = embed(
        backbone,
        source,
        size,
        mesh,
        batch_size=options.batch_size,
        threads=options.threads,
        summarize=summarize,
    )
    if images.unreadable:
        log(f"{len(images.unreadable)} of {len(source)} images cannot be read; they are left out")
    return images


def class_names(images: Embedded, source: Source) -> list[str]:
    """[N] names of the images' classes, empty where there is none."""
    names = source.class_names
    return [
        "" if label < 0 else str(label) if names is None else names[label]
        for label in images.labels.tolist()
    ]


def all_devices() -> Mesh:
    """A mesh of all devices of this process."""
    return make_mesh(jax.local_devices())
