"""Boxes, matching and RoIAlign in PyTorch by torchvision's rules: what `torch_faster_rcnn.py` is made of.

Shapes: A anchors or other boxes, R regions, G boxes of the ground truth. A box is (x1, y1, x2, y2).
"""

import math

import torch
from torch.nn import functional as F

RPN_WEIGHTS, HEAD_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)
LARGEST_LOG_RATIO = math.log(1000 / 16)

# ---- Boxes -------------------------------------------------------------------------------------------------------------


def sides(boxes):
    """Widths and heights."""
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def iou(first, second):
    """[A, B]."""
    shared = torch.minimum(first[:, None, 2:], second[:, 2:]) - torch.maximum(first[:, None, :2], second[:, :2])
    shared = shared.clamp(min=0).prod(-1)
    areas = [width * height for width, height in (sides(first), sides(second))]
    return shared / (areas[0][:, None] + areas[1] - shared)


def encode(boxes, references, weights):
    """Offsets [R, 4] that take references to boxes."""
    (width, height), (width0, height0) = sides(boxes), sides(references)
    dx = (boxes[:, 0] + 0.5 * width - references[:, 0] - 0.5 * width0) / width0
    dy = (boxes[:, 1] + 0.5 * height - references[:, 1] - 0.5 * height0) / height0
    plain = torch.stack([dx, dy, torch.log(width / width0), torch.log(height / height0)], dim=1)
    return plain * plain.new_tensor(weights)


def decode(deltas, references, weights):
    """Boxes [..., 4]; the last two offsets are clamped from above."""
    dx, dy, dw, dh = (deltas / deltas.new_tensor(weights)).unbind(-1)
    width, height = sides(references)
    x, y = references[..., 0] + 0.5 * width + dx * width, references[..., 1] + 0.5 * height + dy * height
    half_width = 0.5 * width * torch.exp(dw.clamp(max=LARGEST_LOG_RATIO))
    half_height = 0.5 * height * torch.exp(dh.clamp(max=LARGEST_LOG_RATIO))
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def clip(boxes, size):
    height, width = size
    return torch.stack([boxes[..., i].clamp(0, width if i % 2 == 0 else height) for i in range(4)], dim=-1)


def nms(boxes, scores, threshold):
    """Indices that remain, in falling order of score; of equals the first one comes first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    overlapping = iou(boxes[order], boxes[order]) > threshold
    alive = torch.ones(len(order), dtype=torch.bool)
    for row in range(len(order)):
        if alive[row]:
            alive[row + 1 :] &= ~overlapping[row, row + 1 :]
    return order[alive]


def nms_by_group(boxes, scores, groups, threshold):
    """The same, where boxes of different groups leave each other alone."""
    kept = [
        rows[nms(boxes[rows], scores[rows], threshold)]
        for rows in (torch.where(groups == g)[0] for g in groups.unique())
    ]
    rows = torch.cat([*kept, torch.zeros(0, dtype=torch.int64)]).sort().values
    return rows[torch.sort(scores[rows], descending=True, stable=True).indices]


# ---- Targets -----------------------------------------------------------------------------------------------------------


def match(overlaps, high, low, allow_low_quality):
    """Each column's row, int64 [A]; -1 below `low`, -2 between."""
    best, rows = overlaps.max(dim=0)
    result = torch.where(best < low, -1, torch.where(best < high, -2, rows))
    if allow_low_quality:
        asked_for = (overlaps == overlaps.max(dim=1, keepdim=True).values).any(dim=0)
        result = torch.where(asked_for, rows, result)
    return result


def anchor_targets(anchors, boxes):
    """Labels int64 [A] (1, 0, or -1 where ignored) and the box [A, 4] that each anchor learns."""
    if len(boxes) == 0:
        return torch.zeros(len(anchors), dtype=torch.int64), torch.zeros_like(anchors)
    matches = match(iou(boxes, anchors), 0.7, 0.3, allow_low_quality=True)
    return torch.where(matches >= 0, 1, matches + 1), boxes[matches.clamp(min=0)]


def region_targets(regions, boxes, classes):
    """Classes int64 [R] (0: background) and the box [R, 4] that each region learns."""
    if len(boxes) == 0:
        return torch.zeros(len(regions), dtype=torch.int64), torch.zeros_like(regions)
    matches = match(iou(boxes, regions), 0.5, 0.5, allow_low_quality=False)
    return torch.where(matches >= 0, classes[matches.clamp(min=0)], 0), boxes[matches.clamp(min=0)]


# ---- Reading regions ---------------------------------------------------------------------------------------------------


def sample_axis(start, extent, size, output_size, sampling_ratio):
    """Along one axis, for [R, output * sampling] points: the two pixels, the weight of the second, and whether it is inside."""
    steps = (torch.arange(output_size * sampling_ratio) + 0.5) / sampling_ratio
    points = start[:, None] + extent[:, None] / output_size * steps
    inside = (points >= -1) & (points <= size)
    points = points.clamp(0, size - 1)
    low = points.floor().long()
    return low, (low + 1).clamp(max=size - 1), points - low, inside


def roi_align(features, boxes, scale, output_size=7, sampling_ratio=2):
    """[R, channels, output, output] of one image's map [channels, H, W]: torchvision's `aligned=False`, as its kernels do it."""
    start, extent = boxes[:, :2] * scale, ((boxes[:, 2:] - boxes[:, :2]) * scale).clamp(min=1)
    ys = sample_axis(start[:, 1], extent[:, 1], features.shape[1], output_size, sampling_ratio)
    xs = sample_axis(start[:, 0], extent[:, 0], features.shape[2], output_size, sampling_ratio)
    total = 0
    for row, row_weight in ((ys[0], 1 - ys[2]), (ys[1], ys[2])):
        for column, column_weight in ((xs[0], 1 - xs[2]), (xs[1], xs[2])):
            weight = (row_weight * ys[3])[:, :, None] * (column_weight * xs[3])[:, None]
            total = total + features[:, row[:, :, None], column[:, None]] * weight
    return F.avg_pool2d(total.transpose(0, 1), sampling_ratio)


def levels_of(boxes):
    """Which of the four maps each region is read from."""
    width, height = sides(boxes)
    return (torch.floor(4 + torch.log2(torch.sqrt(width * height) / 224) + 1e-6).clamp(2, 5) - 2).long()
