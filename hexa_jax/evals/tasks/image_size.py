"""The size of images that a network is evaluated at: its own, unless the evaluation names one."""

from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.image_size import IMAGENET, LARGER, trained_size, with_margin


def size_after_change(size: tuple[int, int], before: int, after: int) -> tuple[int, int]:
    """Return the evaluation's image size for networks whose largest training crop has changed.

    Args:
        size: short side and centre crop in pixels that suited the crop before.
        before: largest training crop, in pixels.
        after: the same after the change.

    Returns:
        `size` where it still suits, else `size` in proportion to the crop.
    """
    resize, crop = size
    if after <= crop <= LARGER * after:
        return size
    return max(round(resize * after / before), 1), max(round(crop * after / before), 1)


def with_size(config: ConfigDict, run: ConfigDict | None) -> ConfigDict:
    """An evaluation's config with `data.resize` and `data.crop` filled in; says what it chose.

    Where both are 0, they suit the network; where one is, it follows from the other.

    Args:
        config: of the evaluation; it stays as it is.
        run: config of the pre-training run, or None.

    Raises:
        ConfigError: a negative size.
    """
    resize, crop = config.data.resize, config.data.crop
    if min(resize, crop) < 0:
        given = f"data.resize={resize} and data.crop={crop}"
        raise ConfigError(f"{given} must be pixels, or 0: as the network was trained")
    if resize and crop:
        return config
    if crop:
        resize, crop = with_margin(crop)
    elif resize:
        crop = max(round(resize * IMAGENET[1] / IMAGENET[0]), 1)
    else:
        resize, crop = trained_size(run)
    chosen = config.copy_and_resolve_references()
    chosen.data.resize, chosen.data.crop = resize, crop
    what = "squashed to" if config.data.squash else "centre crop"
    why = "as usual for ImageNet"
    if run is not None:
        why = f"for a network trained on {max(run.data.crop_size)}-pixel crops"
    log(
        f"images: short side {resize}, {what} {crop} pixels, {why}; --config.data.resize and "
        "--config.data.crop change it"
    )
    return chosen
