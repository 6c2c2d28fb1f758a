"""Common corruptions against formulas in float64 and against scipy and Pillow."""

import colorsys
import io

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from hexa_jax.evals.corruptions import CORRUPTIONS, FAMILIES, STRENGTHS, corrupt, disc, parameters

EVERY = [(family, strength) for family in FAMILIES for strength in STRENGTHS]
SIDE = {"imagenet": 44, "cifar": 32}


def generator(number=0):
    return np.random.default_rng(number)


def picture(family):
    """A smooth image with edges, black, white and noise in it."""
    side = SIDE[family]
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x * y)], axis=-1)
    image[: side // 4] *= (x[: side // 4] > 0.5)[..., None]
    image[-(side // 4) :, : side // 3] = generator(5).random((side // 4, side // 3, 3))
    return np.round(255 * image).astype(np.uint8)


def levels(x):
    return np.clip(x, 0, 1) * 255


def test_every_corruption_is_stronger_at_five_than_at_one_and_keeps_its_input():
    for name in CORRUPTIONS:
        for family in FAMILIES:
            image = picture(family)
            before = image.copy()
            damage = [
                np.mean(np.abs(corrupt(image, name, strength, generator(), family) - before.astype(float)))
                for strength in (1, 5)
            ]
            assert 0 <= damage[0] < damage[1], (name, family, damage)
            assert damage[0] > 0 or (name, family) == ("gaussian_blur", "cifar")
            np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("family", "strength"), EVERY)
def test_contrast_and_brightness_are_their_formulas(family, strength):
    image = picture(family)
    x = image / 255
    (share,) = parameters("contrast", strength, family)
    mean = x.reshape(-1, 3).mean(axis=0)
    got = corrupt(image, "contrast", strength, generator(), family)
    np.testing.assert_allclose(got, levels(mean + share * (x - mean)), atol=0.5 + 1e-9)
    (added,) = parameters("brightness", strength, family)
    wanted = np.empty(x.shape)
    for place in np.ndindex(x.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[place])
        wanted[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
    got = corrupt(image, "brightness", strength, generator(), family)
    np.testing.assert_allclose(got, levels(wanted), atol=0.5 + 1e-9)
    assert (got[(image == 0).all(axis=2)] == round(255 * added)).all()  # black becomes gray


@pytest.mark.parametrize(("family", "strength"), EVERY)
def test_blurs_are_scipys_convolutions(family, strength):
    image = picture(family)
    x = image / 255
    (deviation,) = parameters("gaussian_blur", strength, family)
    wanted = scipy.ndimage.gaussian_filter(x, (deviation, deviation, 0), mode="nearest", truncate=4)
    got = corrupt(image, "gaussian_blur", strength, generator(), family)
    np.testing.assert_allclose(got, levels(wanted), atol=0.5 + 1e-6)
    kernel = kernel_by_hand(*parameters("defocus_blur", strength, family))
    wanted = np.stack([scipy.ndimage.convolve(x[..., c], kernel, mode="mirror") for c in range(3)], axis=-1)
    got = corrupt(image, "defocus_blur", strength, generator(), family)
    np.testing.assert_allclose(got, levels(wanted), atol=0.5 + 1e-6)


def kernel_by_hand(radius, smoothing):
    """A disc in a square, convolved with the normalized taps of a Gaussian."""
    reach = 8 if radius <= 8 else int(radius)
    square = np.zeros((2 * reach + 1, 2 * reach + 1))
    for row, column in np.ndindex(square.shape):
        square[row, column] = (row - reach) ** 2 + (column - reach) ** 2 <= radius**2
    offset = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    taps = np.exp(-(offset**2) / (2 * smoothing**2))
    taps /= taps.sum()
    square /= square.sum()
    return scipy.ndimage.convolve(square, taps[:, None] * taps[None], mode="mirror")


def test_the_disc_is_that_of_the_formula():
    for family, strength in EVERY:
        radius, smoothing = parameters("defocus_blur", strength, family)
        np.testing.assert_allclose(disc(radius, smoothing), kernel_by_hand(radius, smoothing), atol=1e-9)


@pytest.mark.parametrize(("family", "strength"), EVERY)
def test_jpeg_and_pixelate_are_pillows(family, strength):
    image = picture(family)
    (quality,) = parameters("jpeg_compression", strength, family)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    wanted = np.asarray(Image.open(buffer)).astype(int)
    got = corrupt(image, "jpeg_compression", strength, generator(), family).astype(int)
    assert np.max(np.abs(got - wanted)) <= 2 and np.mean(got != wanted) < 0.02  # two builds of libjpeg
    (share,) = parameters("pixelate", strength, family)
    side = len(image)
    small = Image.fromarray(image).resize((int(side * share),) * 2, Image.Resampling.BOX)
    wanted = np.asarray(small.resize((side, side), Image.Resampling.BOX)).astype(int)
    got = corrupt(image, "pixelate", strength, generator(), family).astype(int)
    assert np.max(np.abs(got - wanted)) <= 1  # Pillow rounds between rows and columns


@pytest.mark.parametrize(("family", "strength"), EVERY)
def test_noise_has_its_mean_and_variance(family, strength):
    image = np.full((400, 400, 3), 128, np.uint8)
    x, count = 128 / 255, image.size
    noisy = {
        name: corrupt(image, name, strength, generator(strength), family) / 255
        for name in ("gaussian_noise", "shot_noise", "impulse_noise")
    }
    (deviation,) = parameters("gaussian_noise", strength, family)
    z = generator(strength).normal(size=image.shape)
    np.testing.assert_allclose(noisy["gaussian_noise"], np.clip(x + deviation * z, 0, 1), atol=0.5 / 255 + 1e-9)
    (photons,) = parameters("shot_noise", strength, family)
    if photons >= 12:  # below, Poisson's upper tail is cut off at white
        sigma = np.sqrt(x / photons)
        assert abs(np.mean(noisy["shot_noise"]) - x) < 5 * sigma / np.sqrt(count) + 1e-3
        assert np.std(noisy["shot_noise"]) == pytest.approx(sigma, rel=0.02)
    else:
        photon_counts = np.unique(np.round(255 * np.minimum(np.arange(60) / photons, 1)))
        assert set(np.unique(np.round(255 * noisy["shot_noise"]))) <= set(photon_counts)
    (share,) = parameters("impulse_noise", strength, family)
    extreme = (noisy["impulse_noise"] == 0) | (noisy["impulse_noise"] == 1)
    assert (noisy["impulse_noise"][~extreme] == x).all()
    error = 5 * np.sqrt(share / count)
    assert abs(np.mean(extreme) - share) < error
    assert abs(np.mean(noisy["impulse_noise"] == 1) - share / 2) < error


def test_noise_is_a_function_of_its_seed():
    image = picture("cifar")
    first, again, other = (corrupt(image, "shot_noise", 5, generator(n), "cifar") for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
