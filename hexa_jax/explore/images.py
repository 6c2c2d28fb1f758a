"""Read the readable images of a source once, in order, ahead of the device."""

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage, decode, resize_center_crop
from hexa_jax.data.source import Source


@dataclasses.dataclass(frozen=True)
class ReadImage:
    """One readable image.

    Attributes:
        index: of the example in the source.
        crop: uint8 [crop, crop, 3], what the network sees.
        label: of the example; -1 where it has none.
        summary: what `summarize` made of the whole image, or None.
    """

    index: int
    crop: np.ndarray
    label: int
    summary: Any


class ImageReader:
    """Iterates over the readable images of a source in the order of their indices.

    At most `ahead` decoded images wait in memory. Each image that cannot be read is logged once,
    by name and reason, and left out.

    Args:
        source: random-access examples.
        resize: short side in pixels before the centre crop.
        crop: side of the centre crop in pixels.
        summarize: called once with each whole image, uint8 [H, W, 3], in a thread.
        threads: that decode.
        ahead: images to decode before they are asked for.

    Attributes:
        unreadable: the images that were left out so far.
    """

    def __init__(
        self,
        source: Source,
        resize: int,
        crop: int,
        *,
        summarize: Callable[[np.ndarray], Any] | None = None,
        threads: int = 2,
        ahead: int = 256,
    ):
        self.source, self.resize, self.crop = source, resize, crop
        self.unreadable: list[BadImage] = []
        self._summarize, self._threads, self._ahead = summarize, threads, ahead

    def __iter__(self) -> Iterator[ReadImage]:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        indices = iter(range(len(self.source)))
        pool = concurrent.futures.ThreadPoolExecutor(self._threads)
        try:
            for index in itertools.islice(indices, self._ahead):
                waiting.append(pool.submit(self._read, index))
            while waiting:
                read = waiting.popleft().result()
                for index in itertools.islice(indices, 1):
                    waiting.append(pool.submit(self._read, index))
                if isinstance(read, BadImage):
                    self.unreadable.append(read)
                    logging.warning("left out: %s", read)
                else:
                    yield read
        finally:
            # An error or Ctrl-C must not wait for images that nobody will use.
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, index: int) -> ReadImage | BadImage:
        try:
            example = self.source[index]
            pixels = decode(example["image"], self.source.name(index))
        except BadImage as error:
            return error
        summary = self._summarize(pixels) if self._summarize else None
        crop = resize_center_crop(pixels, self.resize, self.crop)
        return ReadImage(index, crop, int(example.get("label", -1)), summary)
