"""Make `tests/goldens/torch_faster_rcnn.npz`: what `torch_faster_rcnn.py` computes from weights that NumPy can draw again.

Run it apart from the project's own environment, which has no torch:

    python3 -m venv /tmp/torchenv
    /tmp/torchenv/bin/pip install torch==2.13.0 numpy
    /tmp/torchenv/bin/python tests/make_detection_goldens.py

What stands above `main` is what tests share; it needs NumPy alone. The file holds, with level l, image i and a class counted
from 1 (0: the background), in the order of torchvision:

    shapes                           JSON of {name: shape} of all weights
    pyramid{l}                       [N, h, w, channels]
    objectness{l}, deltas{l}         logits [N, h * w * 3] and [N, h * w * 3, 4]
    proposals{i}, proposal_scores{i} [R, 4], [R], in falling order of score
    pooled{i}                        [R / 5, 7, 7, channels], of each fifth proposal
    class_logits{i}, box_deltas{i}   [R, C + 1], [R, C + 1, 4]
    boxes{i}, scores{i}, labels{i}   the detections, in falling order of score
    training/proposals{i}            [R, 4], with the limits of training
    training/positive{i}, negative{i}, regions{i}   indices that the losses are of: of anchors over all levels, and of the
                                     proposals followed by the true boxes
    training/loss_...                the four losses
    training/gradient/NAME           the gradient of their sum, for a few of the weights
"""

import json
import math
import pathlib
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).resolve().parent / "goldens" / "torch_faster_rcnn.npz"

# ---- A small detector --------------------------------------------------------------------------------------------------

CLASSES = 3
NETWORK = {"depth": 50, "base_channels": 8, "channels": 8, "hidden": 32}
PADDED, SIZES = (128, 160), [(128, 150), (118, 160)]  # height, width
LIMITS = {  # each of them decides; pairs are of (inference, training)
    "anchor_sizes": (16, 32, 64, 96, 128),
    "before_nms": (150, 250),
    "after_nms": (60, 100),
    "score": 0.2,
    "detections": 25,
}
TRUTHS = [  # boxes and classes
    (np.array([[10, 20, 60, 80], [50, 5, 145, 120], [12, 30, 24, 38]], np.float32), np.array([1, 3, 2])),
    (np.array([[0, 0, 159, 117]], np.float32), np.array([2])),
]
GRADIENTS = (
    "backbone.body.layer3.0.conv2.weight",
    "backbone.fpn.inner_blocks.3.0.weight",
    "rpn.head.bbox_pred.weight",
    "roi_heads.box_head.fc7.weight",
    "roi_heads.box_predictor.bbox_pred.weight",
)

# ---- Weights and images ------------------------------------------------------------------------------------------------

GAINS = {  # of kernels, in place of sqrt(2): scores of all heights, and boxes away from their anchors but not everywhere
    "inner_blocks": 0.4,
    "layer_blocks": 1.0,
    "cls_logits": 1.0,
    "rpn.head.bbox_pred": 0.3,
    "cls_score": 3.0,
    "box_predictor.bbox_pred": 2.0,
}


def rng_of(name):
    """A generator whose numbers depend on the name alone."""
    return np.random.default_rng([2027, zlib.crc32(name.encode())])


def draw(name, shape, last_norm):
    """float32 array of a torchvision name, which alone decides it; what goes through the network keeps its size.

    Args:
        last_norm: the last BatchNorm of a residual block, "bn3" or "bn2": what a block adds is small.
    """
    rng = rng_of(name)
    if len(shape) > 1:
        gain = next((gain for part, gain in GAINS.items() if part in name), math.sqrt(2))
        value = rng.normal(size=shape)
        if name.startswith("roi_heads"):  # what all regions have in common does not decide their class
            value -= value.mean(axis=1, keepdims=True)
        value *= gain / math.sqrt(math.prod(shape[1:]))
    elif name.endswith(f"{last_norm}.weight"):
        value = rng.uniform(0.1, 0.3, shape)
    elif name.endswith("running_var") or (("bn" in name or "downsample.1" in name) and name.endswith("weight")):
        value = rng.uniform(0.5, 1.0, shape)
    else:
        value = 0.1 * rng.normal(size=shape)
    return value.astype(np.float32)


def draw_all(shapes):
    """{name: array} of {name: shape}."""
    last_norm = "bn3" if "backbone.body.layer1.0.bn3.weight" in shapes else "bn2"
    return {name: draw(name, tuple(shape), last_norm) for name, shape in shapes.items()}


def draw_images(padded, sizes):
    """float32 [N, 3, H, W] of a padded (height, width): waves and some noise over each content size, zero elsewhere."""
    rng = rng_of("images")
    batch = np.zeros((len(sizes), 3, *padded), np.float32)
    for image, (height, width) in zip(batch, sizes, strict=True):
        y, x = np.arange(height)[:, None] / height, np.arange(width) / width
        for channel in image:
            for _ in range(6):
                frequency_y, frequency_x = rng.uniform(-3, 3, 2)
                channel[:height, :width] += np.cos(2 * np.pi * (frequency_y * y + frequency_x * x + rng.uniform()))
            channel[:height, :width] += 0.3 * rng.normal(size=(height, width))
    return batch


# ---- Making the file ---------------------------------------------------------------------------------------------------


def choose(labels, name, count, wanted):
    """At most `count` indices of `wanted` labels, ascending."""
    candidates = np.flatnonzero(wanted(np.asarray(labels)))
    return np.sort(rng_of(name).permutation(candidates)[:count])


def inference(model, images):
    """{name: array} of all steps."""
    result, classes = model.infer(images, SIZES), CLASSES + 1
    arrays = {f"pyramid{level}": features.permute(0, 2, 3, 1) for level, features in enumerate(result.pyramid)}
    for level in range(len(result.pyramid)):
        arrays |= {f"objectness{level}": result.objectness[level], f"deltas{level}": result.deltas[level]}
    counts = [len(boxes) for boxes in result.proposals]
    for image, detections in enumerate(result.detections):
        arrays |= {f"{field}{image}": value for field, value in detections._asdict().items()}
        arrays[f"proposals{image}"] = result.proposals[image]
        arrays[f"proposal_scores{image}"] = result.proposal_scores[image]
        arrays[f"pooled{image}"] = result.pooled.split(counts)[image].permute(0, 2, 3, 1)[::5]
        arrays[f"class_logits{image}"] = result.class_logits.split(counts)[image]
        arrays[f"box_deltas{image}"] = result.box_deltas.split(counts)[image].reshape(-1, classes, 4)
    return arrays


def training(model, images):
    """{name: array} of samples, losses and gradients."""
    import torch
    from torch_boxes import anchor_targets, region_targets

    truths = [(torch.from_numpy(boxes).to(images), torch.from_numpy(labels)) for boxes, labels in TRUTHS]
    with torch.no_grad():
        pyramid = model.pyramid(images)
        anchors = model.anchors(images, pyramid)
        proposals, _ = model.proposals(*model.rpn_outputs(pyramid), anchors, SIZES, training=True)
    arrays, rpn_samples, region_samples = {}, [], []
    for image, (boxes, labels) in enumerate(truths):
        targets, _ = anchor_targets(torch.cat(anchors).to(images), boxes)
        classes, _ = region_targets(torch.cat([proposals[image], boxes]), boxes, labels)
        positive = choose(targets, f"positive{image}", 8, lambda label: label == 1)
        negative = choose(targets, f"negative{image}", 24, lambda label: label == 0)
        regions = [choose(classes, f"objects{image}", 8, lambda label: label > 0)]
        regions.append(choose(classes, f"background{image}", 16, lambda label: label == 0))
        rpn_samples.append((torch.from_numpy(positive), torch.from_numpy(negative)))
        region_samples.append(torch.from_numpy(np.sort(np.concatenate(regions))))
        arrays |= {f"proposals{image}": proposals[image], f"regions{image}": region_samples[image]}
        arrays |= {f"positive{image}": positive, f"negative{image}": negative}
    losses, _ = model.losses(images, SIZES, truths, rpn_samples, region_samples, proposals)
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    arrays |= {name: loss.detach() for name, loss in losses.items()}
    arrays |= {f"gradient/{name}": parameters[name].grad for name in GRADIENTS}
    return {f"training/{name}": value for name, value in arrays.items()}


def computed(dtype):
    """{name: array} of one precision, and {name: shape} of the weights."""
    import torch  # not at the top: tests import this file where there is no torch
    from torch_faster_rcnn import Settings, TorchFasterRCNN, draw_weights

    model = draw_weights(TorchFasterRCNN(CLASSES, **NETWORK, settings=Settings(**LIMITS))).to(dtype)
    images = torch.from_numpy(draw_images(PADDED, SIZES)).to(dtype)
    arrays = inference(model, images) | training(model, images)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return {name: np.asarray(value) for name, value in arrays.items()}, shapes


def main():
    """Compute in float64, see that float32 decides alike everywhere, write float32."""
    import torch

    goldens, shapes = computed(torch.float64)
    single, _ = computed(torch.float32)
    for name, value in goldens.items():
        np.testing.assert_allclose(single[name], value, rtol=1e-3, atol=1e-3, err_msg=name)
        print(
            f"{name:60} {value.shape} differs by {np.abs(single[name] - value).max():.1e} of {np.abs(value).max():.3g}"
        )
    goldens = {
        name: value.astype(np.float32 if value.dtype == np.float64 else np.int32) for name, value in goldens.items()
    }
    goldens["shapes"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **goldens)
    print(GOLDENS, GOLDENS.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
