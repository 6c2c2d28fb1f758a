"""Anchors: numbers that torchvision gives, and loops for every place of the maps."""

import numpy as np
import pytest
from detection_reference import base_anchors as base_loop
from detection_reference import grid_anchors as grid_loop

from hexa_jax.detection.anchors import base_anchors, grid_anchors, pyramid_anchors

SIZES = (32, 64, 128, 256, 512)


def test_base_anchors_of_torchvision():
    np.testing.assert_array_equal(base_anchors(32), [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]])
    np.testing.assert_array_equal(
        base_anchors(512), [[-362, -181, 362, 181], [-256, -256, 256, 256], [-181, -362, 181, 362]]
    )


@pytest.mark.parametrize("size, half", [(3, 2), (5, 2), (7, 4), (9, 4)])
def test_halves_are_rounded_to_even(size, half):
    np.testing.assert_array_equal(base_anchors(size, (1.0,)), [[-half, -half, half, half]])


@pytest.mark.parametrize("ratios", [(0.5, 1.0, 2.0), (0.25, 1 / 3, 1.0, 4.0), (1.0,)])
@pytest.mark.parametrize("size", [*SIZES, 9, 16.5])
def test_base_anchors_equal_the_formula(size, ratios):
    result = base_anchors(size, ratios)
    assert isinstance(result, np.ndarray) and result.dtype == np.float32
    np.testing.assert_array_equal(result, base_loop(size, ratios))


def test_a_ratio_is_height_over_width():
    wide, square, high = base_anchors(64)
    assert wide[2] > square[2] > high[2] and wide[3] < square[3] < high[3]


@pytest.mark.parametrize(
    "image, feature, size",
    [((32, 64), (4, 8), 32), ((96, 160), (3, 5), 64), ((96, 160), (2, 3), 512), ((50, 41), (7, 6), 9)],
)
def test_grid_anchors_equal_the_loop(image, feature, size):
    result = grid_anchors(image, feature, size, (0.5, 1.0, 2.0))
    assert isinstance(result, np.ndarray) and result.dtype == np.float32
    assert result.shape == (feature[0] * feature[1] * 3, 4)
    np.testing.assert_array_equal(result, grid_loop(image, feature, size))


def test_order_is_rows_columns_ratios_and_strides_are_whole():
    anchors = grid_anchors((96, 160), (2, 3), 32, (0.5, 1.0, 2.0)).reshape(2, 3, 3, 4)
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    np.testing.assert_array_equal(
        centres[..., 0], np.broadcast_to(np.array([0, 53, 106])[None, :, None], (2, 3, 3))
    )  # 160 // 3
    np.testing.assert_array_equal(centres[..., 1], np.broadcast_to(np.array([0, 48])[:, None, None], (2, 3, 3)))
    np.testing.assert_array_equal(anchors[1, 2] - (106, 48, 106, 48), base_anchors(32))


def test_pyramid_anchors_are_one_size_a_level():
    # 96 x 160 pixels: the fifth map is every second pixel of a map of 3 x 5, and its strides are not 64.
    features = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    levels = pyramid_anchors((96, 160), features)
    assert len(levels) == 5
    for anchors, feature, size in zip(levels, features, SIZES, strict=True):
        assert anchors.dtype == np.float32
        np.testing.assert_array_equal(anchors, grid_loop((96, 160), feature, size))


def test_other_sizes_and_ratios():
    levels = pyramid_anchors((64, 64), [(8, 8), (4, 4)], (8, 24), (1.0, 3.0))
    assert [len(anchors) for anchors in levels] == [128, 32]
    np.testing.assert_array_equal(levels[1], grid_loop((64, 64), (4, 4), 24, (1.0, 3.0)))


def test_anchors_may_reach_out_of_the_image():
    anchors = grid_anchors((64, 64), (2, 2), 128, (1.0,))
    assert anchors.min() == -64 and anchors.max() == 32 + 64
