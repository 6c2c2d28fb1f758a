"""Adversarial views: crops moved uphill on the method's own loss (equations 5 to 7)."""

import dataclasses
from typing import ClassVar

from hexa_jax.models.norm import ADVERSARIAL
from hexa_jax.views.base import Context, HardView, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversarial(HardView):
    """The attacked crops, by the adversarial BatchNorm set; labels stay."""

    name: ClassVar[str] = "adversarial"
    scheme_name: ClassVar[str] = "adv"
    norm: ClassVar[str] = ADVERSARIAL
    attacks: ClassVar[bool] = True

    def make(self, context: Context) -> View:
        return View(context.attacked)
