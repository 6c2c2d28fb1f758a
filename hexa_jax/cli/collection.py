"""What `hexa embed` and `hexa explore` share: opening weights and images, and one line per mistake."""

import argparse
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hexa_jax.checkpoint.manifest import CheckpointError
from hexa_jax.core.arguments import Parser
from hexa_jax.core.console import log, with_aliases
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import DataError, Source
from hexa_jax.data.sources import make_source
from hexa_jax.data.subset import Subset, spread
from hexa_jax.evals.backbone import RANDOM, Backbone, load_backbone
from hexa_jax.evals.tasks.image_size import trained_size
from hexa_jax.explore.embedding import Embedded, embed
from hexa_jax.models.weights import WeightsError
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.storage.gcs import RemoteError
from hexa_jax.training.memory import is_out_of_memory

USER_ERRORS = (ConfigError, DataError, CheckpointError, WeightsError, RemoteError)


def make_parser(command: str) -> Parser:
    """The options that both commands take."""
    parser = Parser(f"hexa_jax.cli.{command}", DataError)
    parser.add_argument("weights")
    parser.add_argument("images")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--clusters", type=_positive)
    parser.add_argument("--neighbors", type=_positive, default=10)
    parser.add_argument("--size", type=_positive)
    parser.add_argument("--batch_size", type=_positive, default=64)
    parser.add_argument("--threads", type=_positive, default=os.cpu_count() or 2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def source_of(images: str) -> str:
    """The source string of an IMAGES argument: a path is a folder, or a file whose ending tells the kind."""
    if (
        re.match(r"[a-z_]+:", images)
        or os.path.isfile(os.path.expanduser(images))
        or (images == "shapes" and not os.path.isdir(images))
    ):
        return images
    return f"folder:{images}"


def open_collection(options: Any) -> tuple[Backbone, Source, tuple[int, int]]:
    """The backbone, the images, and the size at which the network sees them."""
    if options.weights == RANDOM:
        raise DataError("random weights tell nothing about images: name a workdir or a weights file")
    backbone = load_backbone(options.weights)
    drawn = {}
    if backbone.config is not None:
        # Shapes as the run drew them, columns and seconds as it read them; other sources ignore it.
        data = backbone.config.data
        drawn = {"image_size": data.shapes_size, "num_examples": data.shapes_count}
        drawn |= {name: data[name] for name in ("image_column", "label_column", "video_seconds")}
    source = make_source(source_of(options.images), data_dir=options.data_dir, **drawn)
    if options.clusters and options.clusters > len(source):
        raise DataError(f"--clusters={options.clusters} is more than the {len(source)} images")
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
    return ["" if label < 0 else str(label) if names is None else names[label] for label in images.labels.tolist()]


def all_devices() -> Mesh:
    """A mesh of all devices of this process."""
    return make_mesh(jax.local_devices())


def guarded(command: str, work: Callable[[], None]) -> int:
    """Run the work of a command; the exit code, and one line for whatever went wrong."""

    def stop(message: object, code: int) -> int:
        print(f"hexa {command}: {with_aliases(str(message))}", file=sys.stderr, flush=True)
        return code

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    try:
        work()
    except USER_ERRORS as error:
        return stop(error, 2)
    except OSError as error:
        return stop(f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return stop("out of memory: a smaller --batch_size or --size needs less", 1)
    except KeyboardInterrupt:
        return stop("interrupted; nothing was written", 130)
    return 0
