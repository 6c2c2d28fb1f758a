"""RoIAlign against loops in float64, with its gradient, and the level that each region is read from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_reference import level as level_of
from detection_reference import pyramid_roi_align as pyramid_loop
from detection_reference import roi_align as roi_align_loop
from detection_reference import roi_align_weights

from hexa_jax.detection.roi_align import assign_levels, pyramid_roi_align, roi_align

SCALE = 0.25
compiled_align = jax.jit(roi_align, static_argnums=(2, 3, 4, 5))


def random_boxes(rng, count, low, high):
    return np.sort(rng.uniform(low, high, (count, 2, 2)), axis=1).reshape(count, 4)


def boxes_for(height, width):
    """Boxes [27, 4] in pixels, four a pixel of the map: ordinary, out of the image, tiny, empty, huge, at the borders."""
    rng = np.random.default_rng([height, width])
    right, bottom = width / SCALE, height / SCALE
    tiny = rng.uniform(-2, max(right, bottom), (6, 2))
    return np.concatenate(
        [
            random_boxes(rng, 6, 0, min(right, bottom)),
            random_boxes(rng, 6, -30, 60),
            np.concatenate([tiny, tiny + rng.uniform(0, 0.5, (6, 2))], axis=1),
            [
                [3, 3, 3, 3],  # empty
                [2, 5, 9, 5],  # empty in one direction
                [9, 9, 4, 2],  # turned round
                [-500, -400, 900, 800],  # most samples are outside
                [0, 0, right, bottom],  # the image
                [right - 0.1, bottom - 0.1, right, bottom],  # widened beyond the border
                [right, bottom, right, bottom],
                [-4, -4, 0, 0],  # up to one pixel of the map outside: clamped
                [right + 9, bottom + 9, right + 40, bottom + 30],  # wholly outside: nothing
            ],
        ]
    )


# ---- One map -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("height, width", [(6, 9), (5, 1)])
def test_roi_align_equals_the_loop(x64, height, width, aligned):
    features = np.random.default_rng(0).normal(size=(height, width, 3))
    boxes = boxes_for(height, width)
    result = compiled_align(jnp.asarray(features), jnp.asarray(boxes), SCALE, 7, 2, aligned)
    assert result.shape == (len(boxes), 7, 7, 3)
    np.testing.assert_allclose(result, roi_align_loop(features, boxes, SCALE, 7, 2, aligned), atol=1e-10)


@pytest.mark.parametrize("output_size, sampling_ratio", [(1, 2), (2, 3), (3, 1)])
def test_other_outputs_and_samples(x64, output_size, sampling_ratio):
    features = np.random.default_rng(1).normal(size=(6, 9, 2))
    boxes = boxes_for(6, 9)
    result = compiled_align(jnp.asarray(features), jnp.asarray(boxes), SCALE, output_size, sampling_ratio, False)
    np.testing.assert_allclose(result, roi_align_loop(features, boxes, SCALE, output_size, sampling_ratio), atol=1e-10)


def test_float32():
    features = np.random.default_rng(2).normal(size=(6, 9, 3)).astype(np.float32)
    boxes = random_boxes(np.random.default_rng(3), 20, -3, 30).astype(np.float32)
    result = compiled_align(jnp.asarray(features), jnp.asarray(boxes), SCALE, 7, 2, False)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, roi_align_loop(features, boxes, SCALE), atol=1e-5)


def test_defaults_are_those_of_the_detector():
    features = np.random.default_rng(4).normal(size=(6, 9, 2)).astype(np.float32)
    boxes = np.array([[2, 3, 17, 21]], np.float32)
    expected = roi_align_loop(features, boxes, SCALE, output_size=7, sampling_ratio=2, aligned=False)
    np.testing.assert_allclose(roi_align(jnp.asarray(features), jnp.asarray(boxes), SCALE), expected, atol=1e-5)


RAMP = np.arange(4.0)[:, None] * 10 + np.arange(4.0)  # 10 y + x


@pytest.mark.parametrize(
    "box, aligned, expected",
    [
        ((0, 0, 2, 2), False, 11.0),  # samples at 0.5 and 1.5: the value at (1, 1)
        ((1, 1, 3, 3), True, 16.5),  # half a pixel less
        ((1, 1, 1, 1), False, 16.5),  # made one pixel large, from (1, 1)
        ((1, 1, 1, 1), True, 5.5),  # not made larger: the value at (0.5, 0.5)
        ((0, -1.5, 2, 0.5), False, 1.0),  # y at -1 and 0: -1 still counts, as row 0
        ((0, -1.6, 2, 0.4), False, 0.5),  # y at -1.1 gives 0, and is counted
        ((0, 2.5, 2, 4.5), False, 31.0),  # y at 3 and 4 = H: still counts, as row 3
        ((0, 2.6, 2, 4.6), False, 15.5),
        ((-1.5, 0, 0.5, 2), False, 10.0),  # the same in x
        ((-1.6, 0, 0.4, 2), False, 5.0),
        ((2.5, 0, 4.5, 2), False, 13.0),
        ((2.6, 0, 4.6, 2), False, 6.5),
    ],
)
def test_borders_by_hand(x64, box, aligned, expected):
    pooled = compiled_align(jnp.asarray(RAMP[..., None]), jnp.array([box]), 1.0, 1, 2, aligned)
    np.testing.assert_allclose(pooled.item(), expected, atol=1e-9)


def test_a_constant_map_gives_the_constant_inside_and_nothing_outside():
    features = jnp.full((6, 9, 1), 3.0)
    pooled = compiled_align(features, jnp.array([[0.0, 0, 36, 24], [60, 60, 90, 90]]), SCALE, 7, 2, False)
    np.testing.assert_allclose(pooled[0], 3, rtol=1e-6)
    np.testing.assert_array_equal(pooled[1], 0)


# ---- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [False, True])
def test_the_gradient_is_the_transpose(x64, aligned):
    rng = np.random.default_rng(5)
    features, boxes = rng.normal(size=(6, 9, 2)), boxes_for(6, 9)
    cotangent = rng.normal(size=(len(boxes), 7, 7, 2))

    @jax.jit
    def pulled_back(features):
        return jax.vjp(lambda x: roi_align(x, jnp.asarray(boxes), SCALE, 7, 2, aligned), features)[1](
            jnp.asarray(cotangent)
        )[0]

    expected = np.einsum("rijhw,rijc->hwc", roi_align_weights((6, 9), boxes, SCALE, 7, 2, aligned), cotangent)
    np.testing.assert_allclose(pulled_back(jnp.asarray(features)), expected, atol=1e-9)


# ---- A pyramid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, expected",
    [(0, 0), (0.01, 0), (56, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (447.9, 2), (448, 3), (900, 3), (4000, 3)],
)
def test_levels_of_squares(side, expected):
    assert list(assign_levels(jnp.array([[5.0, 7.0, 5 + side, 7 + side]]))) == [expected]


def test_levels_depend_on_the_area_alone(x64):
    rng = np.random.default_rng(6)
    boxes = random_boxes(rng, 200, 0, 1000)
    levels = assign_levels(jnp.asarray(boxes))
    assert levels.dtype == jnp.int32
    np.testing.assert_array_equal(levels, [level_of(box) for box in boxes])
    assert set(np.asarray(levels).tolist()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(assign_levels(jnp.array([[0.0, 0, 112, 448], [0, 0, 448, 112]])), [2, 2])
    # A millionth is forgiven, ten are not.
    sides = 224 * (1 - np.array([1e-7, 1e-5]))
    np.testing.assert_array_equal(assign_levels(jnp.asarray([[0, 0, side, side] for side in sides])), [2, 1])


def test_levels_of_other_pyramids():
    boxes = jnp.array([[0.0, 0, side, side] for side in (50, 112, 224, 448, 896, 1792)])
    np.testing.assert_array_equal(assign_levels(boxes, 3, 2), [0, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(assign_levels(boxes, 4, 3), [0, 0, 1, 2, 3, 3])


SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


@functools.cache
def pyramid_case():
    """Maps of an image of 96 x 160 pixels, and boxes of all levels (some larger than the image)."""
    rng = np.random.default_rng(7)
    pyramid = [rng.normal(size=(96 // stride, 160 // stride, 2)) for stride in (4, 8, 16, 32)]
    boxes = np.concatenate(
        [random_boxes(rng, 6, 0, 96), random_boxes(rng, 12, -300, 500), [[3, 3, 3, 3], [10, 10, 122, 122]]]
    )
    assert {level_of(box) for box in boxes} == {0, 1, 2, 3}
    return pyramid, boxes


compiled_pyramid = jax.jit(pyramid_roi_align, static_argnums=(2, 3, 4))


def test_each_region_is_read_from_its_level(x64):
    pyramid, boxes = pyramid_case()
    result = compiled_pyramid([jnp.asarray(features) for features in pyramid], jnp.asarray(boxes), SCALES, 7, 2)
    assert result.shape == (len(boxes), 7, 7, 2)
    np.testing.assert_allclose(result, pyramid_loop(pyramid, boxes, SCALES), atol=1e-10)


def test_the_gradient_reaches_the_level_of_each_region(x64):
    pyramid, boxes = pyramid_case()
    cotangent = np.random.default_rng(8).normal(size=(len(boxes), 2, 2, 2))

    @jax.jit
    def pulled_back(pyramid):
        return jax.vjp(lambda maps: pyramid_roi_align(maps, jnp.asarray(boxes), SCALES, 2, 2), pyramid)[1](
            jnp.asarray(cotangent)
        )[0]

    levels = np.array([level_of(box) for box in boxes])
    for number, gradient in enumerate(pulled_back([jnp.asarray(features) for features in pyramid])):
        mine = levels == number
        weights = roi_align_weights(gradient.shape[:2], boxes[mine], SCALES[number], 2, 2)
        np.testing.assert_allclose(gradient, np.einsum("rijhw,rijc->hwc", weights, cotangent[mine]), atol=1e-9)


def test_images_of_a_batch():
    rng = np.random.default_rng(9)
    pyramid = [rng.normal(size=(2, 64 // stride, 64 // stride, 2)).astype(np.float32) for stride in (4, 8, 16, 32)]
    boxes = np.stack([random_boxes(rng, 5, -100, 300) for _ in range(2)]).astype(np.float32)
    batched = jax.jit(jax.vmap(lambda maps, rows: pyramid_roi_align(maps, rows, SCALES, 3, 2)))
    result = batched([jnp.asarray(features) for features in pyramid], jnp.asarray(boxes))
    for image in range(2):
        expected = pyramid_loop([features[image] for features in pyramid], boxes[image], SCALES, 3)
        np.testing.assert_allclose(result[image], expected, atol=2e-4)
