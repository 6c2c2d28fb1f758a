"""Embed a collection: one feature vector per readable image, read as a stream."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.core.console import StepTimer, log
from hexa_jax.data.decode import BadImage
from hexa_jax.data.source import DataError, Source
from hexa_jax.evals.backbone import Backbone
from hexa_jax.explore.images import ImageReader
from hexa_jax.models.weights import WeightsError

PROGRESS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The readable images of a source, in its order. N images, F features.

    Attributes:
        indices: int64 [N], of the images in the source.
        names: [N] paths, or what the source calls its examples.
        labels: int32 [N], -1 where there is none.
        values: float32 [N, F] pooled features, not normalized.
        summaries: [N] what `summarize` returned for each; empty without it.
        unreadable: the images that were left out.
    """

    indices: np.ndarray
    names: list[str]
    labels: np.ndarray
    values: np.ndarray
    summaries: list[Any]
    unreadable: list[BadImage]


def embed(
    backbone: Backbone,
    source: Source,
    size: tuple[int, int],
    mesh: Mesh,
    *,
    batch_size: int = 64,
    threads: int = 2,
    summarize: Callable[[np.ndarray], Any] | None = None,
) -> Embedded:
    """Compute the pooled feature of every readable image.

    Only the features, N x F x 4 bytes, and the summaries stay in memory.

    Args:
        backbone: a frozen network.
        source: random-access examples.
        size: short side and centre crop in pixels.
        mesh: of the devices that share each batch.
        batch_size: images of a forward pass; rounded up to a multiple of the devices.
        threads: that decode images.
        summarize: see `ImageReader`.

    Raises:
        DataError: no image can be read.
        WeightsError: a feature is not finite.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    forward = jax.jit(backbone.features, in_shardings=(whole, rows), out_shardings=whole)
    variables = jax.device_put(backbone.variables, whole)
    resize, crop = size
    reader = ImageReader(
        source, resize, crop, summarize=summarize, threads=threads, ahead=2 * batch_size
    )
    # Filled from the start; pages of images that turn out to be unreadable are never touched.
    values = np.empty((len(source), backbone.feature_dim), np.float32)
    indices = np.empty(len(source), np.int64)
    labels = np.empty(len(source), np.int32)
    summaries: list[Any] = []
    done, clock, said = 0, StepTimer(1, len(source)), time.monotonic()
    images = iter(reader)
    while batch := list(itertools.islice(images, batch_size)):
        pixels = np.zeros((batch_size, crop, crop, 3), np.uint8)
        for row, image in enumerate(batch):
            pixels[row] = image.crop
        part = slice(done, done + len(batch))
        indices[part] = [image.index for image in batch]
        labels[part] = [image.label for image in batch]
        if summarize:
            summaries += [image.summary for image in batch]
        values[part] = np.asarray(forward(variables, pixels), np.float32)[: len(batch)]
        done += len(batch)
        if not np.isfinite(values[part]).all():
            raise WeightsError(
                "the weights give features that are not finite: did the run diverge?"
            )
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            speed, left = clock.read(done)
            log(f"embedding: {done} of {len(source)} images  {speed:.0f} images/s  ETA {left}")
    if not done:
        last = reader.unreadable[-1]
        raise DataError(f"none of {len(source)} images can be read; the last is {last}")
    names = [source.name(int(index)) for index in indices[:done]]
    return Embedded(
        indices[:done], names, labels[:done], values[:done], summaries, reader.unreadable
    )
