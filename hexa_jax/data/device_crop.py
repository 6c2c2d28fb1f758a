"""Random resized crops and flips on the device, for small data sets that live there whole.

Legend: N crop images, H W rows and columns of the input, S rows and columns of the output, C
    channels.
"""

import math

import jax
import jax.numpy as jnp

from hexa_jax.data.augment import uniform_per_key

TRIES = 10  # torchvision's


def random_resized_crop(
    keys: jax.Array,
    images: jax.Array,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    vertical_flip: float = 0.0,
    quarter_turns: bool = False,
    turn_keys: jax.Array | None = None,
) -> jax.Array:
    """Cut a random box out of each image, by its own key, and resize it with antialiasing.

    Row n of the result depends on keys[n], turn_keys[n] and images[n] alone.

    Args:
        keys: typed threefry PRNG keys [N].
        images: [N, H, W, C], uint8 in 0..255 or float in [0, 1].
        size: S, in pixels.
        scale: (low, high) of the box's area as a share of the image's, 0 < low <= high.
        ratio: (low, high) of the box's width / height, drawn log-uniformly.
        flip: probability of mirroring left and right.
        vertical_flip: probability of mirroring top and bottom.
        quarter_turns: whether to turn by 0, 1, 2 or 3 quarters counter-clockwise, each as likely.
        turn_keys: typed threefry PRNG keys [N] of the last two, which need them; the box and the
            left-right flip are drawn by `keys` and do not change with these settings.

    Returns:
        float32 [N, S, S, C] in [0, 1].

    Raises:
        ValueError: an argument is not as described.

    The box is torchvision's RandomResizedCrop (whole pixels, 10 tries, else the central crop
    nearest to the ratio); the resize is PIL's `crop(box).resize((S, S), BILINEAR)` without its
    rounding to whole grey levels.
    """
    _check(keys, images, size, scale, ratio)
    if (vertical_flip or quarter_turns) and (turn_keys is None or turn_keys.shape != keys.shape):
        raise ValueError("vertical flips and quarter turns need turn_keys, one per image")
    height, width = images.shape[1:3]
    uniform = uniform_per_key(keys, 2 * TRIES + 3)
    top, left, box_height, box_width = random_box(uniform[:, :-1], height, width, scale, ratio)
    mirror = uniform[:, -1] < flip
    upside_down, transposed = jnp.zeros(keys.shape, bool), None
    if vertical_flip or quarter_turns:
        assert turn_keys is not None  # see _check
        u_vertical, u_turn = uniform_per_key(turn_keys, 2).T
        upside_down = u_vertical < vertical_flip
        if quarter_turns:
            # A quarter turn is a mirror image of the transposed crop, half a turn mirrors both
            # axes.
            turns = jnp.floor(4 * u_turn)
            mirror ^= (turns == 1) | (turns == 2)
            upside_down ^= (turns == 2) | (turns == 3)
            transposed = ((turns == 1) | (turns == 3))[:, None, None, None]
    rows = _resize_matrix(top, box_height, upside_down, height, size)
    columns = _resize_matrix(left, box_width, mirror, width, size)
    x = (
        images.astype(jnp.float32) / 255
        if images.dtype == jnp.uint8
        else images.astype(jnp.float32)
    )
    x = jnp.einsum("nsh,nhwc->nswc", rows, x, precision="highest")
    x = jnp.einsum("ntw,nswc->nstc", columns, x, precision="highest")
    if transposed is not None:
        x = jnp.where(transposed, x.swapaxes(1, 2), x)
    return jnp.clip(x, 0, 1)  # weights sum to 1 only up to rounding


def random_box(uniform, height, width, scale, ratio):
    """Draw boxes (top, left, height, width) as torchvision does, from uniform [N, 22].

    Whole float32 numbers [N] each.
    """
    area, shape, place = uniform[:, :TRIES], uniform[:, TRIES : 2 * TRIES], uniform[:, 2 * TRIES :]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = jnp.exp(low + (high - low) * shape)
    w, h = jnp.round(jnp.sqrt(area * shape)), jnp.round(jnp.sqrt(area / shape))  # [N, TRIES]
    valid = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = valid & (jnp.cumsum(valid, axis=1) == 1)
    found = jnp.any(valid, axis=1)
    fallback_w, fallback_h = width, height
    if width / height < min(ratio):
        fallback_h = round(width / min(ratio))
    elif width / height > max(ratio):
        fallback_w = round(height * max(ratio))
    w = jnp.where(found, jnp.sum(jnp.where(first, w, 0), axis=1), fallback_w)
    h = jnp.where(found, jnp.sum(jnp.where(first, h, 0), axis=1), fallback_h)
    top = jnp.where(found, jnp.floor(place[:, 0] * (height - h + 1)), (height - fallback_h) // 2)
    left = jnp.where(found, jnp.floor(place[:, 1] * (width - w + 1)), (width - fallback_w) // 2)
    # u < 1, but its product with a whole number can round up to it
    return jnp.minimum(top, height - h), jnp.minimum(left, width - w), h, w


def _resize_matrix(start, length, mirror, size_in, size_out):
    """Return resize matrices [N, size_out, size_in] over boxes [start, start + length)."""
    start, length = start[:, None, None], length[:, None, None]
    source = jnp.arange(size_in, dtype=jnp.float32)[None, None, :]
    target = jnp.arange(size_out, dtype=jnp.float32)[None, :, None]
    target = jnp.where(mirror[:, None, None], size_out - 1 - target, target)
    step = length / size_out
    centre = start + (target + 0.5) * step
    weight = jnp.maximum(1 - jnp.abs(source + 0.5 - centre) / jnp.maximum(step, 1), 0)
    weight = jnp.where((source >= start) & (source < start + length), weight, 0)
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def _check(keys, images, size, scale, ratio):
    if images.ndim != 4 or not (
        images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating)
    ):
        raise ValueError(
            f"random_resized_crop needs uint8 or float images [N, H, W, C], got {images.dtype} "
            f"{list(images.shape)}"
        )
    if keys.shape != images.shape[:1]:
        raise ValueError(
            f"random_resized_crop needs one key per image, got {list(keys.shape)} for "
            f"{list(images.shape)}"
        )
    if size < 1:
        raise ValueError(f"the size of a crop must be at least 1 pixel, got {size}")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(
            f"the scale of a crop must be (low, high) with 0 < low <= high, got {tuple(scale)}"
        )
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(
            f"the ratio of a crop must be (low, high) with 0 < low <= high, got {tuple(ratio)}"
        )
