"""The embedded data set: ten classes told apart by shape alone, drawn from a seed.

Colour, position and scale vary widely, which the augmentation removes; rotation, edge softness, a
faint gradient, texture and noise vary a little. The area is drawn whatever the shape, so colours
and raw pixels say little about the class. Example i is a function of (seed, split, i), whatever
else is drawn with it; the size in pixels changes its resolution, not its content.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CLASS_NAMES = [
    "disk",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "crescent",
    "heart",
    "arrow",
    "hourglass",
]
SPLITS = {"train": 1, "test": 2}
_DRAWING = threading.Lock()


def make_shapes(
    indices: int | Sequence[int] | np.ndarray,
    *,
    image_size: int = 32,
    seed: int = 0,
    split: str = "train",
) -> tuple[np.ndarray, np.ndarray]:
    """Draw examples of the data set. The label of example i is i mod 10.

    Args:
      indices: which examples, integers [N]; or a count N, for the first N.
      image_size: side S of the images in pixels, 16 to 1024.
      seed: another seed is another data set of the same kind.
      split: "train" or "test", two disjoint streams.
    Returns:
      images uint8 [N, S, S, 3] and labels int32 [N].
    Raises:
      ValueError: unknown split, negative index or a size out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"shapes has the splits train and test, not {split!r}")
    if not 16 <= image_size <= 1024:
        raise ValueError(f"shapes are drawn at 16 to 1024 pixels, not {image_size}")
    indices = (
        np.arange(indices)
        if isinstance(indices, (int, np.integer))
        else np.asarray(indices, np.int64).reshape(-1)
    )
    if indices.size and indices.min() < 0:
        raise ValueError(f"negative index {indices.min()} in shapes")
    images = np.empty((len(indices), image_size, image_size, 3), np.uint8)
    labels = (indices % len(CLASS_NAMES)).astype(np.int32)
    keys = _mix(
        _mix(np.array([seed % 2**63 * 4 + SPLITS[split]], np.uint64)) + indices.astype(np.uint64)
    )
    chunk = max(1, 2**18 // image_size**2)  # keeps the temporaries in the processor's cache
    for start in range(0, len(indices), chunk):
        rows = slice(start, start + chunk)
        images[rows] = _draw(keys[rows], labels[rows], image_size)
    return images, labels


class ShapesSource:
    """The first `num_examples` examples as a source (see `sources`), drawn when asked for.

    A set of up to 128 MiB is drawn whole by the first access, or by `arrays`, and kept: call
    `arrays` before starting worker processes, and they share it.

    Raises:
      ValueError: unknown split, or a size or number that cannot be drawn.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        image_size: int = 32,
        num_examples: int = 10_000,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise ValueError(
                f"unknown data source 'shapes:{split}': use shapes:train or shapes:test"
            )
        if num_examples < 1 or not 16 <= image_size <= 1024:
            raise ValueError(
                f"shapes: cannot draw {num_examples} images of {image_size} pixels (1 or more of "
                "16 to 1024)"
            )
        self._draw: dict[str, Any] = {"image_size": image_size, "seed": seed, "split": split}
        self._length = num_examples
        self._images: np.ndarray | None = None
        self._fits = num_examples * image_size**2 * 3 <= 2**27
        self.class_names, self.num_classes = list(CLASS_NAMES), len(CLASS_NAMES)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} examples")
        image = self.arrays()[0][index] if self._fits else make_shapes([index], **self._draw)[0][0]
        return {"image": image, "label": int(index) % len(CLASS_NAMES)}

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All images uint8 [N, S, S, 3] and labels int32 [N]."""
        with _DRAWING:  # reader threads arrive together; one of them draws
            if self._images is None:
                self._images = make_shapes(len(self), **self._draw)[0]
        return self._images, self.labels()

    def name(self, index: int) -> str:
        return f"shapes:{self._draw['split']}, index {index}"

    def labels(self) -> np.ndarray:
        return (np.arange(len(self)) % len(CLASS_NAMES)).astype(np.int32)


def _draw(keys: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """Draw uint8 [N, S, S, 3] from a 64-bit key and a label per image."""
    n = len(keys)
    u = _uniform(keys[:, None], 18).T  # [18, N]: one row per random parameter

    side = 0.22 * 2.0 ** u[0]  # square root of the shape's area: 0.22 to 0.44
    margin = 0.55 * side  # all but the tips of a shape stays inside
    center_x, center_y = (margin + (1 - 2 * margin) * w for w in u[1:3])
    angle = np.deg2rad(15) * (2 * u[3] - 1)
    softness = 0.02 + 0.06 * u[4] ** 2  # width of the edge: hides how long the outline is

    pixel = (np.arange(size) + 0.5) / size
    x, y = pixel[None, :] - center_x[:, None], pixel[None, :] - center_y[:, None]  # [N, S]
    cos, sin = np.cos(angle) / side, np.sin(angle) / side
    across = _outer(cos[:, None] * x, sin[:, None] * y)  # [N, S, S], in units of the shape's side
    upward = _outer(sin[:, None] * x, -cos[:, None] * y)
    coverage = np.empty((n, size, size), np.float32)
    for label in np.unique(labels):
        members = labels == label
        coverage[members] = _distance(int(label), across[members], upward[members])
    edge = np.maximum(softness, 1 / size) / side  # at least a pixel wide: anti-aliased
    coverage *= (-1 / edge)[:, None, None].astype(np.float32)
    np.clip(coverage + 0.5, 0, 1, out=coverage)

    # Any hue on any hue, but always dark on light: colour jitter removes a hue, and nothing would
    # remove the polarity.
    background, shape = _tint(u[5], 0.95, 0.45), _tint(u[6], 0.40, 0.70)  # [N, 3]

    shade = _shading(pixel - 0.5, u[8:])
    shade += _noise(keys, size) * (0.01 + 0.03 * u[17].astype(np.float32))[:, None, None]
    image = coverage[..., None] * (shape - background)[:, None, None] + background[:, None, None]
    image += shade[..., None]
    return np.clip(image * 255 + 0.5, 0, 255, out=image).astype(np.uint8)


def _tint(hue: np.ndarray, value: float, saturation: float) -> np.ndarray:
    """float32 [N, 3] RGB colours of the HSV wheel; `hue` [N] in turns."""
    wheel = np.clip(abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation + saturation * wheel)).astype(np.float32)


def _outer(over_x: np.ndarray, over_y: np.ndarray) -> np.ndarray:
    """[N, S] over columns plus [N, S] over rows: float32 [N, S, S]."""
    return over_x[:, None, :].astype(np.float32) + over_y[:, :, None].astype(np.float32)


def _shading(pixel: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return a faint gradient plus a faint wave, float32 [N, S, S]."""
    direction, slope = 2 * np.pi * u[0], 0.06 * u[1]
    linear = _outer(
        np.outer(slope * np.cos(direction), pixel), np.outer(slope * np.sin(direction), pixel)
    )
    turn, waves, phase = np.pi * u[2], 2 * np.pi * (2 + 4 * u[3]), 2 * np.pi * u[4]
    along_x = np.outer(waves * np.cos(turn), pixel) + phase[:, None]
    along_y = np.outer(waves * np.sin(turn), pixel)
    strength = (0.01 * u[5])[:, None]
    # sin(a + b) in outer products: S sines per image, not S * S
    wave = (strength * np.sin(along_x)).astype(np.float32)[:, None, :] * np.cos(along_y).astype(
        np.float32
    )[:, :, None]
    wave += (strength * np.cos(along_x)).astype(np.float32)[:, None, :] * np.sin(along_y).astype(
        np.float32
    )[:, :, None]
    return linear + wave


def _noise(keys: np.ndarray, size: int) -> np.ndarray:
    """Independent pixel noise, uniform in +-0.5: float32 [N, S, S]."""
    words = _uniform_bits(keys[:, None] ^ np.uint64(0xA5A5A5A5A5A5A5A5), (size * size + 3) // 4)
    return (words.view(np.uint16)[:, : size * size].reshape(-1, size, size)) * np.float32(
        2**-16
    ) - np.float32(0.5)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, a bijection of uint64 that looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform_bits(keys: np.ndarray, count: int) -> np.ndarray:
    """uint64 [N, count] from keys [N, 1]."""
    return _mix(keys + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """float64 [N, count] in [0, 1)."""
    return (_uniform_bits(keys, count) >> np.uint64(11)) * 2.0**-53


# Signed distances (negative inside; exact near the outline, all that the edge needs). `x` to the
# right, `y` up. Every shape is its own mirror image, so that flips keep the class.


def _half_planes(*distances: np.ndarray) -> np.ndarray:
    return functools.reduce(np.maximum, distances)


def _disk(x, y):
    return np.hypot(x, y) - 1


def _square(x, y):
    return np.maximum(abs(x), abs(y)) - 1


def _triangle(x, y):
    return np.maximum(-y, 0.8660254 * abs(x) + 0.5 * y) - 0.5


def _star(x, y, inner=0.42):
    x = abs(x)
    for normal_x in (0.809017, -0.809017):  # fold the plane into the sector of the upper point
        inside = np.maximum(normal_x * x - 0.5877853 * y, 0)
        x, y = x - 2 * normal_x * inside, y + 2 * 0.5877853 * inside
    run, rise = inner * 0.5877853, 1 - inner * 0.809017
    return (rise * abs(x) + run * (y - 1)) / np.hypot(run, rise)


def _cross(x, y, arm=0.3):
    return np.minimum(np.maximum(abs(x) - arm, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - arm))


def _ring(x, y):
    return abs(np.hypot(x, y) - 0.75) - 0.25


def _crescent(x, y):
    return np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x, y - 0.5))


def _heart(x, y):
    return np.minimum(
        (abs(x) + abs(y) - 1) * 0.7071068, np.hypot(abs(x) - 0.5, y - 0.5) - 0.7071068
    )


def _arrow(x, y):
    head = np.maximum(-y, (abs(x) + 0.8 * (y - 1)) * 0.7808688)
    return np.minimum(head, _half_planes(abs(x) - 0.25, y, -1 - y))


def _hourglass(x, y):
    return np.maximum(abs(y) - 1, (abs(x) - 0.75 * abs(y) - 0.06) * 0.8)


_SHAPES: list[Callable] = [
    _disk,
    _square,
    _triangle,
    _star,
    _cross,
    _ring,
    _crescent,
    _heart,
    _arrow,
    _hourglass,
]


@functools.cache
def _normalisation(label: int) -> tuple[float, float]:
    """Return (side, height of the centroid) of a shape, to center it with area 1."""
    grid = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    inside = _SHAPES[label](*np.meshgrid(grid, grid)) < 0
    return float(np.sqrt(inside.mean()) * 3), float(np.average(grid, weights=inside.sum(1)))


def _distance(label: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the shape of area 1 centred at 0: float32, shape of x."""
    side, center = _normalisation(label)
    return _SHAPES[label](
        x * np.float32(side), y * np.float32(side) + np.float32(center)
    ) / np.float32(side)
