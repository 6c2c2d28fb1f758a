"""Float crops in [0, 1] from a batch, on the device.

Scaled, or cut from a resident data set; then augmented.

Legend: N rows, V crops, S side of a crop.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hexa_jax.core.batch import Batch
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.augment import Photometric, augment
from hexa_jax.data.device_crop import random_resized_crop

GEOMETRY, PHOTOMETRY, TURNS = 0, 1, 2
# What `data.flip` says: probabilities of mirroring left and right, top and bottom.
FLIPS = {"none": (0.0, 0.0), "horizontal": (0.5, 0.0), "vertical": (0.0, 0.5), "both": (0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Crops of one size.

    Attributes:
        count: how many of each image.
        size: side in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
        flip, vertical_flip: probabilities of mirroring left and right, top and bottom.
        quarter_turns: whether to turn by 0 to 3 quarters, each as likely.

    Raises:
        ConfigError: a scale or ratio that no crop can have.
    """

    count: int
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                "crop scales are shares of the image with 0 < min <= max <= 1, not "
                f"{self.scale[0]} and {self.scale[1]}"
            )
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(
                f"data.aspect_ratio={self.ratio} must be (low, high) with 0 < low <= high"
            )


def crop_number(resolutions: Sequence[Resolution], key_crops: int, crop_set: int) -> int:
    """Return the number of a set's first crop in its example's random numbers."""
    own = sum(resolution.count for resolution in resolutions)
    return crop_set * own + (key_crops if crop_set else 0)


@dataclasses.dataclass(frozen=True)
class DeviceCrops:
    """Makes the network's input inside the jitted step.

    Attributes:
        resolutions: of the crops that the network learns from, key crops not counted.
        key_crops: crops that only a target encoder sees (0 or 1), of the first resolution's size.
        photometric: augmentation of each crop, in order, the key crop last.
        dtype: of the result.
    """

    resolutions: tuple[Resolution, ...]
    key_crops: int
    photometric: tuple[Photometric, ...]
    dtype: jnp.dtype = jnp.float32

    def online(
        self, keys: jax.Array, batch: Batch, data: jax.Array | None, crop_set: int = 0
    ) -> tuple[jax.Array, ...]:
        """Make crops of the examples `batch.index`.

        Args:
            keys: [N], one per example.
            batch: leaves [N, ...]; `crops` [N, sets * V_r, S, S, 3], set by set.
            data: uint8 [examples, H, W, 3] when the whole data set is on the device.
            crop_set: 0 for the crops that the method learns from, further ones for views that need
                others.

        Returns:
            Per resolution [N, V_r, S, S, 3].
        """
        crops, first = [], 0
        shift = crop_number(self.resolutions, self.key_crops, crop_set)
        for r, resolution in enumerate(self.resolutions):
            place = crop_set * resolution.count
            pixels = (
                None if data is not None else batch.crops[r][:, place : place + resolution.count]
            )
            number = shift + first
            crops.append(
                self._make(
                    keys, batch.index, pixels, data, resolution, first, resolution.count, number
                )
            )
            first += resolution.count
        return tuple(crops)

    def target(self, keys: jax.Array, batch: Batch, data: jax.Array | None) -> jax.Array:
        """Key crops [N, 1, S, S, 3] of the examples `batch.key_index`."""
        first = sum(resolution.count for resolution in self.resolutions)
        pixels = None if data is not None else batch.key_crops
        return self._make(
            keys, batch.key_index, pixels, data, self.resolutions[0], first, self.key_crops, first
        )

    def _make(
        self,
        keys: jax.Array,
        index: jax.Array,
        pixels: jax.Array | None,
        data: jax.Array | None,
        resolution: Resolution,
        first: int,
        count: int,
        number: int,
    ) -> jax.Array:
        """Augment crops by the settings `first` to `first + count - 1`.

        In one call where these are the same.

        `number` is what the first one's random numbers are drawn by.
        """
        settings = self.photometric[first : first + count]
        same = len(set(settings)) == 1
        groups = [range(count)] if same else [range(v, v + 1) for v in range(count)]
        made = []
        for group in groups:
            # [N * V]
            crop_keys = jnp.stack([_fold(keys, number + v) for v in group], axis=1).reshape(-1)
            if data is not None:
                images = jnp.repeat(data[index], len(group), axis=0)
                crops = random_resized_crop(
                    _fold(crop_keys, GEOMETRY),
                    images,
                    resolution.size,
                    resolution.scale,
                    resolution.ratio,
                    resolution.flip,
                    resolution.vertical_flip,
                    resolution.quarter_turns,
                    _fold(crop_keys, TURNS)
                    if resolution.vertical_flip or resolution.quarter_turns
                    else None,
                )
            else:
                assert pixels is not None
                chosen = pixels[:, group.start : group.stop]
                crops = chosen.reshape(-1, *chosen.shape[2:]).astype(self.dtype) / 255
            crops = augment(
                _fold(crop_keys, PHOTOMETRY), crops.astype(self.dtype), settings[group.start]
            )
            made.append(crops.reshape(len(index), len(group), *crops.shape[1:]))
        return jnp.concatenate(made, axis=1)


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
