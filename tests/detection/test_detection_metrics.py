"""Average precision on cases worked by hand, and COCO's against a small implementation of its own."""

import math

import numpy as np
import pytest

from hexa_jax.detection.metrics import Detections, Truth, coco_metrics, voc_metrics

NAMES = ["ant", "bee", "cow"]
A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)  # three boxes that do not touch
FAR = (80, 80, 90, 90)


def truth(*objects):
    """Objects (box, label) or (box, label, difficult)."""
    rows = [(*thing, False)[:3] for thing in objects]
    return Truth(
        np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[1] for row in rows], np.int32),
        np.array([row[2] for row in rows], bool),
    )


def found(*rows):
    """Detections (box, label, score)."""
    return Detections(
        np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        np.array([row[2] for row in rows], np.float32),
        np.array([row[1] for row in rows], np.int32),
    )


def all_ap(truths, detections, label=0):
    """AP of a class: COCO's AP50, and VOC's two, in per cent; other classes have no objects."""
    coco = coco_metrics(truths, detections, NAMES)
    name = NAMES[label]
    values = [
        voc_metrics(truths, detections, NAMES, eleven_point)[f"VOC_AP50_{name}"] for eleven_point in (False, True)
    ]
    assert [math.isnan(coco[f"AP_{other}"]) for other in NAMES] == [other != name for other in NAMES]
    return [coco["AP50"], *values]


def sampled(steps, points):
    """Mean of a step function of recall at 0, 1 / points, ... 1: steps (recall, precision) hold up to that recall, then 0."""
    values = [next((precision for recall, precision in steps if k / points <= recall), 0) for k in range(points + 1)]
    return 100 * sum(values) / (points + 1)


def by_hand(*steps):
    """The three areas under precision over recall, given as steps (recall, precision) up to which it holds."""
    area, before = 0.0, 0.0
    for recall, precision in steps:
        area, before = area + 100 * (recall - before) * precision, recall
    return pytest.approx([sampled(steps, 100), area, sampled(steps, 10)], abs=1e-4)


def test_areas_by_hand():
    """Precision 1 up to recall 1 / 2: 51 of COCO's 101 points, half of the area, 6 of 11 points."""
    assert by_hand((0.5, 1)) == [100 * 51 / 101, 50, 100 * 6 / 11]


# Two objects of class 0 in image 0, unless said otherwise.
CASES = {
    # Both found, nothing else.
    "perfect": (truth((A, 0), (B, 0)), found((A, 0, 0.9), (B, 0, 0.8)), ((1, 1),)),
    # Recall ends at 1/2, with precision 1.
    "one missed": (truth((A, 0), (B, 0)), found((A, 0, 0.9)), ((0.5, 1),)),
    # Right, wrong (A is taken), right: precision 1 up to 1/2, then 2/3.
    "found twice": (truth((A, 0), (B, 0)), found((A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7)), ((0.5, 1), (1, 2 / 3))),
    # Wrong, right, right: precisions 0, 1/2, 2/3; made to fall, 2/3 everywhere.
    "a false one first": (truth((A, 0), (B, 0)), found((FAR, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7)), ((1, 2 / 3),)),
    # What comes after the last object costs nothing.
    "a false one last": (truth((A, 0), (B, 0)), found((A, 0, 0.9), (B, 0, 0.8), (FAR, 0, 0.7)), ((1, 1),)),
    # B is found as another class, which has no objects of its own.
    "another class": (truth((A, 0), (B, 0)), found((A, 0, 0.9), (B, 1, 0.8)), ((0.5, 1),)),
    "none found": (truth((A, 0), (B, 0)), found(), ((1, 0),)),
    "all of another class": (truth((A, 0), (B, 0)), found((A, 2, 0.9)), ((1, 0),)),
    # C is difficult: it is no object, and who finds it is neither right nor wrong.
    "difficult found": (truth((A, 0), (B, 0), (C, 0, True)), found((C, 0, 1.0), (A, 0, 0.9), (B, 0, 0.8)), ((1, 1),)),
    "difficult missed": (truth((A, 0), (B, 0), (C, 0, True)), found((A, 0, 0.9), (B, 0, 0.8)), ((1, 1),)),
    "a difficult one of another class": (
        truth((A, 0), (B, 0), (C, 1, True)), found((C, 0, 1.0), (A, 0, 0.9), (B, 0, 0.8)), ((1, 2 / 3),),
    ),
    # Equal scores: the rows' order counts. Wrong, right, right; then right, right, wrong.
    "ties, wrong first": (truth((A, 0), (B, 0)), found((FAR, 0, 0.5), (A, 0, 0.5), (B, 0, 0.5)), ((1, 2 / 3),)),
    "ties, wrong last": (truth((A, 0), (B, 0)), found((A, 0, 0.5), (B, 0, 0.5), (FAR, 0, 0.5)), ((1, 1),)),
    # Scores come in any order.
    "shuffled": (truth((A, 0), (B, 0)), found((B, 0, 0.7), (FAR, 0, 0.8), (A, 0, 0.9)), ((0.5, 1), (1, 2 / 3))),
    # Intersection 50 of a union of 100: exactly the overlap asked for. 49.9 of 100.1 is too little.
    "half covered": (truth((A, 0)), found(((0, 0, 10, 5), 0, 0.9)), ((1, 1),)),
    "less than half": (truth((A, 0)), found(((0, 0, 10, 4.99), 0, 0.9)), ((1, 0),)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_cases_worked_by_hand(case):
    objects, rows, steps = CASES[case]
    assert all_ap([objects], [rows]) == by_hand(*steps)
    # In another image and class, among images without anything: the same.
    moved = Truth(objects.boxes, (objects.labels + 1) % 3, objects.difficult)
    shifted = Detections(rows.boxes, rows.scores, (rows.labels + 1) % 3)
    assert all_ap([truth(), moved, truth()], [found(), shifted, found()], 1) == by_hand(*steps)


def test_an_object_is_only_found_in_its_image():
    assert all_ap([truth((A, 0)), truth((B, 0))], [found((B, 0, 0.9)), found((B, 0, 0.8))]) == by_hand((0.5, 0.5))
    # What is found in an empty image is wrong.
    assert all_ap([truth((A, 0)), truth()], [found((A, 0, 0.8)), found((A, 0, 0.9))]) == by_hand((1, 0.5))


def test_of_equal_scores_the_earlier_image_counts_first():
    objects = truth((A, 0))
    assert all_ap([truth(), objects], [found((FAR, 0, 0.5)), found((A, 0, 0.5))]) == by_hand((1, 0.5))
    assert all_ap([objects, truth()], [found((A, 0, 0.5)), found((FAR, 0, 0.5))]) == by_hand((1, 1))
    # Among many, a sort that is not stable would mix them. Every other one is right at 0.9; of those at 0.5, the first half.
    rows = [found((A if k % 2 == 0 or k < 40 else FAR, 0, 0.5 if k % 2 else 0.9)) for k in range(80)]
    assert all_ap([objects] * 80, rows) == by_hand((0.75, 1))


def test_where_the_protocols_differ():
    # A difficult object found twice: VOC excuses both, COCO one.
    objects = truth((A, 0), (C, 0, True))
    rows = found((C, 0, 1.0), (C, 0, 0.95), (A, 0, 0.9))
    assert all_ap([objects], [rows]) == pytest.approx([50, 100, 100])
    # The second detection overlaps A most (0.8), which the first has taken; COCO gives it the other (0.6), VOC does not.
    other = (0, 0, 10, 16.25)
    objects, rows = truth((A, 0), (other, 0)), found((A, 0, 0.9), ((0, 0, 10, 10.5), 0, 0.8))
    assert all_ap([objects], [rows]) == pytest.approx([100, 50, 100 * 6 / 11])
    # Of 101 detections in an image COCO counts the best 100.
    rows = found(*[(FAR, 0, 1.0)] * 100, (A, 0, 0.5))
    assert all_ap([truth((A, 0))], [rows]) == pytest.approx([0, 100 / 101, 100 / 101])


def test_a_class_without_objects_is_left_out_of_the_mean():
    truths = [truth((A, 0), (B, 2), (C, 1, True))]
    detections = [found((A, 0, 0.9), (FAR, 2, 0.9), (C, 1, 0.9), (FAR, 1, 0.8))]
    coco, voc = coco_metrics(truths, detections, NAMES), voc_metrics(truths, detections, NAMES)
    assert {name: value for name, value in coco.items() if not math.isnan(value)} == pytest.approx(
        {"AP": 50, "AP50": 50, "AP75": 50, "AP_ant": 100, "AP_cow": 0}
    )
    assert {name: value for name, value in voc.items() if not math.isnan(value)} == pytest.approx(
        {"VOC_AP50": 50, "VOC_AP50_ant": 100, "VOC_AP50_cow": 0}
    )
    assert list(coco) == ["AP", "AP50", "AP75", "AP_ant", "AP_bee", "AP_cow"]
    assert list(voc) == ["VOC_AP50", "VOC_AP50_ant", "VOC_AP50_bee", "VOC_AP50_cow"]


def test_nothing_at_all():
    for truths, detections in (([truth()], [found()]), ([truth()], [found((A, 0, 0.9))])):
        for metrics in (coco_metrics(truths, detections, NAMES), voc_metrics(truths, detections, NAMES)):
            assert all(math.isnan(value) for value in metrics.values())


def test_overlaps_of_coco_by_hand():
    """The detection covers 7/10 of the box: right at the overlaps 0.5, 0.55, ... 0.7, wrong at the five from 0.75 on."""
    metrics = coco_metrics([truth(((0, 0, 16, 20), 0))], [found(((0, 0, 16, 14.01), 0, 0.9))], NAMES)
    assert [metrics[name] for name in ("AP", "AP50", "AP75", "AP_ant")] == pytest.approx([50, 100, 0, 50])


def test_difficult_objects_are_no_crowd():
    """Half of the detection lies in a large difficult object: a crowd would excuse it (by its own area), an object does not."""
    objects = truth((A, 0), ((0, 20, 100, 90), 0, True))
    assert coco_metrics([objects], [found(((0, 20, 10, 30), 0, 0.95), (A, 0, 0.9))], NAMES)["AP50"] == pytest.approx(50)


def test_overlaps_are_those_of_whole_pixels():
    """VOC counts a box from pixel x1 to x2 as x2 - x1 + 1 wide. As intervals [x1 - 1, x2], overlaps are the same fractions."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        one, two = (np.concatenate([low := rng.integers(1, 9, 2), low + rng.integers(0, 9, 2)]) for _ in range(2))
        low, high = np.maximum(one[:2], two[:2]), np.minimum(one[2:], two[2:])
        shared = np.prod(np.maximum(high - low + 1, 0))
        union = np.prod(one[2:] - one[:2] + 1) + np.prod(two[2:] - two[:2] + 1) - shared
        one, two = (box - [1, 1, 0, 0] for box in (one, two))
        value = voc_metrics([truth((one, 0))], [found((two, 0, 0.5))], NAMES)["VOC_AP50"]
        assert value == (100 if 2 * shared >= union else 0)


def test_nothing_is_printed(capsys):
    coco_metrics([truth((A, 0))], [found((A, 0, 0.9))], NAMES)
    assert capsys.readouterr() == ("", "")


# ---- COCO once more ----------------------------------------------------------------------------------------------------


def overlap(one, two):
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return shared / (sum(areas) - shared)


def small_coco(truths, detections, label, threshold):
    """AP of a class at an overlap, straight from the definition; difficult objects are free for one detection each."""
    rows, total = [], 0
    for image, (objects, results) in enumerate(zip(truths, detections, strict=True)):
        mine = [k for k in range(len(objects.labels)) if objects.labels[k] == label]
        total += sum(not objects.difficult[k] for k in mine)
        free = set(mine)
        best_first = sorted(np.flatnonzero(results.labels == label), key=lambda k: -results.scores[k])
        for row in best_first:
            reach = {k: overlap(results.boxes[row], objects.boxes[k]) for k in free}
            reach = {k: value for k, value in reach.items() if value >= threshold}
            easy = {k: value for k, value in reach.items() if not objects.difficult[k]}
            chosen = max(easy or reach, key=(easy or reach).get, default=None)
            free.discard(chosen)
            if chosen is None or not objects.difficult[chosen]:
                rows.append((-results.scores[row], image, row, chosen is not None))
    if not total:
        return math.nan
    right, curve = 0, []
    for number, (*_, hit) in enumerate(sorted(rows), 1):
        right += hit
        curve.append((right / total, right / number))
    points = np.linspace(
        0, 1, 101
    )  # 28 / 100 and 7 / 25 are not the same there, which moves a result by up to a hundredth
    return 100 * np.mean([max((precision for recall, precision in curve if recall >= k), default=0) for k in points])


def random_case(seed):
    rng = np.random.default_rng(seed)
    truths, detections = [], []
    for _ in range(12):
        corners = rng.uniform(0, 60, (rng.integers(0, 6), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 40, corners.shape)], axis=1)
        labels = rng.integers(0, 2, len(boxes))
        truths.append(truth(*zip(boxes, labels, rng.random(len(boxes)) < 0.25, strict=True)))
        rows = [
            (box + rng.normal(0, rng.choice([0.3, 2, 6])), label if rng.random() < 0.9 else 1 - label, rng.random())
            for box, label in zip(boxes, labels, strict=True)
            for _ in range(rng.integers(0, 4))
        ]
        rows += [
            (np.array([x, y, x + 20, y + 20]), 0, rng.random()) for x, y in rng.uniform(0, 60, (rng.integers(0, 3), 2))
        ]
        detections.append(found(*rows))
    return truths, detections


@pytest.mark.parametrize("seed", range(5))
def test_coco_is_what_it_says(seed):
    truths, detections = random_case(seed)
    metrics = coco_metrics(truths, detections, NAMES)
    thresholds = [0.5 + 0.05 * k for k in range(10)]
    table = np.array([[small_coco(truths, detections, label, value) for value in thresholds] for label in (0, 1)])
    assert table[:, 0].min() > 5 and table.max() < 95
    assert metrics["AP"] == pytest.approx(table.mean(), abs=1e-3)
    assert [metrics["AP_ant"], metrics["AP_bee"]] == pytest.approx(table.mean(axis=1), abs=1e-3)
    assert [metrics["AP50"], metrics["AP75"]] == pytest.approx(table.mean(axis=0)[[0, 5]], abs=1e-3)

    truths, detections = random_case(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(truths))
    moved = [truths[k] for k in order]
    shuffled = [Detections(*(leaf[rng.permutation(len(leaf))] * 0 + leaf for leaf in detections[k])) for k in order]
    for metrics in (coco_metrics, voc_metrics):
        assert metrics(moved, shuffled, NAMES) == pytest.approx(metrics(truths, detections, NAMES), nan_ok=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_images_and_rows_does_not_matter(seed):
    truths, detections = random_case(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(truths))

    def shuffled(rows):
        places = rng.permutation(len(rows.labels))
        return type(rows)(*(leaf[places] for leaf in rows))

    moved = [shuffled(truths[k]) for k in order], [shuffled(detections[k]) for k in order]
    for metrics in (coco_metrics, voc_metrics):
        assert metrics(*moved, NAMES) == pytest.approx(metrics(truths, detections, NAMES), nan_ok=True)
