"""Anchors of a feature pyramid: boxes of a few shapes around each cell.

Sizes, rounding and order are torchvision's (AnchorGenerator), so that its weights mean the same
here.
"""

from collections.abc import Sequence

import numpy as np

SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
RATIOS = (0.5, 1.0, 2.0)


def base_anchors(size: float, ratios: Sequence[float] = RATIOS) -> np.ndarray:
    """Return boxes float32 [len(ratios), 4] around the origin.

    Their area is `size` squared, height / width is `ratio`; corners are rounded half to even.
    """
    stretch = np.sqrt(np.asarray(ratios, np.float32))
    width, height = size / stretch, size * stretch
    return np.round(np.stack([-width, -height, width, height], axis=1) / 2).astype(np.float32)


def grid_anchors(
    image: tuple[int, int], feature: tuple[int, int], size: float, ratios: Sequence[float] = RATIOS
) -> np.ndarray:
    """Anchors of one level, float32 [h * w * len(ratios), 4]: by rows, columns, ratios.

    Args:
        image: (height, width) of the padded input.
        feature: (h, w) of the level's map. Cells are H // h and W // w pixels apart: whole numbers,
            whatever the rounding of the strides made of the map.
        size: of the base anchor in pixels.
        ratios: height / width.
    """
    (height, width), (rows, columns) = image, feature
    down = np.arange(rows, dtype=np.float32) * (height // rows)
    right = np.arange(columns, dtype=np.float32) * (width // columns)
    y, x = np.meshgrid(down, right, indexing="ij")
    shifts = np.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4)
    return (shifts + base_anchors(size, ratios)[None]).reshape(-1, 4)


def pyramid_anchors(
    image: tuple[int, int],
    features: Sequence[tuple[int, int]],
    sizes: Sequence[float] = SIZES,
    ratios: Sequence[float] = RATIOS,
) -> list[np.ndarray]:
    """`grid_anchors` of each level, finest first."""
    return [
        grid_anchors(image, feature, size, ratios)
        for feature, size in zip(features, sizes, strict=True)
    ]
