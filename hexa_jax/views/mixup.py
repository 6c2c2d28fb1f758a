"""Mixup: blend each crop with another image's, and the labels alike (Zhang et al., 2018).

Legend: N rows, V crops, H W C image.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from hexa_jax.views.base import Context, HardView, View, fold_in
from hexa_jax.views.beta import sample_beta


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixup(HardView):
    """Blended crops, by the clean BatchNorm set; one lambda per crop.

    Attributes:
        probability: that an image is blended at all; otherwise it keeps its crops and its label.
        alpha: first parameter of lambda's Beta distribution.
        beta: second parameter.
    """

    name: ClassVar[str] = "mixup"
    scheme_name: ClassVar[str] = "mixup"
    mixes: ClassVar[bool] = True

    probability: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.probability <= 1:
            raise ValueError(f"views.mixup.probability={self.probability} must be from 0 to 1")
        if min(self.alpha, self.beta) <= 0:
            raise ValueError(
                f"views.mixup.alpha and beta must be positive, not {self.alpha} and {self.beta}"
            )

    def make(self, context: Context) -> View:
        keys, partner = context.keys("mixup"), context.partners()
        # [N]
        blended = jax.vmap(lambda key: jax.random.uniform(key))(fold_in(keys, 0)) < self.probability
        mixed, shares = [], []
        for number, x in enumerate(context.crops, start=1):
            uniform = jax.vmap(lambda key, x=x: jax.random.uniform(key, x.shape[1:2], x.dtype))(
                fold_in(keys, number)
            )
            # [N, V_r]
            lam = jnp.where(blended[:, None], sample_beta(uniform, self.alpha, self.beta), 1)
            share = lam[..., None, None, None]
            # Where lambda is 1 the image itself is taken, so that unblended images keep every bit.
            mixed.append(jnp.where(share == 1, x, share * x + (1 - share) * x[partner]))
            shares.append(lam)
        return View(jax.lax.stop_gradient(tuple(mixed)), jnp.concatenate(shares, axis=1), partner)
