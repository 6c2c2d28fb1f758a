"""Mean and standard deviation of a data set's pixels."""

from typing import NamedTuple

import cv2
import numpy as np

from hexa_jax.data.decode import BadImage, decode
from hexa_jax.data.source import DataError, Source
from hexa_jax.data.subset import spread

SAMPLE = 1000  # images; their number hardly matters, which ones they are does
DIGITS = 6  # of the result: what two processors may sum in another order is below
SMALLEST = 1 / 255  # standard deviation of a channel that is the same everywhere


class PixelStatistics(NamedTuple):
    """Statistics of pixels in [0, 1], per channel red, green, blue.

    Attributes:
        mean, std: three numbers each.
        images: how many were measured.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int


def measure_pixels(source: Source, limit: int = SAMPLE) -> PixelStatistics:
    """Return pixel statistics of `limit` images spread evenly over a source.

    Raises:
        DataError: none of them can be read.
    """
    means, squares = [], []
    for index in spread(len(source), limit):
        try:
            image = decode(source[int(index)]["image"], source.name(int(index)))
        except BadImage:
            continue  # named and counted where it is trained on
        mean, deviation = (value[:, 0] / 255 for value in cv2.meanStdDev(image))
        means.append(mean)
        squares.append(mean**2 + deviation**2)
    if not means:
        raise DataError(
            f"data.normalization=measured: none of the first {limit} images can be read, as "
            f"{source.name(0)}"
        )
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, SMALLEST**2))
    mean, std = (tuple(round(float(value), DIGITS) for value in values) for values in (mean, std))
    return PixelStatistics(mean, std, len(means))
