"""Images inside a page: data URIs, thumbnails, a map, differences of views."""

import base64
import html
import math

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.manifold import TSNE

from hexa_jax.data.decode import BadImage, decode, resize_center_crop
from hexa_jax.data.source import Source
from hexa_jax.data.subset import spread

LOSSLESS = 96  # pixels of a side up to which an image is kept exactly
MAP_COLUMNS = 24
MAP_ROWS = 16
MAP_THUMBNAIL = 56  # pixels


def data_uri(image: np.ndarray) -> str:
    """Return an image, uint8 or float in [0, 1], as a data URI: PNG if small, else JPEG."""
    if image.dtype != np.uint8:
        image = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    exact = max(image.shape[:2]) <= LOSSLESS
    suffix, kind = (".png", "png") if exact else (".jpg", "jpeg")
    options = [] if exact else [cv2.IMWRITE_JPEG_QUALITY, 88]
    done, encoded = cv2.imencode(suffix, np.ascontiguousarray(image[..., ::-1]), options)
    assert done
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"


def picture(image: np.ndarray, alt: str, caption: str = "", kind: str = "", side: int = 0) -> str:
    """Return a `<figure>`: an image with what it shows, and a caption as HTML.

    Args:
        image: uint8 or float [H, W, 3].
        alt: for those who do not see it.
        caption: below it.
        kind: of the figure, a class of the style sheet.
        side: pixels to shrink the longer side to; 0: as it is.
    """
    if side and max(image.shape[:2]) > side:
        image = shrink(image, side)
    sharp = ' class="pixels"' if max(image.shape[:2]) < LOSSLESS else ""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    hover = f' title="{html.escape(alt, quote=True)}"' if kind else ""
    size = f'width="{image.shape[1]}" height="{image.shape[0]}"'
    return (
        f"<figure{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>"
        f'<img{sharp}{hover} loading="lazy" {size} alt="{html.escape(alt, quote=True)}" src="{data_uri(image)}">'
        f"{below}</figure>"
    )


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Return an image whose longer side has `side` pixels."""
    scale = side / max(image.shape[:2])
    size = tuple(max(round(length * scale), 1) for length in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def thumbnail(source: Source, index: int, side: int) -> np.ndarray | None:
    """Return uint8 [side, side, 3] of an example's center; None where it cannot be read."""
    try:
        pixels = decode(source[int(index)]["image"], source.name(int(index)))
    except BadImage:
        return None
    return resize_center_crop(pixels, side, side)


def difference(clean: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """Return other - clean around mid-gray, `factor` times as strong, clipped to [0, 1]."""
    return np.clip(0.5 + factor * (other - clean), 0, 1)


def strength(clean: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    """Return the largest difference in gray levels, and a factor that makes it visible."""
    largest = float(np.abs(other - clean).max(initial=0.0))
    if largest == 0:
        return 0.0, 1
    wanted = 0.16 / largest  # muted colors: stretched to full scale, one grey level looks violent
    return 255 * largest, next((f for f in (100, 50, 40, 20, 10, 5, 2) if f <= wanted), 1)


def perturbation(clean: np.ndarray, adversarial: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the difference around 0.5, full scale, and its largest value in [0, 1]."""
    radius = max(float(np.abs(adversarial - clean).max()), 1e-9)
    return 0.5 + 0.5 * (adversarial - clean) / radius, radius


def image_map(images: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return one picture uint8 [H, W, 3] in which similar images are neighbors.

    t-SNE of the features puts them on a plane; each then moves to a cell of a grid, so that none
    covers another.

    Args:
        images: uint8 [N, S, S, 3].
        features: [N, F]; at least 4 images.
    """
    columns, rows = map_shape(len(images))
    chosen = spread(len(images), columns * rows)
    images, features = images[chosen], np.asarray(features[chosen], np.float64)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    place = _positions(unit)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, columns), np.linspace(0, 1, rows)), -1).reshape(
        -1, 2
    )
    cost = np.sum((place[:, None] - grid[None]) ** 2, axis=-1)
    cells = linear_sum_assignment(cost)[1]
    gap = 2
    pitch = MAP_THUMBNAIL + gap
    canvas = np.full((rows * pitch - gap, columns * pitch - gap, 3), 255, np.uint8)
    for image, cell in zip(images, cells, strict=True):
        top, left = (cell // columns) * pitch, (cell % columns) * pitch
        small = cv2.resize(image, (MAP_THUMBNAIL, MAP_THUMBNAIL), interpolation=cv2.INTER_AREA)
        canvas[top : top + MAP_THUMBNAIL, left : left + MAP_THUMBNAIL] = small
    return canvas


def map_shape(count: int) -> tuple[int, int]:
    """Return columns and rows of a full grid for most of `count` images."""
    columns = max(min(MAP_COLUMNS, int(math.sqrt(1.5 * count))), 1)
    return columns, max(min(count // columns, MAP_ROWS), 1)


def _positions(unit: np.ndarray) -> np.ndarray:
    """Return [N, 2] ranks in [0, 1] of t-SNE's coordinates: the grid is then filled evenly."""
    # A little noise keeps equal features (a collapsed network) apart.
    unit = unit + 1e-6 * np.random.default_rng(0).standard_normal(unit.shape)
    perplexity = min(20.0, (len(unit) - 1) / 3)
    # For so few images the exact form takes a tenth of the time of the tree.
    layout = TSNE(
        2, perplexity=perplexity, init="pca", random_state=0, max_iter=500, method="exact"
    )
    flat = layout.fit_transform(unit)
    return np.argsort(np.argsort(flat, axis=0), axis=0) / max(len(unit) - 1, 1)
