"""Pooled features of the frozen backbone for a list of examples, in padded batches so that each counts exactly once."""

import concurrent.futures
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.data.decode import BadImage, decode, resize_center_crop
from hexa_jax.data.sources import Source
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import CLEAN, EVALUATION, stats_collection


@dataclasses.dataclass(frozen=True)
class EvalImages:
    """Centre crops of chosen examples of a source.

    Attributes:
        source: random-access examples.
        indices: which of them, in order.
        resize: short side in pixels.
        crop: side of the centre crop.
        unreadable: examples that turned out to be so when their pixels were wanted; black stands in for them.
    """

    source: Source
    indices: np.ndarray
    resize: int
    crop: int
    unreadable: set[int] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N] labels of the examples, -1 where an example is gone; the source must have them."""

        def label(index: int) -> int:
            try:
                return self.source[index]["label"]
            except BadImage:
                return -1

        return np.array([label(int(index)) for index in self.indices], np.int32)

    @property
    def known(self) -> np.ndarray:
        """bool [N]: which examples have a label and could be read so far; the others are left out of every accuracy."""
        return (self.labels >= 0) & ~np.isin(self.indices, list(self.unreadable))

    def image(self, index: int) -> np.ndarray:
        """uint8 [crop, crop, 3]."""
        try:
            pixels = decode(self.source[int(index)]["image"], self.source.name(int(index)))
        except BadImage as error:
            if int(index) not in self.unreadable:
                logging.warning("left out of the evaluation: %s", error)
            self.unreadable.add(int(index))
            return np.zeros((self.crop, self.crop, 3), np.uint8)
        return resize_center_crop(pixels, self.resize, self.crop)

    def batches(self, batch_size: int, threads: int = 2) -> Iterator[tuple[np.ndarray, int]]:
        """(uint8 [batch_size, crop, crop, 3], how many of them are real); the last batch is padded with zeros."""
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(self.indices), batch_size):
                images = np.stack(list(pool.map(self.image, self.indices[first : first + batch_size])))
                padding = [(0, batch_size - len(images))] + [(0, 0)] * 3
                yield np.pad(images, padding), len(images)


def make_extractor(network: Network, mesh: Mesh, dtype: Any) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """A jitted function (params, batch_stats, uint8 images [N, H, W, 3]) -> features [N, F], rows split over the mesh."""
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def features(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        name = stats_collection(CLEAN)
        variables = {"params": params, name: batch_stats[name]}
        return network.apply(variables, images.astype(dtype) / 255, EVALUATION, method=Network.features)

    return jax.jit(features, in_shardings=(whole, whole, rows), out_shardings=whole)


def extract(forward: Callable[[jax.Array], jax.Array], images: EvalImages, batch_size: int) -> np.ndarray:
    """float32 [N, F] features of the images; `forward` maps uint8 [batch_size, crop, crop, 3] to [batch_size, F]."""
    parts = [np.asarray(forward(batch), np.float32)[:count] for batch, count in images.batches(batch_size)]
    return np.concatenate(parts)


def raw_pixels(images: EvalImages, batch_size: int = 256) -> np.ndarray:
    """float32 [N, H * W * 3] pixels in [0, 1], the baseline that a network must beat."""
    parts = [batch[:count].reshape(count, -1).astype(np.float32) / 255 for batch, count in images.batches(batch_size)]
    return np.concatenate(parts)
