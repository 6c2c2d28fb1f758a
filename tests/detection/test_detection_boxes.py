"""Boxes: area, overlap, clipping, encoding and suppression against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_reference import LARGEST_LOG_RATIO
from detection_reference import area as area_of
from detection_reference import clip as clip_loop
from detection_reference import decode as decode_loop
from detection_reference import encode as encode_loop
from detection_reference import iou as iou_loop
from detection_reference import nms as nms_loop

from hexa_jax.detection.boxes import area, clip, decode, encode, iou, nms

UNIT, HEAD = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)


def random_boxes(rng, count, side=60.0, smallest=0.0):
    """float64 [count, 4] with corners in [-10, side] and sides of at least `smallest`."""
    corners = np.sort(rng.uniform(-10, side, (count, 2, 2)), axis=1)
    corners[:, 1] += smallest
    return corners.reshape(count, 4)


def whole_boxes(rng, count, side=12):
    """The same with whole numbers: overlaps are often equal, and often exactly a half."""
    return np.round(random_boxes(rng, count, side, 1))


# ---- Area, overlap, clipping -------------------------------------------------------------------------------------------


def test_area_and_overlap(x64):
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 7), np.concatenate([random_boxes(rng, 8), whole_boxes(rng, 3)])
    second[2] = first[4]
    np.testing.assert_allclose(area(jnp.asarray(first)), [area_of(box) for box in first], rtol=1e-12)
    assert area(jnp.asarray(first.reshape(1, 7, 1, 4))).shape == (1, 7, 1)
    np.testing.assert_allclose(iou(jnp.asarray(first), jnp.asarray(second)), iou_loop(first, second), atol=1e-12)


def test_boxes_that_only_touch_do_not_overlap():
    boxes = np.array([[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8]], np.float32)
    np.testing.assert_array_equal(iou(jnp.asarray(boxes), jnp.asarray(boxes)), np.eye(4))


def test_an_empty_box_overlaps_nothing():
    boxes = jnp.array([[3.0, 3, 3, 3], [3, 3, 3, 8], [0, 0, 6, 6]])
    assert not np.any(
        np.asarray(iou(boxes, boxes))[:2] > 0
    )  # of two empty ones torchvision makes NaN, which is no overlap either


def test_float32_overlaps_of_large_boxes_are_good_to_a_millionth():
    boxes = random_boxes(np.random.default_rng(1), 20, 1333, 5).astype(np.float32)
    result = iou(jnp.asarray(boxes), jnp.asarray(boxes))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, iou_loop(boxes, boxes), atol=1e-6)


def test_clip():
    boxes = random_boxes(np.random.default_rng(2), 50)
    boxes[0] = [-9, -9, -1, -1]  # wholly outside: becomes empty
    clipped = clip(jnp.asarray(boxes, jnp.float32), jnp.array([30, 45]))
    assert clipped.dtype == jnp.float32
    np.testing.assert_allclose(clipped, clip_loop(boxes, 30, 45), rtol=1e-6)
    # Boxes that lie on the border stay as they are.
    whole = jnp.array([[0.0, 0, 45, 30]])
    np.testing.assert_array_equal(clip(whole, jnp.array([30, 45])), whole)


def test_each_image_of_a_batch_is_clipped_at_its_own_size():
    boxes = random_boxes(np.random.default_rng(3), 20).reshape(2, 10, 4)
    sizes = jnp.array([[20, 50], [40, 15]])
    clipped = jax.vmap(clip)(jnp.asarray(boxes), sizes)
    for image, (height, width) in enumerate([(20, 50), (40, 15)]):
        np.testing.assert_allclose(clipped[image], clip_loop(boxes[image], height, width), rtol=1e-6)


# ---- Encoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [UNIT, HEAD])
def test_encode_and_decode(x64, weights):
    rng = np.random.default_rng(4)
    boxes, references = random_boxes(rng, 30, smallest=1), random_boxes(rng, 30, smallest=1)
    offsets = encode(jnp.asarray(boxes), jnp.asarray(references), weights)
    np.testing.assert_allclose(offsets, encode_loop(boxes, references, weights), atol=1e-12)
    drawn = rng.normal(size=(30, 4)) * 3
    np.testing.assert_allclose(
        decode(jnp.asarray(drawn), jnp.asarray(references), weights),
        decode_loop(drawn, references, weights),
        rtol=1e-9,
        atol=1e-9,
    )
    # One undoes the other: boxes that are at most 62.5 times as large as their references come back.
    np.testing.assert_allclose(decode(offsets, jnp.asarray(references), weights), boxes, rtol=1e-9, atol=1e-9)


def test_encode_by_hand():
    # From the centre (5, 5) to (6, 2) in units of 10, and sizes 10 x 10 to 20 x 5.
    offsets = encode(jnp.array([[-4, -0.5, 16, 4.5]]), jnp.array([[0.0, 0, 10, 10]]), HEAD)
    np.testing.assert_allclose(offsets, [[1, -3, 5 * np.log(2), -5 * np.log(2)]], rtol=1e-6)


def test_encode_and_decode_take_leading_axes():
    rng = np.random.default_rng(5)
    boxes, references = (random_boxes(rng, 6, smallest=1).reshape(2, 3, 4) for _ in range(2))
    offsets = encode(jnp.asarray(boxes), jnp.asarray(references), HEAD)
    assert offsets.shape == (2, 3, 4)
    flat = encode_loop(boxes.reshape(6, 4), references.reshape(6, 4), HEAD)
    np.testing.assert_allclose(offsets.reshape(6, 4), flat, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decode(offsets, jnp.asarray(references), HEAD), boxes, atol=1e-3)


def test_a_box_grows_at_most_62_5_times(x64):
    reference = jnp.array([[10.0, 20, 20, 24]])
    (grown,) = np.asarray(decode(jnp.array([[0, 0, 50.0, 1000.0]]), reference, UNIT))
    np.testing.assert_allclose([grown[2] - grown[0], grown[3] - grown[1]], [625, 250])
    np.testing.assert_allclose([grown[2] + grown[0], grown[3] + grown[1]], [30, 44])  # the centre stays
    # The clamp is on what is left after the division by the weights, and only above.
    just_below = jnp.array([[0, 0, 5 * LARGEST_LOG_RATIO - 0.01, -1000.0]])
    (box,) = np.asarray(decode(just_below, reference, HEAD))
    np.testing.assert_allclose([box[2] - box[0], box[3] - box[1]], [625 * np.exp(-0.002), 0], atol=1e-9)


def test_decode_has_finite_gradients_where_it_clamps():
    gradient = jax.grad(lambda offsets: decode(offsets, jnp.array([[0.0, 0, 4, 4]]), UNIT).sum())(
        jnp.full((1, 4), 200.0)
    )
    assert np.isfinite(gradient).all()


# ---- Non-maximum suppression -------------------------------------------------------------------------------------------

suppress = jax.jit(nms, static_argnums=2)


def crowded_boxes(rng, count):
    """float32 [count, 4]: ten places, each with several boxes of every overlap."""
    places = random_boxes(rng, 10, 60, 20)[rng.integers(0, 10, count)]
    return (places + rng.normal(size=(count, 4)) * 3).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_equals_the_greedy_loop(threshold):
    rng = np.random.default_rng(6)
    counts = set()
    for _ in range(10):
        boxes = crowded_boxes(rng, 40)
        scores = rng.permutation(40).astype(np.float32) / 40
        keep = np.asarray(suppress(jnp.asarray(boxes), jnp.asarray(scores), threshold))
        assert keep.dtype == bool
        np.testing.assert_array_equal(keep, nms_loop(boxes, scores, threshold))
        counts.add(keep.sum())
    assert max(counts) < 40 and min(counts) > 2  # something is always removed, something stays


def test_nms_with_equal_scores_and_overlaps_at_the_threshold():
    rng = np.random.default_rng(7)
    exact = 0
    for _ in range(20):
        boxes, scores = whole_boxes(rng, 40), rng.integers(0, 4, 40) / 4
        exact += (iou_loop(boxes, boxes) == 0.5).sum()
        valid = rng.random(40) < 0.8
        keep = suppress(jnp.asarray(boxes, jnp.float32), jnp.asarray(scores, jnp.float32), 0.5, jnp.asarray(valid))
        np.testing.assert_array_equal(keep, nms_loop(boxes, scores, 0.5, valid))
    assert exact > 20  # such overlaps do occur


def test_what_is_suppressed_suppresses_nothing():
    # Each overlaps the next by 0.6, the one after that by 1/3.
    boxes = jnp.array([[0.0, 0, 8, 1], [2, 0, 10, 1], [4, 0, 12, 1], [6, 0, 14, 1]])
    assert list(suppress(boxes, jnp.array([0.9, 0.8, 0.7, 0.6]), 0.5)) == [True, False, True, False]
    assert list(suppress(boxes, jnp.array([0.6, 0.9, 0.7, 0.8]), 0.5)) == [False, True, False, True]


def test_of_equals_the_first_is_kept():
    boxes = jnp.tile(jnp.array([[0.0, 0, 8, 8]]), (5, 1))
    assert list(suppress(boxes, jnp.full(5, 0.5), 0.5)) == [True, False, False, False, False]
    assert list(suppress(boxes, jnp.array([0.1, 0.2, 0.3, 0.3, 0.2]), 0.5)) == [False, False, True, False, False]
    assert list(suppress(boxes, jnp.full(5, 0.5), 1.0)) == [True] * 5  # 1 is not more than 1


@pytest.mark.parametrize("score", [-1e9, -np.inf, np.inf, 2.0])
def test_invalid_boxes_neither_stay_nor_suppress(score):
    boxes = jnp.tile(jnp.array([[0.0, 0, 8, 8]]), (4, 1))
    scores = jnp.array([score, 0.5, 0.6, score], jnp.float32)
    valid = jnp.array([False, True, True, False])
    assert list(suppress(boxes, scores, 0.5, valid)) == [False, False, True, False]
    assert not np.any(suppress(boxes, scores, 0.5, jnp.zeros(4, bool)))


def test_valid_boxes_of_any_score_count():
    # Logits are scores too: below 0, and -inf where nothing else is left to order by.
    boxes = jnp.array([[0.0, 0, 8, 8], [0, 0, 8, 8], [20, 20, 28, 28]])
    assert list(suppress(boxes, jnp.array([-7.0, -3.0, -900.0]), 0.5, jnp.ones(3, bool))) == [False, True, True]
    assert list(suppress(boxes, jnp.array([0.0, 0.0, -jnp.inf]), 0.5, jnp.ones(3, bool))) == [True, False, True]


def test_empty_boxes_stay():
    boxes = jnp.array([[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 6, 6]])
    assert list(suppress(boxes, jnp.array([0.9, 0.8, 0.7]), 0.5)) == [True, True, True]


def test_nms_of_a_batch():
    rng = np.random.default_rng(8)
    boxes = np.stack([crowded_boxes(rng, 40) for _ in range(3)])
    scores = np.stack([rng.permutation(40) for _ in range(3)]).astype(np.float32)
    valid = rng.random((3, 40)) < 0.7
    batched = jax.jit(jax.vmap(lambda *image: nms(image[0], image[1], 0.5, image[2])))
    keep = batched(jnp.asarray(boxes), jnp.asarray(scores), jnp.asarray(valid))
    for image in range(3):
        np.testing.assert_array_equal(keep[image], nms_loop(boxes[image], scores[image], 0.5, valid[image]))
