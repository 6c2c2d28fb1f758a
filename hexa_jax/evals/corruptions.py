"""Common corruptions of images at five strengths, as in ImageNet-C and CIFAR-10-C.

Parameters are those of ImageNet-C/create_c/make_imagenet_c.py and make_cifar_c.py in
github.com/hendrycks/robustness (Hendrycks and Dietterich, ICLR 2019), strengths 1 to 5:

    name              parameter                    imagenet (224 pixels)     cifar (32 pixels)
    gaussian_noise    standard deviation           .08 .12 .18 .26 .38       .04 .06 .08 .09 .1
    shot_noise        photons of white             60 25 12 5 3              500 250 100 75 50
    impulse_noise     share of values replaced     .03 .06 .09 .17 .27       .01 .02 .03 .05 .07
    gaussian_blur     standard deviation, pixels   1 2 3 4 6                 .4 .6 .7 .8 1
    defocus_blur      radius in pixels             3 4 6 8 10                .3 .4 .5 1 1.5
                      smoothing of the disc        .1 .5 .5 .5 .5            .4 .5 .6 .2 .1
    contrast          share that is kept           .4 .3 .2 .1 .05           .75 .5 .4 .3 .15
    brightness        added to HSV's value         .1 .2 .3 .4 .5            .05 .1 .15 .2 .3
    jpeg_compression  quality                      25 18 15 10 7             80 65 58 50 40
    pixelate          remaining share of the side  .6 .5 .4 .3 .25           .95 .9 .85 .75 .65

What differs from the published files: every random number is a function of its seed, results are
rounded to grey levels (theirs are cut off, which darkens by half a level on average), and they are
not compressed again (ImageNet-C is stored as JPEG of quality 85). Scores are therefore close to
those on the published files, not the same.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

STRENGTHS = (1, 2, 3, 4, 5)


def _gaussian_noise(x: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    return x + rng.normal(scale=deviation, size=x.shape)


def _shot_noise(x: np.ndarray, rng: np.random.Generator, photons: float) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Each value of each channel on its own becomes 0 or 1 with probability `share`."""
    replaced, white = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(replaced, white, x)


def _gaussian_blur(x: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    # Cut off at four standard deviations, edges repeated, as in scipy and scikit-image.
    side = 2 * round(4 * deviation) + 1
    return cv2.GaussianBlur(x, (side, side), deviation, borderType=cv2.BORDER_REPLICATE)


def disc(radius: float, smoothing: float) -> np.ndarray:
    """Kernel of a lens out of focus: a disc, its edge softened by a small Gaussian.

    Args:
        radius: in pixels.
        smoothing: standard deviation of the Gaussian in pixels, of 3 x 3 taps (5 x 5 for radii
            above 8).

    Returns:
        float64 [S, S], S = 17 or 2 * radius + 1.
    """
    reach = np.arange(-8, 9) if radius <= 8 else np.arange(-radius, radius + 1)
    inside = (reach[:, None] ** 2 + reach[None] ** 2 <= radius**2).astype(np.float64)
    taps = (3, 3) if radius <= 8 else (5, 5)
    return cv2.GaussianBlur(inside / inside.sum(), taps, smoothing)


def _defocus_blur(
    x: np.ndarray, rng: np.random.Generator, radius: float, smoothing: float
) -> np.ndarray:
    return cv2.filter2D(x, -1, disc(radius, smoothing))  # edges mirrored


def _contrast(x: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    mean = np.mean(x, axis=(0, 1), keepdims=True)
    return (x - mean) * share + mean


def _brightness(x: np.ndarray, rng: np.random.Generator, added: float) -> np.ndarray:
    # With hue and saturation kept, all channels scale as their largest one does; black, which has
    # neither, becomes gray.
    value = np.max(x, axis=2, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _jpeg_compression(x: np.ndarray, rng: np.random.Generator, quality: int) -> np.ndarray:
    pixels = cv2.cvtColor(_levels(x), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) / 255


def _pixelate(x: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """The mean of each cell in all of its pixels: Pillow's BOX filter there and back.

    A pixel belongs to the cell that holds its centre, so cells are of unequal size where the
    smaller side does not divide the larger one.
    """
    for axis, side in enumerate(x.shape[:2]):
        small = max(int(side * share), 1)
        # In whole numbers: a center on the border of two cells counts as in the lower one when the
        # mean is taken, and shows the upper one.
        centers = (2 * np.arange(side) + 1) * small
        member = -(-centers // (2 * side)) - 1 == np.arange(small)[:, None]
        mean = member / member.sum(axis=1, keepdims=True)
        cells = np.tensordot(mean, x, axes=(1, axis))
        x = np.moveaxis(cells[centers // (2 * side)], 0, axis)
    return x


# Name: function of pixels float64 [H, W, 3] in [0, 1], a generator and a strength's parameters;
# then the parameters of strengths 1 to 5 for ImageNet and for CIFAR.
_CORRUPTIONS: dict[str, tuple[Callable[..., np.ndarray], tuple, tuple]] = {
    "gaussian_noise": (
        _gaussian_noise,
        (0.08, 0.12, 0.18, 0.26, 0.38),
        (0.04, 0.06, 0.08, 0.09, 0.1),
    ),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (
        _impulse_noise,
        (0.03, 0.06, 0.09, 0.17, 0.27),
        (0.01, 0.02, 0.03, 0.05, 0.07),
    ),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    "defocus_blur": (
        _defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
}
CORRUPTIONS = tuple(_CORRUPTIONS)
FAMILIES = ("imagenet", "cifar")


def parameters(name: str, strength: int, family: str) -> tuple[Any, ...]:
    """Parameters of a corruption at a strength from 1 to 5, as in the table of this module.

    Raises:
        KeyError: an unknown name.
        ValueError: an unknown family.
    """
    _, imagenet, cifar = _CORRUPTIONS[name]
    value = (imagenet, cifar)[FAMILIES.index(family)][strength - 1]
    return value if isinstance(value, tuple) else (value,)


def corrupt(
    image: np.ndarray, name: str, strength: int, rng: np.random.Generator, family: str = "imagenet"
) -> np.ndarray:
    """A corrupted copy of an image.

    Args:
        image: uint8 [H, W, 3].
        name: one of CORRUPTIONS.
        strength: 1 to 5.
        rng: of noise; the other corruptions do not use it.
        family: "imagenet" or "cifar", for which size of images the strengths were made.

    Returns:
        uint8 [H, W, 3].

    Raises:
        KeyError: an unknown name.
        ValueError: an unknown family.
    """
    function = _CORRUPTIONS[name][0]
    return _levels(function(image / 255.0, rng, *parameters(name, strength, family)))


def _levels(x: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] as the nearest grey levels, uint8."""
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)
