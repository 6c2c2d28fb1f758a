"""The few shapes that images are padded to, and how an image and its boxes get onto one."""

from collections.abc import Sequence

import cv2
import numpy as np

from hexa_jax.core.errors import ConfigError

Size = Sequence[int] | np.ndarray  # (height, width)
STRIDE = 32  # canvases are multiples of it: the last map of the backbone then has whole pixels


def content_sizes(
    sizes: np.ndarray, short: int, limit: int, canvas: tuple[int, int] | None = None
) -> np.ndarray:
    """How large images become: the short side `short`, unless the long one then exceeds `limit`.

    As in torchvision's detection transform, the scale is one quotient in float64, and sides are
    rounded down after they were multiplied by it. What should be a whole number may then lie just
    below it: 334 pixels at short=800 become 799.

    Args:
        sizes: int [..., 2] (height, width).
        short, limit: pixels.
        canvas: (height, width) that images must fit; they are scaled down further where they do
            not.

    Returns:
        int64 [..., 2], at least 1.
    """
    sides = np.asarray(sizes, np.float64)
    scale = np.minimum(short / sides.min(-1), limit / sides.max(-1))
    contents = _scaled(sides, scale)
    if canvas is not None:
        fits = np.all(contents <= canvas, axis=-1, keepdims=True)
        room = np.minimum(scale, (canvas / sides).min(-1))
        contents = np.where(fits, contents, np.minimum(_scaled(sides, room), canvas))
    return np.maximum(contents, 1)


def _scaled(sides: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.floor(sides * scale[..., None]).astype(np.int64)


class Canvases:
    """The shapes of batches: each pair (short, long) lying and standing.

    Attributes:
        limit: of the long side of an image.

    Args:
        pairs: (short, long) sides in pixels.
        short_sides: that images will be asked to have.
        limit: see above.

    Raises:
        ConfigError: sides that are no multiples of STRIDE, or no canvas that holds every image.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], short_sides: Sequence[int], limit: int):
        wrong = [
            pair
            for pair in pairs
            if len(pair) != 2 or min(pair) < 1 or any(side % STRIDE for side in pair)
        ]
        if wrong or not pairs:
            raise ConfigError(
                f"data.canvases must be pairs (short, long) of multiples of {STRIDE}, not "
                f"{wrong or pairs}"
            )
        if not short_sides or min(short_sides) < 1 or limit < 1:
            raise ConfigError("data.short_sides and data.long_limit must be numbers of pixels")
        needed = min(max(short_sides), limit), limit
        if not any(min(pair) >= needed[0] and max(pair) >= needed[1] for pair in pairs):
            up = tuple(-(-side // STRIDE) * STRIDE for side in needed)
            raise ConfigError(
                f"no pair of data.canvases holds images of {needed[0]} x {needed[1]} pixels, which "
                f"data.short_sides (or eval_short_side) and long_limit allow: add {up}"
            )
        self._pairs = sorted(
            {(min(pair), max(pair)) for pair in pairs}, key=lambda pair: (pair[0] * pair[1], pair)
        )
        self.limit = limit

    def shapes(self, portrait: bool) -> list[tuple[int, int]]:
        """(height, width), the smallest area first."""
        return [(long, short) if portrait else (short, long) for short, long in self._pairs]

    @property
    def all(self) -> list[tuple[int, int]]:
        """Every (height, width) that a batch can have."""
        return list(
            dict.fromkeys(shape for portrait in (False, True) for shape in self.shapes(portrait))
        )

    def smallest(self, sizes: np.ndarray, short: int) -> tuple[int, int]:
        """Return the smallest canvas that holds images int [n, 2] of a batch.

        It lies or stands as most of them do.

        If none holds all, the smallest that holds those that lie or stand like it: the others must
        be scaled down to fit.
        """
        tall = is_portrait(sizes)
        portrait = bool(2 * tall.sum() > len(tall))
        shapes, contents = self.shapes(portrait), content_sizes(sizes, short, self.limit)
        for wanted in (contents, contents[tall == portrait]):
            for shape in shapes:
                if (wanted <= shape).all():
                    return shape
        return shapes[-1]  # not reached: the largest holds what lies or stands like it


def is_portrait(sizes: np.ndarray) -> np.ndarray:
    """bool [...] of int [..., 2]: higher than wide."""
    return sizes[..., 0] > sizes[..., 1]


def draw(pixels: np.ndarray, content: Size, mirrored: bool, canvas: np.ndarray) -> None:
    """Draw a resized image uint8 [h, w, 3] in the top left corner of a canvas of zeros.

    Bilinear, without anti-aliasing.
    """
    height, width = content
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    canvas[:height, :width] = cv2.flip(resized, 1) if mirrored else resized


def move_boxes(boxes: np.ndarray, size: Size, content: Size, mirrored: bool = False) -> np.ndarray:
    """Return boxes float32 [..., 4] after an image was resized and perhaps mirrored.

    Sizes are (height, width).
    """
    ratio_y, ratio_x = np.array(content, np.float32) / np.array(size, np.float32)
    x1, y1, x2, y2 = np.moveaxis(
        boxes * np.array([ratio_x, ratio_y, ratio_x, ratio_y], np.float32), -1, 0
    )
    if mirrored:
        x1, x2 = content[1] - x2, content[1] - x1
    return np.stack([x1, y1, x2, y2], axis=-1).astype(np.float32)
