"""ResNet with torchvision's geometry and initialization.

Padding is explicit, and the 3x3 convolution has the stride.

'SAME' padding would shift every strided convolution by a pixel against torch, and weights could not
be exchanged.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hexa_jax.models.norm import EVALUATION, BatchNorm, NormMode
from hexa_jax.models.pooling import max_pool

STAGES = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
STEMS = ("imagenet", "cifar", "small")

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv_of_any_map(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **settings: Any
) -> jax.Array:
    """Convolve as `nn.Conv` asks.

    Over a map smaller than its kernel the convolution becomes a product of patches.

    XLA's convolution takes ten times as long for such maps on a CPU: 3x3 over 2x2, the last stage
    of images of 64 pixels.
    """
    height, width, channels, features = kernel.shape
    if set(strides) != {1} or min(height - x.shape[1], width - x.shape[2]) < 1:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    sides = x.shape[1] - height + 1, x.shape[2] - width + 1
    places = itertools.product(range(height), range(width))
    patches = jnp.concatenate(
        [x[:, i : i + sides[0], j : j + sides[1]] for i, j in places], axis=-1
    )
    return patches @ kernel.reshape(height * width * channels, features)


def make_conv(features: int, size: int, stride: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=he_normal,
        conv_general_dilated=_conv_of_any_map,
        name=name,
    )


@jax.custom_vjp
def _narrow_gradient(x: jax.Array) -> jax.Array:
    """Return x, and keep its gradient in its dtype until it has arrived.

    XLA would widen it before the stem sorts its blocks back.
    """
    return x


_narrow_gradient.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


class StemConv(nn.Module):
    """Compute torchvision's first convolution, 7x7 with stride 2, as a 4x4 one of 2x2 blocks.

    The same sums: three channels fill a matrix unit badly, twelve do better. Sides must be even.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num, height, width, channels = x.shape
        kernel = self.param("kernel", he_normal, (7, 7, channels, self.features)).astype(self.dtype)
        # A row and a column of zeros in front make it 8x8, whose taps fall on 4x4 blocks, two
        # blocks above the centre first.
        kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(
            4, 2, 4, 2, channels, self.features
        )
        kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * channels, self.features)
        x = _narrow_gradient(x)
        blocks = x.reshape(num, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        blocks = blocks.reshape(num, height // 2, width // 2, 4 * channels)
        return jax.lax.conv_general_dilated(
            blocks, kernel, (1, 1), ((2, 1), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class Block(nn.Module):
    """Residual block of [N, H, W, C].

    Two 3x3 convolutions, or 1x1, 3x3 and 1x1 with four times the channels.
    """

    channels: int
    stride: int
    bottleneck: bool
    dtype: jnp.dtype
    auxiliary_norm: bool
    zero_init_residual: bool

    @nn.compact
    def __call__(self, x: jax.Array, mode: NormMode) -> jax.Array:
        out_channels = self.channels * (4 if self.bottleneck else 1)
        plan = [(1, 1), (3, self.stride), (1, 1)] if self.bottleneck else [(3, self.stride), (3, 1)]
        y = x
        for i, (size, stride) in enumerate(plan, start=1):
            last = i == len(plan)
            y = make_conv(
                out_channels if last else self.channels, size, stride, self.dtype, f"conv{i}"
            )(y)
            scale = 0.0 if last and self.zero_init_residual else 1.0
            y = BatchNorm(self.dtype, self.auxiliary_norm, scale, name=f"bn{i}")(y, mode)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = make_conv(out_channels, 1, self.stride, self.dtype, "downsample_conv")(x)
            x = BatchNorm(self.dtype, self.auxiliary_norm, name="downsample_bn")(x, mode)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Backbone: [N, H, W, 3] normalised images -> pooled features [N, feature_dim].

    Attributes:
        depth: 10, 18, 34, 50 or 101 (10 is for tests and small experiments).
        base_channels: channels of the stem; 64 is standard, 128 is the "w2" network.
        stem: "imagenet" (7x7 stride 2, max-pool), "cifar" (3x3 stride 1) or "small" (3x3 stride 2,
            for images of 32 to 64 pixels on a CPU: a quarter of the cifar stem's work, and still a
            map of 2x2 behind 32 pixels).
        dtype: compute precision; parameters stay float32.
        auxiliary_norm: whether each BatchNorm has an adversarial set.
        zero_init_residual: start each block as the identity.
    """

    depth: int = 50
    base_channels: int = 64
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32
    auxiliary_norm: bool = False
    zero_init_residual: bool = False

    @property
    def feature_dim(self) -> int:
        """Length of the pooled feature."""
        return self.base_channels * 8 * (4 if self.depth >= 50 else 1)

    def __call__(self, x: jax.Array, mode: NormMode, grid: int = 1) -> jax.Array:
        """Average over the whole last map, or over grid x grid windows of it.

        Windows overlap as far as they can: for a 7 x 7 map and grid 2 they have side 6.
        """
        last = self.stages(x, mode)[-1].astype(jnp.promote_types(jnp.float32, self.dtype))
        if grid == 1:
            return last.mean(axis=(1, 2))
        window = tuple(side - grid + 1 for side in last.shape[1:3])
        if min(window) < 1:
            raise ValueError(
                f"a map of {last.shape[1]} x {last.shape[2]} has no {grid} x {grid} windows: use "
                "larger images"
            )
        return nn.avg_pool(last, window).reshape(len(last), -1)

    @nn.compact
    def stages(self, x: jax.Array, mode: NormMode, frozen: int = 0) -> Sequence[jax.Array]:
        """Return the feature maps [N, H, W, C] of the four stages.

        The first `frozen` of stem and stages read running statistics.
        """
        modes = [EVALUATION] * frozen + [mode] * (5 - frozen)
        x = x.astype(self.dtype)
        if self.stem in ("cifar", "small"):
            x = make_conv(
                self.base_channels, 3, 1 if self.stem == "cifar" else 2, self.dtype, "conv1"
            )(x)
        elif x.shape[1] % 2 or x.shape[2] % 2:
            x = make_conv(self.base_channels, 7, 2, self.dtype, "conv1")(x)
        else:
            x = StemConv(self.base_channels, self.dtype, name="conv1")(x)
        pool = max_pool if self.stem == "imagenet" else None
        x = nn.relu(BatchNorm(self.dtype, self.auxiliary_norm, name="bn1")(x, modes[0], pool))
        maps = []
        for stage, blocks in enumerate(STAGES[self.depth]):
            for i in range(blocks):
                x = Block(
                    channels=self.base_channels * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=self.depth >= 50,
                    dtype=self.dtype,
                    auxiliary_norm=self.auxiliary_norm,
                    zero_init_residual=self.zero_init_residual,
                    name=f"layer{stage + 1}_{i}",
                )(x, modes[stage + 1])
            maps.append(x)
        return maps


def make_resnet(name: str, base_channels: int = 64, **settings) -> ResNet:
    """Build a backbone from its name, such as resnet50 or resnet50w2 (twice as wide).

    ResNets of 10, 18, 34, 50 and 101 layers are known.

    Raises:
        ValueError: unknown name or stem.
    """
    match = re.fullmatch(r"resnet(\d+)(?:w(\d+))?", name)
    if match is None or int(match[1]) not in STAGES:
        known = ", ".join(f"resnet{depth}" for depth in STAGES)
        raise ValueError(
            f"unknown backbone {name!r}: use one of {known}, with an optional width such as "
            "resnet50w2"
        )
    if settings.get("stem", "imagenet") not in STEMS:
        raise ValueError(f"unknown stem {settings['stem']!r}: use one of {', '.join(STEMS)}")
    return ResNet(depth=int(match[1]), base_channels=base_channels * int(match[2] or 1), **settings)
