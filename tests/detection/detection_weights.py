"""Weights and images that tests of detectors share, drawn with NumPy by name alone."""

import math
import zlib

import numpy as np

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
