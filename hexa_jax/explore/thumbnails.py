"""Thumbnails of a page, packed into a few large WebP images (atlases) that travel as data URIs."""

import base64
from collections.abc import Sequence

import cv2
import numpy as np

from hexa_jax.data.decode import resize_center_crop

# Decoded, an atlas is 64 MiB: more is refused by the canvas of some phones.
ATLAS_SIDE = 4096
QUALITY = 75
# (images up to, side of a thumbnail in pixels): keeps a page of photographs below about 20 MB.
SIDES = ((2_000, 128), (12_000, 64), (40_000, 40))
SMALLEST = 32


def thumbnail_side(num_images: int) -> int:
    """Side in pixels of the thumbnails of a page with so many images."""
    return next((side for most, side in SIDES if num_images <= most), SMALLEST)


def make_thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """The central square of an image, uint8 [H, W, 3] -> uint8 [side, side, 3]."""
    return resize_center_crop(pixels, side, side)


def make_atlases(thumbnails: Sequence[np.ndarray]) -> tuple[list[str], int]:
    """Pack thumbnails row by row.

    Args:
        thumbnails: uint8 [side, side, 3], all of one size; at least one.

    Returns:
        Data URIs of the atlases, and the thumbnails in a row of one. Thumbnail i is cell
        i % columns**2 of atlas i // columns**2.
    """
    side = thumbnails[0].shape[0]
    columns = ATLAS_SIDE // side
    atlases = []
    for first in range(0, len(thumbnails), columns**2):
        cells = thumbnails[first : first + columns**2]
        rows = -(-len(cells) // columns)
        atlas = np.zeros((rows * side, columns * side, 3), np.uint8)
        for number, cell in enumerate(cells):
            top, left = number // columns * side, number % columns * side
            atlas[top : top + side, left : left + side] = cell
        encoded = cv2.imencode(
            ".webp", cv2.cvtColor(atlas, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, QUALITY]
        )[1]
        atlases.append("data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode())
    return atlases, columns
