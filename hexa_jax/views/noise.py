"""Random noise of the attack's size: tells an attack's direction from its length."""

import dataclasses
from typing import ClassVar

from hexa_jax.models.norm import ADVERSARIAL
from hexa_jax.views.base import Context, HardView, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(HardView):
    """The clean crops moved by random signs (l2: in a random direction).

    By the BatchNorm set that attacked crops use.
    """

    name: ClassVar[str] = "noise"
    scheme_name: ClassVar[str] = "noise"
    norm: ClassVar[str] = ADVERSARIAL

    def make(self, context: Context) -> View:
        return View(context.attack.noise(context.keys("noise"), context.crops))
