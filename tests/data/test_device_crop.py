"""Crops on the device against torchvision's rule for boxes in NumPy and PIL's resize."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from hexa_jax.data.device_crop import random_box, random_resized_crop

run = jax.jit(random_resized_crop, static_argnames=("size", "scale", "ratio", "flip", "vertical_flip", "quarter_turns"))


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def uniform_of(n, seed=0):
    return jax.vmap(lambda key: jax.random.uniform(key, (23,), jnp.float32))(keys_of(n, seed))


def smooth_images(n, height, width, seed=0):
    """Coarse noise enlarged, plus a little fine noise: uint8 [n, height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 5, 6, 3), np.uint8)
    large = np.stack([Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in coarse])
    return np.clip(large + rng.integers(-20, 20, large.shape), 0, 255).astype(np.uint8)


def box_reference(u, height, width, scale, ratio):
    """torchvision's get_params, one image, float64; u holds 10 areas, 10 ratios and a place."""
    for area, shape in zip(u[:10], u[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    "height, width, scale, ratio",
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.9, 1.0), (1 / 2, 2.0)),  # often only a later try fits
        (20, 57, (0.3, 0.9), (3 / 4, 4 / 3)),  # often none does
        (57, 20, (0.8, 1.0), (3 / 4, 4 / 3)),
        (10, 11, (1.1, 1.2), (1 / 2, 2.0)),  # never: whole image
    ],
)
def test_boxes_follow_torchvision(height, width, scale, ratio):
    uniform = uniform_of(1000)
    boxes = np.stack(random_box(uniform, height, width, scale, ratio), axis=1)
    expected = [box_reference(u.tolist(), height, width, scale, ratio) for u in np.asarray(uniform)]
    np.testing.assert_array_equal(boxes, expected)


def test_statistics_of_boxes():
    top, left, h, w = (np.asarray(v) for v in random_box(uniform_of(5000), 200, 200, (0.05, 0.3), (3 / 4, 4 / 3)))
    area, log_ratio = h * w / 200**2, np.log(w / h)
    np.testing.assert_allclose([area.mean(), area.std()], [0.175, 0.25 / 12**0.5], atol=0.005)
    np.testing.assert_allclose([log_ratio.mean(), log_ratio.std()], [0, 2 * math.log(4 / 3) / 12**0.5], atol=0.01)
    for start, length in ((top, h), (left, w)):
        assert start.min() == 0 and (start + length).max() == 200
        place = start / (200 - length)
        np.testing.assert_allclose([place.mean(), place.std()], [0.5, 1 / 12**0.5], atol=0.02)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.07 and abs(np.corrcoef(area, log_ratio)[0, 1]) < 0.07


@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (48, 37, 32), (96, 128, 16), (20, 24, 64)])
def test_resize_equals_pil(height, width, size):
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    images = smooth_images(24, height, width)
    boxes = np.stack(random_box(uniform_of(24), height, width, scale, ratio), axis=1).astype(int)
    mirror = np.asarray(uniform_of(24))[:, -1] < 0.5
    assert 0 < mirror.sum() < 24
    actual = np.asarray(run(keys_of(24), images, size=size, scale=scale))
    assert actual.shape == (24, size, size, 3) and actual.dtype == np.float32
    for image, (top, left, h, w), flipped, out in zip(images, boxes, mirror, actual, strict=True):
        crop = Image.fromarray(image).crop((left, top, left + w, top + h))
        expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR), np.float32)
        np.testing.assert_allclose(out * 255, expected[:, ::-1] if flipped else expected, atol=1.1)


def test_whole_image_at_its_own_size_is_the_identity():
    images = smooth_images(16, 32, 32)
    whole = {"size": 32, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    x = images.astype(np.float32) / 255
    np.testing.assert_allclose(run(keys_of(16), images, **whole, flip=False), x, atol=1e-6)
    np.testing.assert_allclose(run(keys_of(16), x, **whole, flip=False), x, atol=1e-6)
    flipped = np.asarray(run(keys_of(16), images, **whole))
    mirrored = np.abs(flipped - x[:, :, ::-1]).max((1, 2, 3)) < 1e-5
    assert 0 < mirrored.sum() < 16
    np.testing.assert_allclose(flipped[~mirrored], x[~mirrored], atol=1e-6)


def test_flip_is_half_and_independent_of_the_box():
    ramp = np.tile(np.linspace(0, 1, 16, dtype=np.float32)[None, None, :, None], (4000, 16, 1, 1))
    out = np.asarray(run(keys_of(4000), ramp, size=4, scale=(0.2, 1.0)))[..., 0]
    mirrored = out[:, 0, 0] > out[:, 0, -1]
    assert abs(mirrored.mean() - 0.5) < 5 * (0.25 / 4000) ** 0.5
    assert abs(np.corrcoef(mirrored, out.mean((1, 2)))[0, 1]) < 5 / 4000**0.5


TURNED = {"vertical_flip": 0.5, "quarter_turns": True}


def test_crops_come_in_all_orientations():
    """The box stays, and flips and turns are the host's: mirrored, then upside down, then turned counter-clockwise."""
    n, box = 200, {"size": 8, "scale": (0.3, 1.0)}
    images = np.tile(smooth_images(1, 24, 24), (n, 1, 1, 1))
    upright = np.asarray(run(keys_of(n), images, **box))
    out = np.asarray(run(keys_of(n), images, **box, **TURNED, turn_keys=keys_of(n, 5)))
    u_vertical, u_turn = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys_of(n, 5))).T
    seen = set()
    for i in range(n):
        flipped, turns = bool(u_vertical[i] < 0.5), int(4 * u_turn[i])
        expected = np.rot90(upright[i, ::-1] if flipped else upright[i], turns)
        np.testing.assert_allclose(out[i], expected, atol=1e-6)
        seen.add((flipped, turns))
    assert len(seen) == 8
    alone = np.asarray(run(keys_of(n), images, **box, vertical_flip=0.5, turn_keys=keys_of(n, 5)))
    np.testing.assert_array_equal(alone[u_vertical >= 0.5], upright[u_vertical >= 0.5])
    np.testing.assert_allclose(alone[u_vertical < 0.5], upright[u_vertical < 0.5][:, ::-1], atol=1e-6)


def test_samples_never_leave_the_box():
    left_half = np.zeros((256, 16, 16, 1), np.float32)
    left_half[:, :, 8:] = 1
    box = {"scale": (0.1, 0.25), "ratio": (1.0, 1.0)}
    _, left, _, w = (np.asarray(v) for v in random_box(uniform_of(256), 16, 16, *box.values()))
    out = np.asarray(run(keys_of(256), left_half, size=32, **box, flip=False))
    black, white = left + w <= 8, left >= 8
    assert black.sum() > 20 and white.sum() > 20
    assert np.all(out[black] == 0) and np.all(out[white] > 1 - 1e-6) and out.max() <= 1


def test_a_row_depends_on_its_own_key_and_pixels_only_and_compiles_once():
    images, settings = smooth_images(16, 24, 24), {"size": 16, "scale": (0.2, 1.0)}
    full = np.asarray(run(keys_of(16), images, **settings))
    rows = np.random.default_rng(1).permutation(16)[:7]
    np.testing.assert_allclose(run(keys_of(16)[rows], images[rows], **settings), full[rows], atol=1e-6)
    before = run._cache_size()
    other = np.asarray(run(keys_of(16, seed=1), images, **settings))
    assert run._cache_size() == before
    assert np.all(np.abs(other - full).max((1, 2, 3)) > 1e-3)


def test_sharded_is_the_same_without_communication():
    images, settings = smooth_images(16, 24, 24), {"size": 16, "scale": (0.2, 1.0), **TURNED}
    expected = run(keys_of(16), images, **settings, turn_keys=keys_of(16, 1))
    rows = NamedSharding(jax.make_mesh((8,), ("data",), (AxisType.Auto,)), PartitionSpec("data"))
    arguments = jax.device_put(keys_of(16), rows), jax.device_put(images, rows)
    turn_keys = jax.device_put(keys_of(16, 1), rows)
    compiled = run.lower(*arguments, **settings, turn_keys=turn_keys).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    np.testing.assert_allclose(compiled(*arguments, turn_keys=turn_keys), expected, atol=1e-6)


def test_wrong_arguments_are_refused():
    images = smooth_images(2, 8, 8)
    for message, changed in {
        "typed threefry keys": {"keys": np.zeros(2, np.uint32)},
        "uint8 or float images": {"images": images.astype(np.int32)},
        "one key per image": {"keys": keys_of(3)},
        "size of a crop": {"size": 0},
        "scale of a crop": {"scale": (0.0, 1.0)},
        "ratio of a crop": {"ratio": (2.0, 1.0)},
        "need turn_keys": {"quarter_turns": True},
    }.items():
        with pytest.raises(ValueError, match=message):
            random_resized_crop(**({"keys": keys_of(2), "images": images, "size": 8, "scale": (0.2, 1.0)} | changed))
