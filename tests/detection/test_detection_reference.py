"""The references of the detection tests, against numbers counted by hand."""

import math

import detection_reference as reference
import numpy as np
import pytest

# Two boxes of 10 x 10 that share 5 x 10; an empty one.
LEFT, RIGHT, EMPTY = (0, 0, 10, 10), (5, 0, 15, 10), (3, 3, 3, 9)


def test_overlap_nms_and_match_by_hand():
    np.testing.assert_allclose(reference.iou([LEFT, RIGHT], [LEFT, RIGHT, EMPTY]), [[1, 1 / 3, 0], [1 / 3, 1, 0]])
    boxes, scores = [LEFT, RIGHT, LEFT, EMPTY, EMPTY], [0.5, 0.9, 0.5, 0.1, 0.1]
    assert list(reference.nms(boxes, scores, 0.4)) == [True, True, False, True, True]
    assert list(reference.nms(boxes, scores, 0.3)) == [False, True, False, True, True]
    assert list(reference.nms(boxes, scores, 0.3, [True, False, True, True, False])) == [
        True,
        False,
        False,
        True,
        False,
    ]
    overlaps = [[0.1, 0.1, 0.05, 0.0, 0.7, 0.3], [0.0, 0.65, 0.2, 0.0, 0.1, 0.0]]
    assert list(reference.match(overlaps, 0.7, 0.3, False)) == [-1, -2, -1, -1, 0, -2]
    assert list(reference.match(overlaps, 0.7, 0.3, True)) == [-1, 1, -1, -1, 0, -2]


def test_encoding_by_hand():
    # From the centre (5, 5) to (6, 2) in units of 10, and sizes 10 x 10 to 20 x 5.
    offsets = reference.encode([(-4, -0.5, 16, 4.5)], [LEFT], (1, 1, 1, 1))
    np.testing.assert_allclose(offsets, [[0.1, -0.3, math.log(2), -math.log(2)]])
    np.testing.assert_allclose(
        reference.decode(10 * offsets, [LEFT], (10, 10, 10, 10)), [(-4, -0.5, 16, 4.5)], atol=1e-14
    )
    np.testing.assert_allclose(
        reference.decode([[0, 0, 99, -99]], [LEFT], (1, 1, 1, 1)), [(-307.5, 5, 317.5, 5)], atol=1e-9
    )


def test_sizes_of_torchvision():
    sizes = {(375, 500): (800, 1066), (500, 334): (1197, 799), (281, 500): (749, 1333), (100, 298): (447, 1332)}
    assert {size: reference.content_size(*size) for size in sizes} == sizes
    assert reference.content_size(97, 97) == (799, 799) and reference.content_size(99, 99) == (800, 800)


def test_roi_align_by_hand():
    ramp = np.arange(4.0)[:, None] * 10 + np.arange(4.0)
    pooled = reference.roi_align(ramp[..., None], [(0, 0, 2, 2)], 1.0, 1)
    np.testing.assert_allclose(pooled, np.full((1, 1, 1, 1), 11.0))  # the samples at 0.5 and 1.5 average to (1, 1)
    np.testing.assert_allclose(reference.roi_align(ramp[..., None], [(1, 1, 3, 3)], 1.0, 1, aligned=True).item(), 16.5)
    # Samples in y at 3.5 (clamped to the last row) and 4.5 (outside): half of what the last row has at x = 1.
    np.testing.assert_allclose(reference.roi_align(ramp[..., None], [(0, 3, 2, 5)], 1.0, 1).item(), 31 / 2)


def test_smooth_l1_by_hand():
    assert reference.smooth_l1([1 / 18, -1 / 9, 1.0]) == pytest.approx((1 / 18) ** 2 * 4.5 + 1 / 18 + 1 - 1 / 18)


def found(places, count=4, difficult=()):
    """Boxes at 100, 200, ... and detections, in falling order of score, at places: `count` boxes in one image."""
    truth = [(100 * place, 0, 100 * place + 10, 10) for place in range(count)]
    boxes = [(100 * place, 0, 100 * place + 10, 10) for place in places]
    scores = [1 - rank / 100 for rank in range(len(places))]
    return [(truth, [place in difficult for place in range(count)])], [(boxes, scores)]


def test_average_precision_by_hand():
    # Hit, miss, hit, repeated, hit: precision 1, 1/2, 2/3, 2/4, 3/5 at recall 1/4, 1/4, 2/4, 2/4, 3/4.
    case = found([0, 99, 1, 1, 2])
    assert reference.voc_ap(*case) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert reference.voc_ap(*case, eleven_point=True) == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5) / 11)
    assert reference.coco_ap(*case, 0.5) == pytest.approx((26 * 1 + 25 * 2 / 3 + 25 * 3 / 5) / 101)
    # The second of three is difficult: hit, ignored, ignored again, hit. COCO's crowd is the same here.
    case = found([0, 1, 1, 2], 3, difficult=[1])
    assert reference.voc_ap(*case) == reference.coco_ap(*case, 0.5) == 1
    assert reference.coco_ap(*case, 0.5, crowd=False) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert math.isnan(reference.voc_ap(*found([0], 1, [0]))) and math.isnan(reference.coco_ap(*found([0], 1, [0]), 0.5))


def test_a_second_best_box_is_coco_s_alone():
    # Both detections overlap the left box most; VOC has no second choice, COCO gives the second detection the other box.
    truths = [([LEFT, (3, 0, 13, 10)], [False, False])]
    detections = [([(0, 0, 10, 10), (1, 0, 11, 10)], [0.9, 0.8])]
    assert reference.voc_ap(truths, detections) == 0.5
    assert reference.coco_ap(truths, detections, 0.5) == 1
