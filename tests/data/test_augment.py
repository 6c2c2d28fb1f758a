"""Photometric augmentation against float64 NumPy formulas, and its promises about keys, devices and compilation."""

import colorsys
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hexa_jax.data.augment import DRAWS, JITTER, Photometric, augment

OFF = Photometric(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
SWAV = Photometric(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 1.5, "hue": 0.5}

run = jax.jit(augment, static_argnums=2)


def only(**settings):
    return dataclasses.replace(OFF, **settings)


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def images_of(n, height=8, width=8, seed=0):
    """Random colours, with some exactly grey, black, white and two-equal-channel pixels."""
    x = np.random.default_rng(seed).random((n, height, width, 3)).astype(np.float32)
    x[:, 0, 0], x[:, 0, 1], x[:, 0, 2], x[:, 0, 3] = 0, 1, 0.5, [0.7, 0.7, 0.2]
    return x


def draws_of(n, seed=0):
    rows = jax.vmap(lambda key: jax.random.uniform(key, (len(DRAWS),), np.float32))(keys_of(n, seed))
    return [dict(zip(DRAWS, row.tolist(), strict=True)) for row in np.asarray(rows)]


def order_of(u):
    return tuple(sorted(JITTER, key=lambda name: u[f"{name}_turn"]))


def grey_of(image):
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


def jitter_reference(image, name, u, strength):
    if name == "hue":
        shift = strength * (2 * u - 1)

        def rotate(pixel):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

        return np.apply_along_axis(rotate, -1, image)
    factor = max(0, 1 - strength) + (1 + strength - max(0, 1 - strength)) * u
    grey = grey_of(image)
    other = {"brightness": 0, "contrast": grey.mean(), "saturation": grey}[name]
    return np.clip(factor * image + (1 - factor) * other, 0, 1)


def blur_reference(image, sigma, radius):
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (0, 1):
        padding = [(0, 0)] * 3
        padding[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(image, padding, mode="edge"), axis, 0)
        shifted = [padded[start : start + image.shape[axis]] for start in range(2 * radius + 1)]
        image = np.moveaxis(np.tensordot(weights, shifted, 1), 0, axis)
    return image


def reference(image, u, settings, order=None):
    image = image.astype(np.float64)
    if u["jitter"] < settings.jitter_probability:
        for name in order or order_of(u):
            image = jitter_reference(image, name, u[name], getattr(settings, name))
    if u["gray"] < settings.gray_probability:
        image = np.repeat(grey_of(image), 3, axis=-1)
    if u["blur"] < settings.blur_probability:
        low, high = settings.blur_sigma
        image = blur_reference(image, low + (high - low) * u["sigma"], math.ceil(4 * high))
    if u["solarize"] < settings.solarize_probability:
        image = np.where(image < settings.solarize_threshold, image, 1 - image)
    return image


CASES = {
    **{name: only(jitter_probability=1.0, **{name: STRONG[name]}) for name in JITTER},
    "without hue": only(jitter_probability=1.0, brightness=0.8, contrast=0.8, saturation=1.5),
    "without contrast": only(jitter_probability=1.0, brightness=0.8, hue=0.5, saturation=1.5),
    "without brightness": only(jitter_probability=0.7, contrast=0.8, hue=0.5, saturation=1.5),
    "gray": only(gray_probability=1.0),
    "blur": only(blur_probability=1.0),
    "wide blur": only(blur_probability=0.7, blur_sigma=(3.0, 9.0)),
    "solarize": only(solarize_probability=1.0, solarize_threshold=0.4),
    "moco": Photometric(),
    "swav": SWAV,
    "all": Photometric(1.0, *STRONG.values(), solarize_probability=0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formulas_in_float64(case, x64):
    settings, x = CASES[case], images_of(24, 6, 11)
    expected = [reference(image, u, settings) for image, u in zip(x, draws_of(24), strict=True)]
    actual = run(keys_of(24), jnp.asarray(x, jnp.float64), settings)
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert np.abs(np.asarray(actual) - x).max() > 0.05


@pytest.mark.parametrize("height, sigma", [(129, (0.1, 2.0)), (250, (0.1, 2.0)), (250, (3.0, 7.3)), (250, (3.0, 9.0))])
def test_large_images_are_blurred_in_bands(height, sigma, x64):
    settings, x = only(blur_probability=1.0, blur_sigma=sigma), images_of(2, height, 20)
    expected = [reference(image, u, settings) for image, u in zip(x, draws_of(2), strict=True)]
    np.testing.assert_allclose(run(keys_of(2), jnp.asarray(x, jnp.float64), settings), expected, atol=1e-12)


@pytest.mark.parametrize("settings", [Photometric(), SWAV], ids=["moco", "swav"])
def test_float32_draws_the_same_and_stays_in_range(settings):
    x = images_of(64)
    expected = [reference(image, u, settings) for image, u in zip(x, draws_of(64), strict=True)]
    actual = np.asarray(run(keys_of(64), x, settings))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert actual.min() >= 0 and actual.max() <= 1


def test_jitter_comes_in_all_24_orders(x64):
    settings, n = dataclasses.replace(only(**STRONG), jitter_probability=1.0), 256
    x, draws = images_of(n, 4, 4), draws_of(n)
    orders = [order_of(u) for u in draws]
    counts = {order: orders.count(order) for order in set(orders)}
    assert len(counts) == 24 and max(counts.values()) < n / 24 + 5 * (n / 24) ** 0.5
    actual = np.asarray(run(keys_of(n), jnp.asarray(x, jnp.float64), settings))
    in_order = np.array([reference(image, u, settings) for image, u in zip(x, draws, strict=True)])
    np.testing.assert_allclose(actual, in_order, atol=1e-12)
    reverse = [reference(image, u, settings, order_of(u)[::-1]) for image, u in zip(x, draws, strict=True)]
    assert np.mean(np.abs(actual - reverse).max((1, 2, 3)) > 1e-3) > 0.9  # so the order is seen


def test_probabilities_are_right_and_independent():
    n, x = 4000, images_of(4000, 4, 4)
    names = ("jitter", "gray", "blur", "solarize")
    probabilities = {"jitter": 0.8, "gray": 0.2, "blur": 0.5, "solarize": 0.3}
    happened = {}
    for name in names:
        strengths = STRONG if name == "jitter" else {}
        settings = only(**strengths, **{f"{name}_probability": probabilities[name]})
        out = np.asarray(run(keys_of(n), x, settings))
        happened[name] = np.any(out != x, axis=(1, 2, 3))  # an image that is spared is spared bit for bit
    for name in names:
        p = probabilities[name]
        assert abs(happened[name].mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    correlation = np.corrcoef([happened[name] for name in names]) - np.eye(4)
    assert np.abs(correlation).max() < 5 / n**0.5


def test_brightness_factor_is_uniform():
    x = np.full((4000, 1, 1, 3), 0.25, np.float32)
    factor = np.asarray(run(keys_of(4000), x, only(jitter_probability=1.0, brightness=0.4)))[:, 0, 0, 0] / 0.25
    empirical = np.searchsorted(np.sort(factor), [0.6, 0.7, 0.8, 1.0, 1.2, 1.4]) / 4000
    np.testing.assert_allclose(empirical, [0, 0.125, 0.25, 0.5, 0.75, 1], atol=5 * (0.25 / 4000) ** 0.5)


def test_settings_of_one_operation_leave_the_draws_of_others():
    base, blurred = (run(keys_of(32), images_of(32), dataclasses.replace(SWAV, blur_probability=p)) for p in (0.0, 0.5))
    same = np.abs(base - blurred).max((1, 2, 3)) < 1e-5
    assert 8 < same.sum() < 24


def test_a_row_depends_on_its_own_key_and_pixels_only():
    x, settings = images_of(32), SWAV
    full = np.asarray(run(keys_of(32), x, settings))
    rows = np.random.default_rng(1).permutation(32)[:11]
    np.testing.assert_allclose(run(keys_of(32)[rows], x[rows], settings), full[rows], atol=1e-5)
    other = np.asarray(run(keys_of(32, seed=1), x, settings))
    assert np.all(np.abs(other - full).max((1, 2, 3)) > 1e-3)
    crops = jax.jit(jax.vmap(lambda keys, x: augment(keys, x, settings), in_axes=1, out_axes=1))  # crops on axis 1
    views = crops(keys_of(32).reshape(16, 2), x.reshape(16, 2, 8, 8, 3))
    np.testing.assert_allclose(views.reshape(x.shape), full, atol=1e-5)


def test_sharded_is_the_same_without_communication():
    x = images_of(32)
    expected = run(keys_of(32), x, SWAV)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    compiled = run.lower(jax.device_put(keys_of(32), rows), jax.device_put(x, rows), SWAV).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    actual = compiled(jax.device_put(keys_of(32), rows), jax.device_put(x, rows))
    assert actual.sharding.is_equivalent_to(rows, 4)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_compiles_once():
    traces = []

    @jax.jit
    def step(keys, x):
        traces.append(1)
        return augment(keys, x, Photometric())

    for seed in range(3):
        step(keys_of(4, seed), images_of(4, seed=seed))
    assert len(traces) == 1


def test_switched_off_operations_are_not_in_the_program():
    def program(settings):
        return str(jax.make_jaxpr(lambda keys, x: augment(keys, x, settings))(keys_of(2), images_of(2)))

    everything = program(Photometric(solarize_probability=0.5))
    assert "dot_general" in everything and "reduce_sum" in everything and "floor" in everything
    assert "dot_general" not in program(dataclasses.replace(SWAV, blur_probability=0.0))
    assert "floor" not in program(only(jitter_probability=0.8, **STRONG | {"hue": 0.0}))
    assert "reduce_sum" not in program(only(jitter_probability=0.8, **STRONG | {"contrast": 0.0}))
    assert program(only(**STRONG)) == program(OFF)
    np.testing.assert_array_equal(run(keys_of(2), images_of(2), OFF), images_of(2))


@pytest.mark.parametrize(
    "setting",
    [
        {"jitter_probability": 1.2},
        {"gray_probability": -0.1},
        {"blur_probability": float("nan")},
        {"solarize_probability": 2},
        {"brightness": -0.4},
        {"contrast": float("inf")},
        {"saturation": float("nan")},
        {"hue": 0.6},
        {"solarize_threshold": 128},
        {"blur_sigma": (0.0, 2.0)},
        {"blur_sigma": (2.0, 1.0)},
        {"blur_sigma": (1.0, float("nan"))},
        {"blur_sigma": (1.0,)},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"Photometric.{next(iter(setting))} must be"):
        Photometric(**setting)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"float32 or float64 images \[N, H, W, 3\].* got uint8"):
        augment(keys_of(2), np.zeros((2, 4, 4, 3), np.uint8), OFF)
    with pytest.raises(ValueError, match=r"got float32 \[2, 4, 4\]"):
        augment(keys_of(2), np.zeros((2, 4, 4), np.float32), OFF)
    with pytest.raises(ValueError, match="one key per image"):
        augment(keys_of(3), images_of(2), OFF)
    with pytest.raises(ValueError, match="typed threefry keys"):
        augment(np.zeros(2, np.uint32), images_of(2), OFF)
    with pytest.raises(ValueError, match="typed threefry keys"):  # vmapped, it would draw from the first key only
        augment(jax.random.split(jax.random.key(0, impl="rbg"), 2), images_of(2), OFF)
    assert hash(Photometric(blur_sigma=[0.1, 2.0])) == hash(Photometric())
