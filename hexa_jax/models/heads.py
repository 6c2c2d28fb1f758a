"""Projection heads, and the network that puts a backbone and a head together."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from hexa_jax.models.norm import BatchNorm, NormMode
from hexa_jax.models.resnet import ResNet

# torch's default for nn.Linear: uniform in +-1/sqrt(fan_in), kernel and bias.
torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int):
    """Initialiser of a bias that follows torch's nn.Linear."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class ProjectionHead(nn.Module):
    """Maps features [N, F] to [N, out_dim]: linear layers with ReLU, optionally BatchNorm, between.

    MoCo-v1 has one layer; MoCo-v2 two without BatchNorm, the hidden one as wide as the feature;
    SimCLR, DeepCluster-v2, SwAV and BYOL two with BatchNorm between; SimSiam three with BatchNorm
    behind each.

    Attributes:
        hidden_dim: Width of every layer but the last.
        out_dim: Width of the last layer.
        batch_norm: Whether BatchNorm precedes each ReLU.
        dtype: Compute precision.
        auxiliary_norm: Whether BatchNorm has an adversarial set.
        layers: Number of linear layers, 1 or more.
        output_norm: Whether BatchNorm without scale and bias follows the last layer.
    """

    hidden_dim: int
    out_dim: int
    batch_norm: bool
    dtype: jnp.dtype = jnp.float32
    auxiliary_norm: bool = False
    layers: int = 2
    output_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mode: NormMode) -> jax.Array:
        for layer in range(1, self.layers + 1):
            last = layer == self.layers
            width, bias_init = self.out_dim if last else self.hidden_dim, torch_bias(x.shape[-1])
            x = nn.Dense(
                width,
                dtype=self.dtype,
                kernel_init=torch_kernel,
                bias_init=bias_init,
                name=f"linear{layer}",
            )(x)
            if self.output_norm if last else self.batch_norm:
                norm = BatchNorm(
                    self.dtype, self.auxiliary_norm, affine=not last, name=f"bn{layer}"
                )
                x = norm(x, mode)
            if not last:
                x = nn.relu(x)
        return x


class Network(nn.Module):
    """Backbone and head on multi-resolution crops.

    Each resolution goes through the backbone in one call, with BatchNorm statistics of its own; the
    head sees all crops at once, as in DeepCluster-v2. Pixels in [0, 1] are normalised here, after
    any attack.

    Attributes:
        backbone: the ResNet.
        head: the projection head; None: outputs are the pooled features.
        pixel_mean: per-channel mean of the pixels in [0, 1].
        pixel_std: per-channel standard deviation.
        normalize: whether the outputs have unit length.
        predictor: a method's module behind the head, for the online network only.
    """

    backbone: ResNet
    head: ProjectionHead | None
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    normalize: bool = True
    predictor: nn.Module | None = None

    def __call__(
        self, crops: Sequence[jax.Array], mode: NormMode, predict: bool = True
    ) -> jax.Array:
        """Return outputs [N, V, D] of crops.

        Crops are one array [N, V_r, H, W, 3] per resolution, in order; V is the sum of all V_r.

        Args:
            crops: float pixels in [0, 1].
            mode: how BatchNorm normalizes.
            predict: whether the predictor, if there is one, is applied.
        """
        num = crops[0].shape[0]
        pooled = []
        for x in crops:
            features = self.features(x.reshape(-1, *x.shape[2:]), mode)
            pooled.append(features.reshape(num, x.shape[1], -1))
        stacked = jnp.concatenate(pooled, axis=1)  # [N, V, F]
        z = stacked.reshape(-1, stacked.shape[-1])
        if self.head is not None:
            z = self.head(z, mode)
        if self.predictor is not None and predict:
            z = self.predictor(z, mode)
        z = z.astype(jnp.promote_types(jnp.float32, z.dtype))
        if self.normalize:
            z = z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
        return z.reshape(num, stacked.shape[1], -1)

    def features(self, images: jax.Array, mode: NormMode, grid: int = 1) -> jax.Array:
        """Return features [N, grid * grid * F] of images [N, H, W, 3] in [0, 1].

        They are pooled as in `ResNet.__call__`.
        """
        shape = (1, 1, 1, 3)
        mean = jnp.asarray(self.pixel_mean, images.dtype).reshape(shape)
        std = jnp.asarray(self.pixel_std, images.dtype).reshape(shape)
        return self.backbone((images - mean) / std, mode, grid)
