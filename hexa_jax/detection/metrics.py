"""Average precision of detections: COCO's, by pycocotools, and Pascal VOC's two.

A detection is right when it overlaps an object of its class that no better-scored detection has
taken. Average precision (AP) is the area under the curve of precision over recall, with precision
made to fall; the protocols differ in this:

    COCO        the mean over ten overlaps, 0.5, 0.55, ... 0.95; precision is read off at the 101
    recalls 0, 0.01, ... 1 VOC 2010+   overlap 0.5; the exact area VOC 2007    overlap 0.5;
    precision is read off at the 11 recalls 0, 0.1, ... 1

Overlap is intersection over union. VOC's devkit counts it in whole pixels, corners included: a box
from pixel 3 to pixel 5, both counted from 1, is 3 wide. `data.py` makes that the interval [2, 5],
which is 3 wide, too; so the overlap of continuous boxes here is the devkit's.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# of a class in an image, the best by score, as pycocotools does; VOC counts all
MAX_DETECTIONS = 100
VOC_OVERLAP = 0.5


class Truth(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: float32 [m, 4] (x1, y1, x2, y2), pixels of the original image.
        labels: int32 [m].
        difficult: bool [m]: neither finding it nor missing it counts.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


class Detections(NamedTuple):
    """What a detector found in an image.

    Attributes:
        boxes: float32 [n, 4] (x1, y1, x2, y2), pixels of the original image.
        scores: float32 [n]; of equal ones, the earlier image's and then the earlier row counts
            first.
        labels: int32 [n].
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def coco_metrics(
    truths: Sequence[Truth], detections: Sequence[Detections], class_names: Sequence[str]
) -> dict[str, float]:
    """COCO's average precision for boxes of any size, in per cent.

    Difficult objects are what COCO calls ignored: a detection whose best free object is a difficult
    one counts neither as right nor as wrong. They are no crowds (iscrowd), which COCO ignores, too:
    a crowd's overlap is measured differently, and it excuses any number of detections. A difficult
    object excuses one; in VOC's own protocol, any number.

    Args:
        truths, detections: one of each per image.
        class_names: what labels mean.

    Returns:
        AP, AP50 and AP75 (the overlaps 0.5 and 0.75 alone), means over the classes that have
        objects; and AP_NAME of every class, NaN where it has none.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": image} for image in range(len(truths))]
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names)]
    real, found = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, annotations in ((real, _objects(truths)), (found, _results(detections))):
            coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
            coco.createIndex()
        evaluation = COCOeval(real, found, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    # [overlaps, recalls, classes], -1 without objects
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    present = precision[0, 0] >= 0
    values = np.where(present, 100 * precision.mean(axis=1), np.nan)  # [overlaps, classes]
    means = {"AP": _mean(values), "AP50": _mean(values[0]), "AP75": _mean(values[5])}
    return means | {
        f"AP_{name}": float(values[:, label].mean()) for label, name in enumerate(class_names)
    }


def voc_metrics(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    class_names: Sequence[str],
    eleven_point: bool = False,
) -> dict[str, float]:
    """Pascal VOC's average precision, in per cent, as the challenge's devkit computes it.

    Of the objects of its class, a detection can only take the one that it overlaps most (COCO also
    looks at others that are free). If that one is difficult, the detection counts neither as right
    nor as wrong.

    Args:
        truths, detections: one of each per image.
        class_names: what labels mean.
        eleven_point: as in 2007, instead of 2010 and later.

    Returns:
        VOC_AP50, the mean over the classes that have objects; and VOC_AP50_NAME of every class, NaN
        where it has none.
    """
    values = np.array(
        [_voc_class(truths, detections, label, eleven_point) for label in range(len(class_names))]
    )
    return {"VOC_AP50": _mean(values)} | {
        f"VOC_AP50_{name}": float(value) for name, value in zip(class_names, values, strict=True)
    }


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN if none is."""
    return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else float("nan")


def _objects(truths: Sequence[Truth]) -> list[dict]:
    rows = []
    for image, truth in enumerate(truths):
        corners = truth.boxes.astype(np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
        for box, label, difficult in zip(
            boxes, truth.labels.tolist(), truth.difficult.tolist(), strict=True
        ):
            # pycocotools ignores objects whose area is out of range, and takes overlaps from the
            # box.
            area = float("inf") if difficult else box[2] * box[3]
            rows.append(
                {"image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
            )
    return _numbered(rows)


def _results(detections: Sequence[Detections]) -> list[dict]:
    rows = []
    for image, found in enumerate(detections):
        corners = found.boxes.astype(np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
        for box, score, label in zip(
            boxes, found.scores.tolist(), found.labels.tolist(), strict=True
        ):
            rows.append(
                {
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "score": score,
                }
            )
    return _numbered(rows)


def _numbered(rows: list[dict]) -> list[dict]:
    # 0 would mean "no match" to pycocotools
    return [row | {"id": number} for number, row in enumerate(rows, 1)]


def _voc_class(
    truths: Sequence[Truth], detections: Sequence[Detections], label: int, eleven_point: bool
) -> float:
    """AP of a class in per cent; NaN if it has no objects."""
    objects = [
        (truth.boxes[truth.labels == label], truth.difficult[truth.labels == label])
        for truth in truths
    ]
    total = sum(int((~difficult).sum()) for _, difficult in objects)
    if not total:
        return float("nan")
    mine = [found.labels == label for found in detections]
    scores = np.concatenate(
        [found.scores[rows] for found, rows in zip(detections, mine, strict=True)]
    )
    boxes = np.concatenate(
        [found.boxes[rows].reshape(-1, 4) for found, rows in zip(detections, mine, strict=True)]
    )
    image_of = np.repeat(np.arange(len(mine)), [int(rows.sum()) for rows in mine])
    taken = [np.zeros(len(difficult), bool) for _, difficult in objects]
    right: list[bool] = []  # of the detections that count, the best first
    for row in np.argsort(-scores, kind="stable"):
        image = image_of[row]
        there, difficult = objects[image]
        overlaps = _overlaps(boxes[row], there)
        best = int(np.argmax(overlaps)) if len(overlaps) else -1
        hit = best >= 0 and bool(overlaps[best] >= VOC_OVERLAP)
        if hit and difficult[best]:
            continue
        right.append(hit and not taken[image][best])
        if hit:
            taken[image][best] = True
    return 100 * _area(np.array(right, bool), total, eleven_point)


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 [m] intersection over union of a box with others [m, 4]."""
    box, others = box.astype(np.float64), others.astype(np.float64).reshape(-1, 4)
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.maximum(sides, 0).prod(axis=1)
    return shared / (
        (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - shared
    )


def _area(right: np.ndarray, total: int, eleven_point: bool) -> float:
    """Return the AP, 0 to 1, of detections sorted by score, of which `right` ones are correct."""
    hits = np.cumsum(right)
    recall, precision = hits / total, hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if eleven_point:
        # the first detection that reaches the recall
        at = np.searchsorted(recall, np.arange(11) / 10)
        return float(np.append(envelope, 0.0)[at].mean())
    return float(np.sum(np.diff(recall, prepend=0) * envelope))
