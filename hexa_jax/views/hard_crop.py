"""The hardest of several crops by the method's own loss (HVP: Ferreira et al., 2023)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from hexa_jax.views.base import Context, HardView, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardCrop(HardView):
    """Of `candidates` new crops in each crop's place, the one with the highest loss; labels stay.

    Attributes:
        candidates: crops to choose from, 2 or more; each costs a forward pass.
    """

    name: ClassVar[str] = "hard_crop"
    scheme_name: ClassVar[str] = "hard_crop"
    shows_clean_crop: ClassVar[bool] = False

    candidates: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 2:
            raise ValueError(
                f"views.hard_crop.candidates={self.candidates}: a choice needs 2 or more"
            )

    @property
    def crop_sets(self) -> int:
        return self.candidates

    def make(self, context: Context) -> View:
        sets = [context.new_crops(number) for number in range(self.candidates)]
        hardest = jnp.argmax(jnp.stack([context.losses(crops) for crops in sets]), axis=0)  # [N, V]
        chosen, first = [], 0
        for candidates in zip(*sets, strict=True):  # of one resolution
            count = candidates[0].shape[1]
            own = hardest[:, first : first + count, None, None, None]
            pick = candidates[0]
            for number, crops in enumerate(candidates[1:], start=1):
                pick = jnp.where(own == number, crops, pick)
            chosen.append(pick)
            first += count
        return View(jax.lax.stop_gradient(tuple(chosen)))
