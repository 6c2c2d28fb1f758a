"""Faster R-CNN with a feature pyramid in plain PyTorch, under torchvision's names: what `fasterrcnn_resnet50_fpn` computes.

Written from torchvision's behaviour, without reading `hexa_jax`; `test_detection_torchvision.py` compares it with torchvision.
Images come resized, normalised and padded with zeros. Shapes: N images, A anchors over all levels, R regions, C classes
without background. Class 0 is the background, boxes are (x1, y1, x2, y2) in pixels of the padded input, and the content size
of an image, (height, width), is where its boxes are clipped.
"""

from typing import NamedTuple

import torch
from detection_weights import draw_all
from torch import nn
from torch.nn import functional as F
from torch_boxes import (
    HEAD_WEIGHTS,
    RPN_WEIGHTS,
    anchor_targets,
    clip,
    decode,
    encode,
    levels_of,
    nms_by_group,
    region_targets,
    roi_align,
    sides,
)
from torch_resnet import TorchResNet

RATIOS = (0.5, 1.0, 2.0)
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)  # of the maps that regions are read from
BETA = 1 / 9  # where the smooth L1 loss becomes linear


class Settings(NamedTuple):
    """Numbers of torchvision's detector; pairs are of (inference, training)."""

    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    before_nms: tuple[int, int] = (1000, 2000)  # best anchors of each level
    after_nms: tuple[int, int] = (1000, 2000)  # best proposals of an image
    rpn_nms: float = 0.7
    score: float = 0.05  # detections have more
    box_nms: float = 0.5
    detections: int = 100


class Detections(NamedTuple):
    """Of one image, in falling order of score."""

    boxes: torch.Tensor  # float32 [D, 4]
    scores: torch.Tensor  # float32 [D]
    labels: torch.Tensor  # int64 [D], from 1


class Inference(NamedTuple):
    """What detection computes on its way; lists are over levels or over images."""

    pyramid: list[torch.Tensor]  # five of [N, channels, h, w]
    objectness: list[torch.Tensor]  # logits, five of [N, A_level]
    deltas: list[torch.Tensor]  # five of [N, A_level, 4]
    proposals: list[torch.Tensor]  # N of [R, 4], in falling order of score
    proposal_scores: list[torch.Tensor]  # N of [R]
    pooled: torch.Tensor  # [sum of R, channels, 7, 7]
    class_logits: torch.Tensor  # [sum of R, C + 1]
    box_deltas: torch.Tensor  # [sum of R, 4 * (C + 1)]
    detections: list[Detections]


# ---- The network -------------------------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """x * weight / sqrt(variance + eps) + what is left of bias and mean; nothing here is trained."""

    def __init__(self, channels, eps):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def freeze_norms(module, eps):
    """Put a FrozenBatchNorm in the place of each BatchNorm2d."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm(child.num_features, eps))
        else:
            freeze_norms(child, eps)
    return module


class Pyramid(nn.Module):
    def __init__(self, in_channels, channels):
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(count, channels, 1)) for count in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in in_channels
        )

    def forward(self, maps):
        outputs, above = [], None
        for number in reversed(range(len(maps))):
            lateral = self.inner_blocks[number](maps[number])
            above = (
                lateral if above is None else lateral + F.interpolate(above, size=lateral.shape[-2:], mode="nearest")
            )
            outputs.insert(0, self.layer_blocks[number](above))
        return [*outputs, outputs[-1][:, :, ::2, ::2]]


class RPNHead(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()))
        self.cls_logits = nn.Conv2d(channels, len(RATIOS), 1)
        self.bbox_pred = nn.Conv2d(channels, 4 * len(RATIOS), 1)


class BoxHead(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.fc6, self.fc7 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)


class BoxPredictor(nn.Module):
    def __init__(self, hidden, columns):
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(hidden, columns), nn.Linear(hidden, 4 * columns)


class TorchFasterRCNN(nn.Module):
    """torchvision's detector of C = `classes` classes; the defaults of the others are its own.

    Args:
        depth, base_channels: of the ResNet.
        channels: of the pyramid.
        hidden: of the two layers of the box head.
        eps: of the frozen BatchNorm; 0 for torchvision's own COCO weights.
    """

    def __init__(self, classes, depth=50, base_channels=64, channels=256, hidden=1024, eps=1e-5, settings=Settings()):
        super().__init__()
        self.settings = settings
        self.backbone, self.rpn, self.roi_heads = nn.Module(), nn.Module(), nn.Module()
        self.backbone.body = freeze_norms(TorchResNet(depth, base_channels), eps)
        expansion = 4 if depth >= 50 else 1
        self.backbone.fpn = Pyramid([base_channels * 2**stage * expansion for stage in range(4)], channels)
        self.rpn.head = RPNHead(channels)
        self.roi_heads.box_head = BoxHead(channels * 7 * 7, hidden)
        self.roi_heads.box_predictor = BoxPredictor(hidden, classes + 1)

    def pyramid(self, images):
        """Five maps [N, channels, h, w], the finest first, of images [N, 3, H, W]."""
        return self.backbone.fpn(self.backbone.body(images)[1])

    def rpn_outputs(self, pyramid):
        """Logits [N, A_level] and deltas [N, A_level, 4] of each level; anchors go by row, column, ratio."""
        head, objectness, deltas = self.rpn.head, [], []
        for features in pyramid:
            hidden = head.conv(features)
            count, _, height, width = features.shape
            objectness.append(head.cls_logits(hidden).permute(0, 2, 3, 1).reshape(count, -1))
            grouped = head.bbox_pred(hidden).reshape(count, len(RATIOS), 4, height, width)
            deltas.append(grouped.permute(0, 3, 4, 1, 2).reshape(count, -1, 4))
        return objectness, deltas

    def anchors(self, images, pyramid):
        """[A_level, 4] of each level."""
        result = []
        for size, features in zip(self.settings.anchor_sizes, pyramid, strict=True):
            root = torch.tensor(RATIOS).sqrt()
            width, height = 1 / root * size, root * size
            base = (torch.stack([-width, -height, width, height], dim=1) / 2).round()
            rows, columns = features.shape[-2:]
            y = torch.arange(rows) * (images.shape[-2] // rows)
            x = torch.arange(columns) * (images.shape[-1] // columns)
            y, x = torch.meshgrid(y, x, indexing="ij")
            result.append((torch.stack([x, y, x, y], dim=-1)[:, :, None] + base).reshape(-1, 4))
        return result

    @torch.no_grad()
    def proposals(self, objectness, deltas, anchors, sizes, training=False):
        """Boxes [R, 4] and scores [R] of each image: the best of each level, clipped, without small and repeated ones."""
        settings, boxes, scores = self.settings, [], []
        for image, size in enumerate(sizes):
            found = []
            for level, (logits, offsets, references) in enumerate(zip(objectness, deltas, anchors, strict=True)):
                top = logits[image].sort(descending=True, stable=True).indices[: settings.before_nms[training]]
                decoded = clip(decode(offsets[image][top], references[top], RPN_WEIGHTS), size)
                found.append((decoded, logits[image][top].sigmoid(), torch.full((len(top),), level)))
            candidates, confidence, levels = (torch.cat(parts) for parts in zip(*found, strict=True))
            width, height = sides(candidates)
            large = (width >= 1e-3) & (height >= 1e-3)
            candidates, confidence, levels = candidates[large], confidence[large], levels[large]
            kept = nms_by_group(candidates, confidence, levels, settings.rpn_nms)[: settings.after_nms[training]]
            boxes.append(candidates[kept])
            scores.append(confidence[kept])
        return boxes, scores

    def pool(self, pyramid, regions):
        """[sum of R, channels, 7, 7] of each image's regions [R, 4], image by image."""
        pooled = []
        for image, boxes in enumerate(regions):
            levels, result = levels_of(boxes), pyramid[0].new_zeros(len(boxes), pyramid[0].shape[1], 7, 7)
            for level, scale in enumerate(SCALES):
                rows = torch.where(levels == level)[0]
                result = result.index_put((rows,), roi_align(pyramid[level][image], boxes[rows], scale))
            pooled.append(result)
        return torch.cat(pooled)

    def box_outputs(self, pooled):
        """Class logits [R, C + 1] and deltas [R, 4 * (C + 1)]; the columns of class c are 4c to 4c + 3."""
        head, predictor = self.roi_heads.box_head, self.roi_heads.box_predictor
        hidden = torch.relu(head.fc7(torch.relu(head.fc6(pooled.flatten(1)))))
        return predictor.cls_score(hidden), predictor.bbox_pred(hidden)

    @torch.no_grad()
    def detect(self, class_logits, box_deltas, regions, sizes):
        """The Detections of each image."""
        settings, result = self.settings, []
        counts = [len(boxes) for boxes in regions]
        for logits, deltas, boxes, size in zip(
            class_logits.split(counts), box_deltas.split(counts), regions, sizes, strict=True
        ):
            columns = logits.shape[1]
            decoded = clip(decode(deltas.reshape(-1, columns, 4), boxes[:, None], HEAD_WEIGHTS), size)
            # A candidate for each region and class, without the background's column.
            decoded, scores = decoded[:, 1:].reshape(-1, 4), logits.softmax(-1)[:, 1:].reshape(-1)
            labels = torch.arange(1, columns).repeat(len(boxes))
            width, height = sides(decoded)
            usable = (scores > settings.score) & (width >= 1e-2) & (height >= 1e-2)
            decoded, scores, labels = decoded[usable], scores[usable], labels[usable]
            kept = nms_by_group(decoded, scores, labels, settings.box_nms)[: settings.detections]
            result.append(Detections(decoded[kept], scores[kept], labels[kept]))
        return result

    @torch.no_grad()
    def infer(self, images, sizes):
        """All of detection for images [N, 3, H, W] with content sizes [(height, width), ...]."""
        pyramid = self.pyramid(images)
        objectness, deltas = self.rpn_outputs(pyramid)
        proposals, scores = self.proposals(objectness, deltas, self.anchors(images, pyramid), sizes)
        pooled = self.pool(pyramid, proposals)
        class_logits, box_deltas = self.box_outputs(pooled)
        detections = self.detect(class_logits, box_deltas, proposals, sizes)
        return Inference(pyramid, objectness, deltas, proposals, scores, pooled, class_logits, box_deltas, detections)

    # ---- Training --------------------------------------------------------------------------------------------------------

    def losses(self, images, sizes, truths, rpn_samples, region_samples, proposals=None):
        """torchvision's four losses by its names, and the proposals [R, 4] of each image (before the true boxes are added).

        Args:
            truths: of each image, boxes [G, 4] in input pixels and labels int64 [G] from 1.
            rpn_samples: of each image, the sampled positives and negatives: indices into all anchors, level after level.
            region_samples: of each image, the sampled regions: indices into its proposals followed by its true boxes.
                Either may be a function of the labels that are sampled from (anchors: 1, 0, and -1 where ignored;
                regions: the class, 0 for the background) that returns these indices for one image.
            proposals: of each image [R, 4], in place of those that are computed.
        """
        pyramid = self.pyramid(images)
        objectness, deltas = self.rpn_outputs(pyramid)
        anchors = self.anchors(images, pyramid)
        losses = self.rpn_losses(objectness, deltas, anchors, truths, rpn_samples)
        if proposals is None:
            proposals, _ = self.proposals(objectness, deltas, anchors, sizes, training=True)
        losses |= self.region_losses(pyramid, proposals, truths, region_samples)
        return losses, proposals

    def rpn_losses(self, objectness, deltas, anchors, truths, samples):
        """Means over the sampled anchors of the whole batch."""
        anchors, objectness, deltas = torch.cat(anchors), torch.cat(objectness, dim=1), torch.cat(deltas, dim=1)
        classification, regression, count = 0, 0, 0
        for image, (boxes, _) in enumerate(truths):
            labels, matched = anchor_targets(anchors, boxes)
            positive, negative = samples(labels) if callable(samples) else samples[image]
            chosen = torch.cat([positive, negative])
            logits = objectness[image][chosen]
            loss = F.binary_cross_entropy_with_logits(logits, labels[chosen].to(logits), reduction="sum")
            wanted = encode(matched[positive], anchors[positive], RPN_WEIGHTS)
            classification = classification + loss
            regression = regression + F.smooth_l1_loss(deltas[image][positive], wanted, beta=BETA, reduction="sum")
            count += len(chosen)
        return {"loss_objectness": classification / count, "loss_rpn_box_reg": regression / count}

    def region_losses(self, pyramid, proposals, truths, samples):
        """Means over the sampled regions of the whole batch."""
        regions, labels, wanted = [], [], []
        for image, (boxes, classes) in enumerate(truths):
            candidates = torch.cat([proposals[image], boxes])
            classes_of, matched = region_targets(candidates, boxes, classes)
            chosen = samples(classes_of) if callable(samples) else samples[image]
            regions.append(candidates[chosen])
            labels.append(classes_of[chosen])
            wanted.append(encode(matched[chosen], candidates[chosen], HEAD_WEIGHTS))
        class_logits, box_deltas = self.box_outputs(self.pool(pyramid, regions))
        labels, wanted = torch.cat(labels), torch.cat(wanted)
        positive = torch.where(labels > 0)[0]
        own = box_deltas.reshape(len(labels), -1, 4)[positive, labels[positive]]
        regression = F.smooth_l1_loss(own, wanted[positive], beta=BETA, reduction="sum") / len(labels)
        return {"loss_classifier": F.cross_entropy(class_logits, labels), "loss_box_reg": regression}


# ---- Weights -----------------------------------------------------------------------------------------------------------


def draw_weights(model):
    """Fill the model with what `draw` makes of its names."""
    state = model.state_dict()
    drawn = draw_all({name: tuple(value.shape) for name, value in state.items()})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in drawn.items()})
    return model
