"""Faster R-CNN on a batch: its losses, and its detections; everything has a fixed shape.

Legend: N images, H W of the padded input, M boxes of an image, P proposals, R regions, C classes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax.detection.anchors import SIZES, pyramid_anchors
from hexa_jax.detection.boxes import clip, decode, large_enough, nms
from hexa_jax.detection.detector import Detector
from hexa_jax.detection.losses import LossSums, loss_sums
from hexa_jax.detection.proposals import Proposals, propose
from hexa_jax.detection.roi_align import pyramid_roi_align
from hexa_jax.detection.targets import BOX_WEIGHTS, REGIONS_SAMPLED, anchor_targets, region_targets
from hexa_jax.models.norm import EVALUATION, NormMode

STRIDES = (4, 8, 16, 32)  # of the maps that regions are cut out of
SCORE_THRESHOLD, NMS_THRESHOLD, SMALLEST = 0.05, 0.5, 1e-2


class Detected(NamedTuple):
    """Detections, best first.

    Boxes float32 [N, 100, 4] in pixels of the input, scores [N, 100], labels int32 [N, 100], -1
    for none.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array


class NormModes(NamedTuple):
    """How backbone, pyramid and box head normalise."""

    backbone: NormMode = EVALUATION
    pyramid: NormMode = EVALUATION
    head: NormMode = EVALUATION


@dataclasses.dataclass(frozen=True)
class FasterRCNN:
    """The detector with its numbers of proposals.

    Attributes:
        network: the Linen module.
        anchor_sizes: pixels, one per level of the pyramid.
        train_proposals: (before, after) suppression in training: best anchors of a level, and best
            boxes of an image.
        test_proposals: the same in evaluation.
        regions: sampled regions of an image in training.
        detections: at most so many of an image.
    """

    network: Detector
    anchor_sizes: tuple[float, ...] = SIZES
    train_proposals: tuple[int, int] = (2000, 2000)
    test_proposals: tuple[int, int] = (1000, 1000)
    regions: int = REGIONS_SAMPLED
    detections: int = 100

    def anchors(self, height: int, width: int) -> list[jax.Array]:
        """Anchors of each level for an input of this size: float32 [n, 4]."""
        maps = [(height // stride, width // stride) for stride in STRIDES]
        maps.append((-(-maps[-1][0] // 2), -(-maps[-1][1] // 2)))
        return [
            jnp.asarray(level)
            for level in pyramid_anchors((height, width), maps, self.anchor_sizes)
        ]

    def propose(
        self, predicted: Any, size: tuple[int, int], sizes: jax.Array, limits: tuple[int, int]
    ) -> Proposals:
        """Return proposals [N, P] for inputs of `size` (H, W) with contents `sizes` [N, 2]."""
        anchors = self.anchors(*size)

        def one(objectness: Any, deltas: Any, content: jax.Array) -> Proposals:
            return propose(objectness, deltas, anchors, content, *limits)

        objectness, deltas = ([level[i] for level in predicted] for i in (0, 1))
        return jax.vmap(one)(objectness, deltas, sizes)

    def pool(self, pyramid: list[jax.Array], boxes: jax.Array) -> jax.Array:
        """Features [N, R, 7, 7, D] of boxes [N, R, 4]."""
        scales = [1 / stride for stride in STRIDES]
        return jax.vmap(lambda maps, boxes: pyramid_roi_align(maps, boxes, scales))(
            pyramid[: len(STRIDES)], boxes
        )

    def loss_sums(
        self,
        variables: Any,
        keys: jax.Array,
        images: jax.Array,
        sizes: jax.Array,
        boxes: jax.Array,
        labels: jax.Array,
        modes: NormModes,
    ) -> tuple[LossSums, Any]:
        """Sums of losses over the images, and the BatchNorm moments that were sown.

        Args:
            variables: parameters and statistics of the network.
            keys: typed [N], one per image.
            images: [N, H, W, 3], uint8 or float in [0, 1].
            sizes: int32 [N, 2] content height and width; 0 marks a row without an image, which no
                loss sees.
            boxes: [N, M, 4].
            labels: int32 [N, M], -1 for padding.
            modes: how to normalise.
        """
        network, height, width = self.network, images.shape[1], images.shape[2]
        maps, sown = network.apply(
            variables,
            images,
            sizes,
            modes.backbone,
            modes.pyramid,
            method=Detector.pyramid,
            mutable=["moments"],
        )
        predicted = network.apply(variables, maps, method=Detector.proposals)
        everywhere = jnp.concatenate(self.anchors(height, width))
        found = self.propose(
            jax.lax.stop_gradient(predicted), (height, width), sizes, self.train_proposals
        )
        split = jax.vmap(jax.random.split)(keys)
        anchors = jax.vmap(anchor_targets, in_axes=(0, None, 0, 0))(
            split[:, 0], everywhere, boxes, labels
        )
        regions = jax.vmap(functools.partial(region_targets, count=self.regions))(
            split[:, 1], found, boxes, labels
        )
        present = sizes[:, 0] > 0
        anchors = anchors._replace(
            positive=anchors.positive & present[:, None],
            negative=anchors.negative & present[:, None],
        )
        regions = regions._replace(labels=jnp.where(present[:, None], regions.labels, -1))
        pooled = self.pool(maps, regions.boxes)
        (scores, deltas), sown_in_head = network.apply(
            variables,
            pooled.reshape(-1, *pooled.shape[2:]),
            modes.head,
            method=Detector.regions,
            mutable=["moments"],
        )
        shape = regions.labels.shape
        sums = jax.vmap(loss_sums)(
            jnp.concatenate([level[0] for level in predicted], axis=1),
            jnp.concatenate([level[1] for level in predicted], axis=1),
            anchors,
            scores.reshape(*shape, -1),
            deltas.reshape(*shape, -1, 4),
            regions,
        )
        moments = {**sown.get("moments", {}), **sown_in_head.get("moments", {})}
        return jax.tree.map(jnp.sum, sums), moments

    def detect(self, variables: Any, images: jax.Array, sizes: jax.Array) -> Detected:
        """Detect objects in images [N, H, W, 3]; arguments as in `loss_sums`."""
        network, size = self.network, (images.shape[1], images.shape[2])
        maps = network.apply(
            variables, images, sizes, EVALUATION, EVALUATION, method=Detector.pyramid
        )
        predicted = network.apply(variables, maps, method=Detector.proposals)
        found = self.propose(predicted, size, sizes, self.test_proposals)
        pooled = self.pool(maps, found.boxes)
        flat = pooled.reshape(-1, *pooled.shape[2:])
        scores, deltas = network.apply(variables, flat, EVALUATION, method=Detector.regions)
        shape = found.valid.shape
        # One image after another: the overlaps of all pairs of regions for each class are large.
        return jax.lax.map(
            lambda of: self._select(*of),
            (found, scores.reshape(*shape, -1), deltas.reshape(*shape, -1, 4), sizes),
        )

    def _select(
        self, found: Proposals, scores: jax.Array, deltas: jax.Array, size: jax.Array
    ) -> Detected:
        """Detections of one image (torchvision's RoIHeads.postprocess_detections)."""
        probability = jax.nn.softmax(scores)[:, 1:]  # [R, C]
        boxes = clip(decode(deltas[:, 1:], found.boxes[:, None], BOX_WEIGHTS), size)  # [R, C, 4]
        usable = (
            found.valid[:, None] & (probability > SCORE_THRESHOLD) & large_enough(boxes, SMALLEST)
        )

        def of_class(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            return nms(one[0], one[1], NMS_THRESHOLD, one[2])

        by_class = (boxes.transpose(1, 0, 2), probability.T, usable.T)
        kept = jax.lax.map(of_class, by_class, batch_size=min(20, len(by_class[1])))  # [C, R]
        ranked = jnp.where(kept, by_class[1], -1).T.reshape(-1)
        missing = max(0, self.detections - len(ranked))
        best, index = jax.lax.top_k(
            jnp.pad(ranked, (0, missing), constant_values=-1), self.detections
        )
        real = best >= 0
        index = jnp.minimum(index, len(ranked) - 1)
        return Detected(
            jnp.where(real[:, None], boxes.reshape(-1, 4)[index], 0),
            jnp.where(real, best, 0),
            jnp.where(real, index % probability.shape[1], -1).astype(jnp.int32),
        )
