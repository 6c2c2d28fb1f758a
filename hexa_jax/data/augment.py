"""Photometric augmentation on the device, keyed per image.

Color jitter, grayscale, Gaussian blur and solarization.

Legend: N crop images, H W rows and columns, 3 channels (red, green, blue), S either of H and W.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

MATRIX_UNIT = 128  # rows and columns of a TPU's
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision
LIMITS = {"brightness": 10, "contrast": 10, "saturation": 10, "hue": 0.5}  # of settings; others: 1
JITTER = ("brightness", "contrast", "saturation", "hue")
# One column of uniform numbers each. All are drawn always, so a switched-off operation leaves the
# others as they are.
DRAWS = (
    "jitter",
    *JITTER,
    *(f"{name}_turn" for name in JITTER),
    "gray",
    "blur",
    "sigma",
    "solarize",
)


@dataclasses.dataclass(frozen=True)
class Photometric:
    """Static settings of `augment`; the defaults are MoCo-v2's.

    Attributes:
        jitter_probability: chance of the colour jitter, all four operations together.
        brightness, contrast, saturation: strength s; the factor is uniform in [max(0, 1-s), 1+s].
        hue: strength in [0, 0.5], in turns of the colour circle; the shift is uniform in [-hue,
            hue].
        gray_probability, blur_probability: chance of replacing the colours by their grey; of the
            blur.
        blur_sigma: (low, high) of its uniform standard deviation, in pixels of the crop.
        solarize_probability: chance of inverting the values at or above `solarize_threshold` (in
            [0, 1]).

    A probability or strength of 0 removes the operation from the compiled program.
    """

    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    solarize_threshold: float = 0.5

    def __post_init__(self):
        # hashable, also from a config's list
        object.__setattr__(self, "blur_sigma", tuple(self.blur_sigma))
        if len(self.blur_sigma) != 2 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            raise ValueError(
                "Photometric.blur_sigma must be (low, high), 0 < low <= high, got "
                f"{self.blur_sigma}"
            )
        for name, value in vars(self).items():
            if name != "blur_sigma" and not 0 <= value <= LIMITS.get(name, 1):
                raise ValueError(
                    f"Photometric.{name} must be between 0 and {LIMITS.get(name, 1)}, got {value}"
                )


def augment(keys: jax.Array, x: jax.Array, settings: Photometric) -> jax.Array:
    """Distorts each image by its own key: colour jitter, then grey, then blur, then solarisation.

    Row n of the result depends on keys[n] and x[n] alone: neither batch size, position nor sharding
    matters.

    Args:
        keys: typed threefry PRNG keys [N], one per crop image.
        x: float32 or float64 [N, H, W, 3] in [0, 1]; the random numbers are the same for both
            types.
        settings: static; pass it by closure or as a static argument of `jit`.

    Returns:
        Like x: same shape and type, in [0, 1]. An image that a draw spares comes back bit for bit.

    Raises:
        ValueError: keys or x are not as described.

    The colour jitter is torchvision's ColorJitter on float tensors, in random order, clamped after
    each operation. The blur is a true Gaussian cut at 4 sigma or more, which repeats the edge
    pixels outwards as PIL's GaussianBlur does.
    """
    if (
        x.ndim != 4
        or x.shape[-1] != 3
        or x.dtype not in (jnp.float32, jnp.float64)
        or keys.shape != x.shape[:1]
    ):
        got = f"{x.dtype} {list(x.shape)} and {list(keys.shape)}"
        raise ValueError(
            "augment needs float32 or float64 images [N, H, W, 3] and one key per image [N], got "
            f"{got}"
        )
    uniform = uniform_per_key(keys, len(DRAWS)).astype(x.dtype)
    # [N, 1, 1] each
    u = {name: uniform[:, column, None, None] for column, name in enumerate(DRAWS)}
    rgb = tuple(x[..., channel] for channel in range(3))  # [N, H, W] each
    if settings.jitter_probability:
        rgb = _color_jitter(u, rgb, settings)
    if settings.gray_probability:
        rgb = tuple(
            jnp.where(u["gray"] < settings.gray_probability, _grey(rgb), channel) for channel in rgb
        )
    if settings.blur_probability:
        low, high = settings.blur_sigma
        sigma, apply = low + (high - low) * u["sigma"], u["blur"] < settings.blur_probability
        rgb = _blur(rgb, sigma, apply, radius=math.ceil(4 * high))
    x = jnp.stack(rgb, axis=-1)
    if settings.solarize_probability:
        apply = (u["solarize"] < settings.solarize_probability)[..., None]
        x = jnp.where(apply & (x >= settings.solarize_threshold), 1 - x, x)
    return x


def uniform_per_key(keys: jax.Array, count: int) -> jax.Array:
    """Draw float32 [N, count] in [0, 1), row n from the typed key keys[n] alone.

    Raises:
        ValueError: keys of another kind than threefry.
    """
    threefry = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype
    if keys.dtype != threefry or keys.ndim != 1:
        # rbg keys are no good: when vmapped, all rows draw from the first key
        raise ValueError(
            f"needs typed threefry keys [N] (jax.random.key), got {keys.dtype} {list(keys.shape)}"
        )
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)


def _color_jitter(u, rgb, settings):
    """Apply four operations in random order without branches.

    The order of four uniform numbers gives each operation's turn.

    Hue stands in the middle, computed once. On either side of it the others have slots for every
    order, brightness saturation brightness, contrast, brightness saturation brightness; a slot
    whose turn it is not has factor 1.
    """
    active = u["jitter"] < settings.jitter_probability

    def before(first, second):
        return u[f"{first}_turn"] < u[f"{second}_turn"]

    def apply(operation, rgb, name, here):
        strength = getattr(settings, name)
        low, high = max(0.0, 1 - strength), 1 + strength
        return (
            operation(rgb, jnp.where(active & here, low + (high - low) * u[name], 1))
            if strength
            else rgb
        )

    def brightness_and_saturation(rgb, brightness_here, saturation_here):
        first = before("brightness", "saturation")
        rgb = apply(_brightness, rgb, "brightness", brightness_here & first)
        rgb = apply(_saturation, rgb, "saturation", saturation_here)
        return apply(_brightness, rgb, "brightness", brightness_here & ~first)

    def all_but_hue(rgb, brightness_here, contrast_here, saturation_here):
        b, s = before("brightness", "contrast"), before("saturation", "contrast")
        rgb = brightness_and_saturation(rgb, brightness_here & b, saturation_here & s)
        rgb = apply(_contrast, rgb, "contrast", contrast_here)
        return brightness_and_saturation(rgb, brightness_here & ~b, saturation_here & ~s)

    if not settings.hue:
        return all_but_hue(rgb, True, True, True)
    before_hue = [before(name, "hue") for name in JITTER[:3]]
    rgb = all_but_hue(rgb, *before_hue)
    shifted = _hue(rgb, settings.hue * (2 * u["hue"] - 1))
    rgb = tuple(jnp.where(active, new, old) for new, old in zip(shifted, rgb, strict=True))
    return all_but_hue(rgb, *(~here for here in before_hue))


def _grey(rgb):
    return sum(weight * channel for weight, channel in zip(GRAY, rgb, strict=True))


def _brightness(rgb, factor):
    return tuple(jnp.minimum(factor * channel, 1) for channel in rgb)


def _contrast(rgb, factor):
    return _blend(rgb, factor, jnp.mean(_grey(rgb), axis=(1, 2), keepdims=True))


def _saturation(rgb, factor):
    return _blend(rgb, factor, _grey(rgb))


def _blend(rgb, factor, other):
    return tuple(jnp.clip(factor * channel + (1 - factor) * other, 0, 1) for channel in rgb)


def _hue(rgb, turns):
    """Rotate the hue in HSV space by `turns`; value and chroma stay."""
    r, g, b = rgb
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    per_chroma = 1 / jnp.maximum(chroma, 1e-12)  # grey has no hue: any angle does
    # Not `value == r`: XLA may compute the two by different roundings, and then an equal pair is
    # not equal.
    sextant = jnp.where(g >= b, 2 + (b - r) * per_chroma, 4 + (r - g) * per_chroma)
    angle = jnp.where((r >= g) & (r >= b), (g - b) * per_chroma, sextant) + 6 * turns

    def channel(corner):
        k = angle + corner
        # `%` would call the C library's fmod, one pixel at a time, on a CPU
        k = k - 6 * jnp.floor(k / 6)
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return channel(5), channel(3), channel(1)


def _blur(rgb, sigma, apply, radius):
    """Blur three planes [N, H, W] by two products with banded matrices.

    Channel by channel: one product for all of them takes a copy before and after, and on a TPU a
    third more time.
    """
    H, W = rgb[0].shape[1:]
    down, along = (_blur_matrix(sigma, apply, size, radius) for size in (H, W))

    def blur(x):
        # highest: else TPUs and new GPUs round pixels to 8 or 11 bits; this keeps float32, and the
        # identity exact
        bands = [
            jnp.einsum("nij,njl->nil", down[:, rows, near], x[:, near], precision="highest")
            for rows, near in _bands(H, radius)
        ]
        x = jnp.einsum("nil,nkl->nik", jnp.concatenate(bands, axis=1), along, precision="highest")
        return jnp.clip(x, 0, 1)  # weights sum to 1 only up to rounding

    return tuple(map(blur, rgb))


def _bands(size, radius):
    """Split the rows into parts of `size`, each with the rows that reach it.

    They fill a matrix unit: the rest of the matrix is zero.
    """
    room = MATRIX_UNIT - 2 * radius
    count = math.ceil(size / room) if size > MATRIX_UNIT and room >= MATRIX_UNIT // 2 else 1
    edges = [size * part // count for part in range(count + 1)]
    return [
        (slice(i, j), slice(max(0, i - radius), min(size, j + radius)))
        for i, j in itertools.pairwise(edges)
    ]


def _blur_matrix(sigma, apply, size, radius):
    """Return blur matrices [N, S, S]: row i has the weights of output i.

    The edge pixel takes the weights outside; sigma and apply are [N, 1, 1].
    """

    def weight(distance):
        return jnp.where(
            distance <= radius, jnp.exp(-0.5 * (distance.astype(sigma.dtype) / sigma) ** 2), 0
        )

    i, j, d = (
        np.arange(size)[None, :, None],
        np.arange(size)[None, None, :],
        np.arange(radius + 1)[None, None, :],
    )
    # [N, S, 1], beyond the first pixel
    outside = jnp.sum(jnp.where(d > i, weight(d), 0), axis=2, keepdims=True)
    matrix = weight(abs(i - j)) + outside * (j == 0) + outside[:, ::-1] * (j == size - 1)
    matrix = matrix / (2 * jnp.sum(weight(d), axis=2, keepdims=True) - 1)  # weight(0) = 1
    return jnp.where(apply, matrix, (i == j).astype(sigma.dtype))
