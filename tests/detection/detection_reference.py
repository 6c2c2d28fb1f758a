"""Faster R-CNN's arithmetic in float64 NumPy and plain loops, to compare the fast versions with.

Written from torchvision's behaviour, without reading `hexa_jax`. G, A and R count ground-truth boxes, anchors and regions;
a box is (x1, y1, x2, y2).
"""

import math

import numpy as np

LARGEST_LOG_RATIO = math.log(1000 / 16)  # a decoded box grows at most this much

# ---- Boxes -------------------------------------------------------------------------------------------------------------


def area(box):
    """Width times height of one box."""
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


def overlap(first, second):
    """Intersection over union of two boxes; 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = area(first) + area(second) - shared
    return shared / union if union > 0 else 0.0


def iou(first, second):
    """Overlaps [A, B] of two lists of boxes."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    table = [[overlap(one, other) for other in second] for one in first]
    return np.array(table, np.float64).reshape(len(first), len(second))


def centre_form(box):
    """Centre and size of a box."""
    x1, y1, x2, y2 = (float(side) for side in box)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def encode(boxes, references, weights):
    """Offsets [R, 4] that take each reference to its box."""
    offsets = []
    for box, reference in zip(boxes, references, strict=True):
        x, y, width, height = centre_form(box)
        x0, y0, width0, height0 = centre_form(reference)
        plain = (x - x0) / width0, (y - y0) / height0, math.log(width / width0), math.log(height / height0)
        offsets.append([weight * offset for weight, offset in zip(weights, plain, strict=True)])
    return np.array(offsets)


def decode(offsets, references, weights):
    """Boxes [R, 4] of offsets from their references."""
    boxes = []
    for offset, reference in zip(offsets, references, strict=True):
        dx, dy, dw, dh = (float(value) / weight for value, weight in zip(offset, weights, strict=True))
        x0, y0, width0, height0 = centre_form(reference)
        x, width = x0 + dx * width0, width0 * math.exp(min(dw, LARGEST_LOG_RATIO))
        y, height = y0 + dy * height0, height0 * math.exp(min(dh, LARGEST_LOG_RATIO))
        boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return np.array(boxes)


def clip(boxes, height, width):
    """Boxes [R, 4] cut at the borders of an image."""
    return np.array(
        [[min(max(x, 0), width) if i % 2 == 0 else min(max(x, 0), height) for i, x in enumerate(box)] for box in boxes]
    )


def nms(boxes, scores, threshold, valid=None):
    """Which boxes remain, bool [R], when each, in falling order of score, removes later ones of overlap above `threshold`."""
    boxes = np.asarray(boxes, np.float64)
    usable = [True] * len(boxes) if valid is None else list(valid)
    order = sorted((row for row in range(len(boxes)) if usable[row]), key=lambda row: (-scores[row], row))
    kept = []
    for row in order:
        if all(overlap(boxes[row], boxes[other]) <= threshold for other in kept):
            kept.append(row)
    return np.isin(np.arange(len(boxes)), kept)


def content_size(height, width, shorter=800, longer=1333):
    """Height and width of an image in the detector: float64, and cut off, so that the side of 97 pixels becomes 799."""
    scale = min(shorter / min(height, width), longer / max(height, width))
    return int(height * scale), int(width * scale)


# ---- Matching ----------------------------------------------------------------------------------------------------------

BELOW, BETWEEN = -1, -2


def match(overlaps, high, low, allow_low_quality):
    """Each anchor's box, int [A], from overlaps [G, A]: -1 where the best overlap is below `low`, -2 up to `high`.

    With `allow_low_quality`, all anchors that overlap some box as much as any anchor does get their own best box back.
    """
    overlaps = np.asarray(overlaps)
    boxes, anchors = overlaps.shape
    if boxes == 0:
        return np.full(anchors, BELOW)
    best = [max(range(boxes), key=lambda box: (overlaps[box, anchor], -box)) for anchor in range(anchors)]
    result = []
    for anchor in range(anchors):
        value = overlaps[best[anchor], anchor]
        result.append(BELOW if value < low else BETWEEN if value < high else best[anchor])
    if allow_low_quality:
        for box in range(boxes):
            for anchor in range(anchors):
                if overlaps[box, anchor] == max(overlaps[box]):
                    result[anchor] = best[anchor]
    return np.array(result)


# ---- Anchors -----------------------------------------------------------------------------------------------------------


def base_anchors(size, ratios=(0.5, 1.0, 2.0)):
    """Boxes [ratios, 4] of area size**2 around 0; a ratio is height / width; Python rounds half to even."""
    boxes = []
    for ratio in ratios:
        half_width, half_height = size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2
        boxes.append([round(-half_width), round(-half_height), round(half_width), round(half_height)])
    return np.array(boxes, np.float64)


def grid_anchors(image, feature, size, ratios=(0.5, 1.0, 2.0)):
    """The base anchors at each pixel of a feature map, [h * w * ratios, 4]: rows, then columns, then ratios."""
    stride_y, stride_x = image[0] // feature[0], image[1] // feature[1]
    boxes = []
    for row in range(feature[0]):
        for column in range(feature[1]):
            x, y = column * stride_x, row * stride_y
            boxes += [base + (x, y, x, y) for base in base_anchors(size, ratios)]
    return np.array(boxes)


# ---- Regions of the feature maps ---------------------------------------------------------------------------------------


def bilinear(y, x, height, width):
    """{(row, column): weight} of a point; pixel (i, j) lies at (i, j). Nothing more than a pixel outside the map."""
    if y < -1 or y > height or x < -1 or x > width:
        return {}

    def pair(place, size):
        place = max(place, 0.0)
        low = int(place)
        if low >= size - 1:
            return {size - 1: 1.0}
        return {low: 1 - (place - low), low + 1: place - low}

    return {
        (row, column): row_weight * column_weight
        for row, row_weight in pair(y, height).items()
        for column, column_weight in pair(x, width).items()
    }


def roi_align_weights(shape, boxes, scale, output_size=7, sampling_ratio=2, aligned=False):
    """The linear map [R, output, output, H, W] from a feature map [H, W] to what RoIAlign makes of it."""
    height, width = shape
    weights = np.zeros((len(boxes), output_size, output_size, height, width))
    for region, box in enumerate(np.asarray(boxes, np.float64)):
        x1, y1, x2, y2 = box * scale - (0.5 if aligned else 0.0)
        region_width, region_height = x2 - x1, y2 - y1
        if not aligned:
            region_width, region_height = max(region_width, 1.0), max(region_height, 1.0)
        step_x, step_y = region_width / output_size, region_height / output_size
        for row in range(output_size):
            for column in range(output_size):
                for i in range(sampling_ratio):
                    for j in range(sampling_ratio):
                        y = y1 + row * step_y + (i + 0.5) * step_y / sampling_ratio
                        x = x1 + column * step_x + (j + 0.5) * step_x / sampling_ratio
                        for pixel, weight in bilinear(y, x, height, width).items():
                            weights[region, row, column, *pixel] += weight / sampling_ratio**2
    return weights


def roi_align(features, boxes, scale, output_size=7, sampling_ratio=2, aligned=False):
    """[R, output, output, C] from features [H, W, C]."""
    weights = roi_align_weights(features.shape[:2], boxes, scale, output_size, sampling_ratio, aligned)
    return np.einsum("rijhw,hwc->rijc", weights, np.asarray(features, np.float64))


def level(box, levels=4, finest=2):
    """Which map a region is read from, 0 the finest: a box of 224 x 224 pixels is read from level 4 of the pyramid."""
    side = math.sqrt(area(np.asarray(box, np.float64)))
    if side == 0:
        return 0
    wanted = math.floor(4 + math.log2(side / 224) + 1e-6)
    return min(max(wanted, finest), finest + levels - 1) - finest


def pyramid_roi_align(pyramid, boxes, scales, output_size=7, sampling_ratio=2):
    """RoIAlign of each box on the map of its level."""
    result = []
    for box in boxes:
        chosen = level(box, len(pyramid))
        result.append(roi_align(pyramid[chosen], [box], scales[chosen], output_size, sampling_ratio)[0])
    return np.array(result)


# ---- Losses ------------------------------------------------------------------------------------------------------------


def smooth_l1(differences, beta=1 / 9):
    """Sum over all numbers of d**2 / (2 beta), and of |d| - beta / 2 where |d| >= beta."""
    sizes = [abs(float(difference)) for difference in np.ravel(differences)]
    return sum(size**2 / (2 * beta) if size < beta else size - beta / 2 for size in sizes)


# ---- Average precision -------------------------------------------------------------------------------------------------
# One class. `truths` is a list over images of (boxes, difficult); `detections` one of (boxes, scores).

HIT, MISS, IGNORED = "hit", "miss", "ignored"


def in_falling_order(detections):
    """(score, image, box) of all images; equals stay in the order of images and rows."""
    rows = [
        (score, image, box)
        for image, (boxes, scores) in enumerate(detections)
        for box, score in zip(boxes, scores, strict=True)
    ]
    return sorted(rows, key=lambda row: -row[0])


def precision_and_recall(outcomes, to_find):
    """The curve after each detection that counts."""
    hits, precision, recall = 0, [], []
    for count, outcome in enumerate((outcome for outcome in outcomes if outcome != IGNORED), start=1):
        hits += outcome == HIT
        precision.append(hits / count)
        recall.append(hits / to_find)
    return precision, recall


def voc_ap(truths, detections, threshold=0.5, eleven_point=False):
    """VOC's AP in [0, 1]: a detection takes the box that it overlaps most, and misses where an earlier one has taken it.

    A difficult box need not be found, and a detection of it does not count. NaN where nothing is to be found.
    """
    to_find = sum(not hard for _, difficult in truths for hard in difficult)
    if to_find == 0:
        return math.nan
    outcomes, taken = [], set()
    for _, image, box in in_falling_order(detections):
        boxes, difficult = truths[image]
        overlaps = [overlap(box, truth) for truth in boxes]
        best = max(range(len(boxes)), key=lambda row: (overlaps[row], -row), default=None)
        if best is None or overlaps[best] < threshold:
            outcomes.append(MISS)
        elif difficult[best]:
            outcomes.append(IGNORED)
        else:
            outcomes.append(MISS if (image, best) in taken else HIT)
            taken.add((image, best))
    precision, recall = precision_and_recall(outcomes, to_find)
    if eleven_point:
        return sum(best_precision(precision, recall, tenth / 10) for tenth in range(11)) / 11
    # The area: a step in recall times the best precision from there on.
    total, last = 0.0, 0.0
    for place, reached in enumerate(recall):
        total += (reached - last) * max(precision[place:])
        last = reached
    return total


def best_precision(precision, recall, point):
    """The largest precision at a recall of at least `point`; 0 where it is never reached."""
    return max((p for p, r in zip(precision, recall, strict=True) if r >= point), default=0.0)


RECALLS = np.linspace(
    0, 1, 101
)  # pycocotools': some lie a bit above the hundredth, and a recall of exactly 0.7 misses one


def coco_ap(truths, detections, threshold, crowd=True, most=100):
    """COCO's AP in [0, 1] of one class at one threshold: each detection takes the free box that it overlaps most.

    A difficult box need not be found. A detection that finds no other box may take it, and then does not count. With
    `crowd` (COCO's iscrowd) any number of them may, and the overlap is the part of the detection that lies inside the box.
    NaN where nothing is to be found.
    """
    to_find = sum(not hard for _, difficult in truths for hard in difficult)
    if to_find == 0:
        return math.nan
    results = []
    for image, (boxes, difficult) in enumerate(truths):
        taken = set()
        for score, _, box in in_falling_order([detections[image]])[:most]:
            results.append((score, coco_outcome(box, boxes, difficult, taken, threshold, crowd)))
    outcomes = [outcome for _, outcome in sorted(results, key=lambda row: -row[0])]
    precision, recall = precision_and_recall(outcomes, to_find)
    return sum(best_precision(precision, recall, point) for point in RECALLS) / len(RECALLS)


def coco_outcome(box, boxes, difficult, taken, threshold, crowd):
    """What one detection is; adds the box that it takes to `taken`."""
    for wanted in (False, True):  # a difficult box only where there is no other
        overlaps = {
            row: covered(box, boxes[row]) if wanted and crowd else overlap(box, boxes[row])
            for row in range(len(boxes))
            if bool(difficult[row]) is wanted and row not in taken
        }
        best = max(overlaps, key=lambda row: (overlaps[row], row), default=None)
        if best is not None and overlaps[best] >= threshold:
            if not (wanted and crowd):
                taken.add(best)
            return IGNORED if wanted else HIT
    return MISS


def covered(box, region):
    """The part of a box that lies inside a region."""
    width = min(box[2], region[2]) - max(box[0], region[0])
    height = min(box[3], region[3]) - max(box[1], region[1])
    return max(width, 0.0) * max(height, 0.0) / area(box)
