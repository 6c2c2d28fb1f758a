"""The embedded data set: wallpapers of ten shapes, told apart by shape alone, drawn from a seed without any download.

An image repeats one shape over the whole area. Colors, the place and size of the pattern, its tilt and pixel noise vary:
crops, flips and color jitter change these, too, so that the shape is what two crops of an image have in common. The shapes
have equal areas, so colors say nothing about the class, and the place is drawn over a whole period, so raw pixels say little.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

SPLITS = {"train": 1, "test": 2}
PERIOD = (0.45, 0.7)  # from one copy of the shape to the next, as a share of the image's side
SIDE = 0.55  # square root of a shape's area, as a share of the period
TILT = np.deg2rad(15)  # at most, to either side
SOFTNESS = 0.03  # width of an edge, as a share of the image's side
NOISE = 0.05  # at most, up or down, of white 1


# Two orthogonal directions of RGB along which the luminance 0.299 R + 0.587 G + 0.114 B stays the same.
_CHROMA = np.array([[0.89105, -0.45387, 0.0], [0.07739, 0.15194, -0.98535]])


def _star(x: np.ndarray, y: np.ndarray, inner: float = 0.42) -> np.ndarray:
    x = abs(x)
    # Fold the plane into the sector of the upper point.
    for normal_x in (0.809017, -0.809017):
        inside = np.maximum(normal_x * x - 0.5877853 * y, 0)
        x, y = x - 2 * normal_x * inside, y + 2 * 0.5877853 * inside
    run, rise = inner * 0.5877853, 1 - inner * 0.809017
    return (rise * abs(x) + run * (y - 1)) / np.hypot(run, rise)


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    head = np.maximum(-y, 0.7808688 * (abs(x) + 0.8 * (y - 1)))
    return np.minimum(head, np.maximum(abs(x) - 0.25, np.maximum(y, -1 - y)))


# Signed distances, negative inside and exact near the outline, which is all that an edge needs. x to the right, y up.
# Every shape is its own mirror image, so that flips keep the class.
_SHAPES = {
    "disk": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 1,
    "triangle": lambda x, y: np.maximum(-y, 0.8660254 * abs(x) + 0.5 * y) - 0.5,
    "star": _star,
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.3, np.maximum(abs(x), abs(y)) - 1),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.25,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x, y - 0.5)),
    "heart": lambda x, y: np.minimum(0.7071068 * (abs(x) + abs(y) - 1), np.hypot(abs(x) - 0.5, y - 0.5) - 0.7071068),
    "arrow": _arrow,
    "hourglass": lambda x, y: np.maximum(abs(y) - 1, 0.8 * (abs(x) - 0.75 * abs(y) - 0.06)),
}
CLASS_NAMES = list(_SHAPES)


@functools.cache
def _size_and_center(label: int) -> tuple[np.float32, np.float32]:
    """Square root of the area and height of the centroid of a shape as defined above."""
    grid = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    inside = _SHAPES[CLASS_NAMES[label]](*np.meshgrid(grid, grid)) < 0
    return np.float32(3 * np.sqrt(inside.mean())), np.float32(np.average(grid, weights=inside.sum(1)))


def _distance(label: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance from (x, y) to the outline of the shape with area 1 and centroid 0; of the shape of x."""
    size, center = _size_and_center(label)
    return _SHAPES[CLASS_NAMES[label]](x * size, y * size + center) / size


def _color(hue: float, luminance: float, chroma: float) -> np.ndarray:
    """float32 [3], an RGB color of that luminance (Rec. 601); `hue` in turns, `chroma` the distance from grey."""
    angle = 2 * np.pi * hue
    return (luminance + chroma * (np.cos(angle) * _CHROMA[0] + np.sin(angle) * _CHROMA[1])).astype(np.float32)


def _draw(label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """An image uint8 [S, S, 3] of a class; what is drawn first is the same for every size."""
    zoom, tilt, shift_x, shift_y, background_hue, shape_hue = rng.random(6)
    period = PERIOD[0] * (PERIOD[1] / PERIOD[0]) ** zoom
    angle = TILT * (2 * tilt - 1)
    pixel = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) / np.float32(period)
    across, up = pixel[None, :], -pixel[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x = (cos * across + sin * up + np.float32(shift_x)) % 1 - 0.5  # in periods from the nearest copy's center
    y = (cos * up - sin * across + np.float32(shift_y)) % 1 - 0.5
    distance = _distance(label, x / np.float32(SIDE), y / np.float32(SIDE)) * np.float32(SIDE * period)
    # An edge is at least a pixel wide, so that there are no jagged ones.
    coverage = np.clip(0.5 - distance / np.float32(max(SOFTNESS, 1 / size)), 0, 1)[..., None]
    # Two luminances for all images: what color adds to them goes when a crop is made grey.
    background, shape = _color(background_hue, 0.55, 0.42), _color(shape_hue, 0.25, 0.25)
    noise = np.float32(2 * NOISE) * (rng.random((size, size, 1), np.float32) - np.float32(0.5))
    image = background + coverage * (shape - background) + noise
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def make_shapes(
    indices: int | Sequence[int] | np.ndarray, *, image_size: int = 32, seed: int = 0, split: str = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """Draw examples of the data set; example i has label i mod 10 and is a function of (seed, split, i).

    Args:
        indices: which examples, integers [N]; or a count N, for the first N.
        image_size: side S of the images in pixels, 16 to 1024; it changes the resolution, not the content.
        seed: another seed is another data set of the same kind.
        split: "train" or "test", two disjoint streams.

    Returns:
        Images uint8 [N, S, S, 3] and labels int32 [N].

    Raises:
        ValueError: unknown split, negative index or a size out of range.
    """
    _check(split, image_size)
    indices = np.arange(indices) if isinstance(indices, int | np.integer) else np.asarray(indices, np.int64).reshape(-1)
    if indices.size and indices.min() < 0:
        raise ValueError(f"negative index {indices.min()} in shapes")
    images = np.empty((len(indices), image_size, image_size, 3), np.uint8)
    labels = (indices % len(CLASS_NAMES)).astype(np.int32)
    for image, index, label in zip(images, indices, labels, strict=True):
        image[...] = _draw(int(label), image_size, np.random.default_rng([seed, SPLITS[split], int(index)]))
    return images, labels


def _check(split: str, image_size: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"shapes has the splits train and test, not {split!r}: use shapes:train or shapes:test")
    if not 16 <= image_size <= 1024:
        raise ValueError(f"shapes are drawn at 16 to 1024 pixels, not {image_size}")


class ShapesSource:
    """The first `num_examples` examples as a source (see `sources`), each drawn when it is asked for.

    Raises:
        ValueError: unknown split, or a size or number that cannot be drawn.
    """

    def __init__(self, split: str = "train", *, image_size: int = 32, num_examples: int = 10_000, seed: int = 0):
        _check(split, image_size)
        if num_examples < 1:
            raise ValueError(f"shapes: cannot draw {num_examples} images")
        self._draw: dict[str, Any] = {"image_size": image_size, "seed": seed, "split": split}
        self._length = num_examples
        self.class_names, self.num_classes = list(CLASS_NAMES), len(CLASS_NAMES)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} examples")
        images, labels = make_shapes([index], **self._draw)
        return {"image": images[0], "label": int(labels[0])}

    def name(self, index: int) -> str:
        return f"shapes:{self._draw['split']}, index {index}"

    def labels(self) -> np.ndarray:
        return (np.arange(len(self)) % len(CLASS_NAMES)).astype(np.int32)
