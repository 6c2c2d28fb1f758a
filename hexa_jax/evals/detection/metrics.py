"""Average precision of detections."""

from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: float32 [m, 4], pixels of the original image.
        labels: int32 [m].
        difficult: bool [m]: neither finding it nor missing it counts.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


class Detections(NamedTuple):
    """What a detector found in an image.

    Attributes:
        boxes: float32 [n, 4], pixels of the original image.
        scores: float32 [n].
        labels: int32 [n].
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
