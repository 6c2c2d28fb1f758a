"""Networks of Faster R-CNN with a feature pyramid (FPN), in torchvision's geometry.

Legend: N images, H W of a map, D channels of the pyramid, R regions of an image, A anchors of a
    cell, C classes without background.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from hexa_jax.models.norm import EVALUATION, BatchNorm, NormMode
from hexa_jax.models.resnet import ResNet

STRIDE = 32  # of the coarsest stage: inputs are padded to a multiple of it

# Detectron2's "c2_xavier": uniform in +-sqrt(3 / fan_in).
xavier = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class FeaturePyramid(nn.Module):
    """Turn maps of the four stages into five of D channels, finest first.

    The fifth is every second cell of the fourth.

    Attributes:
        dim: D.
        batch_norm: a BatchNorm behind each convolution, which then has no bias.
        dtype: compute precision.
    """

    dim: int
    batch_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, stages: Sequence[jax.Array], mode: NormMode) -> list[jax.Array]:
        def conv(x: jax.Array, size: int, name: str) -> jax.Array:
            y = nn.Conv(
                self.dim,
                (size, size),
                padding=size // 2,
                use_bias=not self.batch_norm,
                dtype=self.dtype,
                kernel_init=xavier,
                name=name,
            )(x)
            return BatchNorm(self.dtype, name=f"{name}_bn")(y, mode) if self.batch_norm else y

        above = None
        maps: list[jax.Array] = []
        for level, stage in reversed(list(enumerate(stages))):
            merged = conv(stage, 1, f"inner{level}")
            if above is not None:
                merged += jnp.repeat(jnp.repeat(above, 2, axis=1), 2, axis=2)
            above = merged
            maps.insert(0, conv(merged, 3, f"layer{level}"))
        return [*maps, maps[-1][:, ::2, ::2]]


class ProposalHead(nn.Module):
    """Predict objectness [N, H * W * A] and box deltas [N, H * W * A, 4] of each anchor.

    From a map [N, H, W, D]; both are float32.
    """

    num_anchors: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def conv(x: jax.Array, features: int, size: int, name: str) -> jax.Array:
            init = nn.initializers.normal(0.01)
            return nn.Conv(
                features,
                (size, size),
                padding=size // 2,
                dtype=self.dtype,
                kernel_init=init,
                name=name,
            )(x)

        hidden = nn.relu(conv(x, x.shape[-1], 3, "conv"))
        objectness = _wide(conv(hidden, self.num_anchors, 1, "objectness"))
        deltas = _wide(conv(hidden, 4 * self.num_anchors, 1, "deltas"))
        return objectness.reshape(len(x), -1), deltas.reshape(len(x), -1, 4)


class BoxHead(nn.Module):
    """Predict class scores and box deltas of pooled regions [R, 7, 7, D].

    float32 [R, C + 1] (0 is background) and [R, C + 1, 4].

    Attributes:
        num_classes: C.
        hidden: width of the two hidden layers.
        batch_norm: a BatchNorm behind each of them.
        dtype: compute precision.
    """

    num_classes: int
    hidden: int
    batch_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mode: NormMode) -> tuple[jax.Array, jax.Array]:
        x = x.astype(self.dtype).reshape(len(x), -1)
        for layer in (1, 2):
            x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=xavier, name=f"linear{layer}")(
                x
            )
            if self.batch_norm:
                x = BatchNorm(self.dtype, name=f"bn{layer}")(x, mode)
            x = nn.relu(x)
        outputs = self.num_classes + 1
        scores = nn.Dense(
            outputs, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01), name="scores"
        )(x)
        deltas = nn.Dense(
            4 * outputs, dtype=self.dtype, kernel_init=nn.initializers.normal(0.001), name="deltas"
        )(x)
        return _wide(scores), _wide(deltas).reshape(-1, outputs, 4)


class Detector(nn.Module):
    """Backbone, pyramid and heads; boxes are made outside, from what its methods return.

    Attributes:
        backbone: the ResNet, "imagenet" stem.
        num_classes: C.
        pixel_mean: per-channel mean of the pixels in [0, 1].
        pixel_std: per-channel standard deviation.
        frozen_stages: how many of the backbone's stem and four stages read running statistics in
            training, too.
        dim: D, 256 in torchvision and detectron2.
        hidden: width of the box head, there 1024.
        pyramid_norm: BatchNorm in the pyramid.
        head_norm: BatchNorm in the box head.
        dtype: compute precision of pyramid and heads.
    """

    backbone: ResNet
    num_classes: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    frozen_stages: int = 0
    dim: int = 256
    hidden: int = 1024
    pyramid_norm: bool = False
    head_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.fpn = FeaturePyramid(self.dim, self.pyramid_norm, self.dtype)
        self.rpn = ProposalHead(dtype=self.dtype)
        self.box = BoxHead(self.num_classes, self.hidden, self.head_norm, self.dtype)

    def __call__(self, images: jax.Array, sizes: jax.Array) -> None:
        """Makes all parameters."""
        pyramid = self.pyramid(images, sizes, EVALUATION, EVALUATION)
        self.proposals(pyramid)
        self.regions(jnp.zeros((1, 7, 7, self.dim), self.dtype), EVALUATION)

    def normalised(self, images: jax.Array, sizes: jax.Array) -> jax.Array:
        """Normalize pixels [N, H, W, 3], uint8 or float in [0, 1].

        0 outside the content `sizes` [N, 2].
        """
        pixels = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        mean, std = (
            jnp.asarray(v, pixels.dtype).reshape(1, 1, 1, 3)
            for v in (self.pixel_mean, self.pixel_std)
        )
        rows = jnp.arange(images.shape[1])[None] < sizes[:, :1]
        columns = jnp.arange(images.shape[2])[None] < sizes[:, 1:]
        return jnp.where((rows[:, :, None] & columns[:, None])[..., None], (pixels - mean) / std, 0)

    def pyramid(
        self, images: jax.Array, sizes: jax.Array, backbone_mode: NormMode, mode: NormMode
    ) -> list[jax.Array]:
        """Five maps [N, H / s, W / s, D], s = 4, 8, 16, 32, 64.

        Args:
            images: [N, H, W, 3], content top left, sides multiples of STRIDE.
            sizes: int [N, 2] height and width of the content.
            backbone_mode: how the backbone normalises.
            mode: how the pyramid does, where it does.
        """
        if images.shape[1] % STRIDE or images.shape[2] % STRIDE:
            raise ValueError(
                f"detection needs sides that are multiples of {STRIDE}, not {images.shape[1:3]}"
            )
        stages = self.backbone.stages(
            self.normalised(images, sizes), backbone_mode, self.frozen_stages
        )
        return self.fpn(stages, mode)

    def proposals(self, pyramid: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        """`ProposalHead` of each map, with shared weights."""
        return [self.rpn(level) for level in pyramid]

    def regions(self, pooled: jax.Array, mode: NormMode) -> tuple[jax.Array, jax.Array]:
        """`BoxHead` of pooled regions [R, 7, 7, D]."""
        return self.box(pooled, mode)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))
