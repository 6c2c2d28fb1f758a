"""Pooled features of a frozen backbone, each example counted exactly once."""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.data.decode import BadImage, decode, resize, resize_center_crop, resize_short_side
from hexa_jax.data.source import Source
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import CLEAN, EVALUATION, stats_collection
from hexa_jax.parallel import processes

_NOT_READ = -2  # in place of a label


@dataclasses.dataclass(frozen=True)
class EvalImages:
    """Chosen examples of a source as images of one size.

    Attributes:
        source: random-access examples.
        indices: which of them, in order.
        resize: short side in pixels.
        crop: side of the result in pixels: its centre, or all of it where `squash`.
        unreadable: examples that turned out to be so when their pixels were wanted; black stands in
            for them.
        quiet: leave it to others to warn of unreadable examples.
    """

    source: Source
    indices: np.ndarray
    resize: int
    crop: int
    squash: bool = False
    unreadable: set[int] = dataclasses.field(default_factory=set)
    quiet: bool = False

    def __post_init__(self):
        object.__setattr__(self, "_labels", np.full(len(self.indices), _NOT_READ, np.int32))

    @property
    def labels(self) -> np.ndarray:
        """int32 [N] labels of the examples, -1 where there is none or the example is gone."""
        return self.facts()[0]

    @property
    def known(self) -> np.ndarray:
        """Mask bool [N] of the examples that have a label and could be read so far.

        Others are left out of every accuracy.
        """
        labels, readable = self.facts()
        return (labels >= 0) & readable

    def facts(self, positions: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(labels int32, whether nothing was wrong so far) of some positions.

        Those whose pixels were wanted are known from then on; the others are read now.
        """
        labels: np.ndarray = self._labels  # type: ignore[attr-defined]
        for position in np.arange(len(labels))[positions][labels[positions] == _NOT_READ]:
            self._example(int(position))
        return labels[positions], ~np.isin(self.indices[positions], list(self.unreadable))

    def _example(self, position: int) -> dict[str, Any] | None:
        """The example at a position, whose label is kept; None where it is gone."""
        index = int(self.indices[position])
        try:
            example = self.source[index]
        except BadImage as error:
            self._miss(index, error)
            example = None
        self._labels[position] = -1 if example is None else example.get("label", -1)  # type: ignore[attr-defined]
        return example

    def _miss(self, index: int, error: BadImage) -> None:
        if index not in self.unreadable and not self.quiet:
            logging.warning("left out of the evaluation: %s", error)
        self.unreadable.add(index)

    def image(self, position: int) -> np.ndarray:
        """uint8 [crop, crop, 3] of `indices[position]`; black where it cannot be read."""
        index, example = int(self.indices[position]), self._example(position)
        try:
            pixels = None if example is None else decode(example["image"], self.source.name(index))
        except BadImage as error:
            self._miss(index, error)
            pixels = None
        if pixels is None:
            return np.zeros((self.crop, self.crop, 3), np.uint8)
        if not self.squash:
            return resize_center_crop(pixels, self.resize, self.crop)
        return resize(resize_short_side(pixels, self.resize), self.crop, self.crop)

    def batches(
        self,
        batch_size: int,
        threads: int = 2,
        start: int = 0,
        columns: Sequence[int] | None = None,
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yield batches from position `start` on, and how many of their images are real.

        Args:
            batch_size: images of a batch.
            threads: that decode.
            start: position of the first image.
            columns: rows of each batch to make; all by default.

        Yields:
            uint8 [columns, crop, crop, 3], and the number of real images in the whole batch.
        """
        columns = range(batch_size) if columns is None else columns
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for first in range(start, len(self.indices), batch_size):
                positions = [
                    first + column for column in columns if first + column < len(self.indices)
                ]
                images = np.zeros((len(columns), self.crop, self.crop, 3), np.uint8)
                for row, image in enumerate(pool.map(self.image, positions)):
                    images[row] = image
                yield images, min(batch_size, len(self.indices) - first)

    def device_batches(
        self, mesh: Mesh, batch_size: int, threads: int = 2, start: int = 0
    ) -> Iterator[tuple[jax.Array | np.ndarray, int]]:
        """The same with rows split over the mesh: each process reads its own, all learn of each."""
        if jax.process_count() == 1:
            yield from self.batches(batch_size, threads, start)
            return
        sharding, shape = NamedSharding(mesh, P("data")), (batch_size, self.crop, self.crop, 3)
        owned = sharding.addressable_devices_indices_map(shape).values()
        columns = sorted(row for index in owned for row in range(*index[0].indices(batch_size)))
        labels: np.ndarray = self._labels  # type: ignore[attr-defined]
        for number, (local, count) in enumerate(self.batches(batch_size, threads, start, columns)):
            positions = slice(start + number * batch_size, start + number * batch_size + count)
            labels[positions] = processes.largest(labels[positions])
            missed = processes.largest(
                np.isin(self.indices[positions], list(self.unreadable)).astype(np.int32)
            )
            self.unreadable.update(self.indices[positions][missed > 0].tolist())
            yield jax.make_array_from_process_local_data(sharding, local, shape), count


def make_extractor(
    network: Network, mesh: Mesh, dtype: Any
) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """Return a jitted function (params, batch_stats, uint8 [N, H, W, 3]) -> features [N, F].

    Rows are split over the mesh.
    """
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def features(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        name = stats_collection(CLEAN)
        variables = {"params": params, name: batch_stats[name]}
        return network.apply(
            variables, images.astype(dtype) / 255, EVALUATION, method=Network.features
        )

    return jax.jit(features, in_shardings=(whole, whole, rows), out_shardings=whole)


def extract(
    forward: Callable[[Any], Any], images: EvalImages, batch_size: int, mesh: Mesh | None = None
) -> np.ndarray:
    """Return features float32 [N, F] of the images.

    `forward` maps uint8 [batch_size, crop, crop, 3], split over the mesh.
    """
    batches = images.device_batches(mesh, batch_size) if mesh else images.batches(batch_size)
    return np.concatenate(
        [np.asarray(forward(batch), np.float32)[:count] for batch, count in batches]
    )


def raw_pixels(images: EvalImages, batch_size: int = 256) -> np.ndarray:
    """float32 [N, H * W * 3] pixels in [0, 1], the baseline that a network must beat."""
    parts = [
        batch[:count].reshape(count, -1).astype(np.float32) / 255
        for batch, count in images.batches(batch_size)
    ]
    return np.concatenate(parts)
