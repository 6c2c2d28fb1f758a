"""Equation 10: the hard views, their weights in a step, and the divisor of the sum."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hexa_jax.models.norm import ADVERSARIAL, CLEAN, set_of_parameters
from hexa_jax.views.attack import Attack
from hexa_jax.views.base import OWN_CROP, HardView

Number: TypeAlias = float | jax.Array


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The hard views of a run.

    Attributes:
        views: in the order of their passes.
        attack: settings of the attack.
        average: whether the step divides equation 10 by the sum of the weights, so that it is as
            long as the plain method's.
        steps_per_epoch: turns the views' epochs into steps.
    """

    views: tuple[HardView, ...]
    attack: Attack
    average: bool = False
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        if self.replaced > 1 + 1e-9:
            raise ValueError("the shares views.*.replace add up to more than 1")
        if self.replaces_all and all(view.norm == ADVERSARIAL for view in self.views):
            raise ValueError(
                "views.*.replace leave no pass with the clean BatchNorm set, which evaluations "
                "use: replace fewer rows"
            )
        if self.attack.max_increase and any(view.name == "noise" for view in self.views):
            raise ValueError(
                "views.noise has views.epsilon's size: no control of an attack limited by "
                "views.max_increase"
            )
        own_crop = [view for view in self.views if view.target == OWN_CROP]
        if own_crop and any(view.replace for view in self.views):
            raise ValueError(
                f"views.{own_crop[0].name}.target={OWN_CROP} needs all clean crops: no view may "
                "replace any"
            )

    @property
    def attacks(self) -> bool:
        """Whether any view needs the attack."""
        return any(view.attacks for view in self.views)

    @property
    def mixes(self) -> bool:
        """Whether any view needs partners."""
        return any(view.mixes for view in self.views)

    @property
    def auxiliary_norm(self) -> bool:
        """Whether any view, or the attack on it, uses the adversarial BatchNorm set."""
        attacked_through = self.attacks and self.attack.norm_set == ADVERSARIAL
        return attacked_through or any(view.norm == ADVERSARIAL for view in self.views)

    @property
    def crop_sets(self) -> int:
        """Number of sets of clean crops that the input makes, those of views included."""
        return 1 + sum(view.crop_sets for view in self.views)

    def first_crop_set(self, view: HardView) -> int:
        """Number of a view's first own set of crops."""
        return 1 + sum(other.crop_sets for other in self.views[: self.views.index(view)])

    def start_step(self, view: HardView) -> int:
        """The first step (from 0) in which a view counts."""
        return round(view.start_epoch * self.steps_per_epoch)

    @property
    def phases(self) -> tuple[tuple[int, tuple[HardView, ...]], ...]:
        """Stretches of the run with the same views: (first step, views), the first from step 0."""
        starts = sorted({0} | {self.start_step(view) for view in self.views})
        return tuple(
            (start, tuple(view for view in self.views if self.start_step(view) <= start))
            for start in starts
        )

    def phase(self, step: int | jax.Array) -> int | jax.Array:
        """Return the number of the phase that step int32 lies in."""
        return sum((step >= start) * 1 for start, _ in self.phases[1:])

    def active(self, view: HardView, step: jax.Array) -> bool | jax.Array:
        """Return whether a view counts at step int32; True where it counts from the beginning."""
        start = self.start_step(view)
        return True if start == 0 else step >= start

    def auxiliary_norm_started(self, step: jax.Array) -> bool | jax.Array:
        """Return whether the adversarial BatchNorm set has had a pass by step int32.

        True, too, where no view uses that set.
        """
        starts = [self.start_step(view) for view in self.views if view.norm == ADVERSARIAL]
        return True if not starts or min(starts) == 0 else step >= min(starts)

    @property
    def replaced(self) -> float:
        """Share of the rows on which views take the clean one's place, once all count."""
        return sum(view.replace for view in self.views)

    @property
    def replaces_all(self) -> bool:
        """Whether views take the clean one's place on all rows, once all count."""
        return self.replaced > 1 - 1e-9

    def weights(self, step: jax.Array) -> dict[str, Number]:
        """Return the weight of each training pass at step int32, in order.

        The clean pass has what replaced rows leave of 1.
        """
        weights: dict[str, Number] = {}
        clean: Number = 1.0
        for view in self.views:
            weight: Number = view.weight
            start, ramp = self.start_step(view), round(view.ramp_epochs * self.steps_per_epoch)
            if ramp:
                weight = weight * jnp.clip((step + 1 - start) / ramp, 0, 1)
            elif start:
                weight = jnp.where(step >= start, weight, 0.0)
            weights[view.name] = weight
            if view.replace:
                clean = clean - (
                    view.replace if start == 0 else jnp.where(step >= start, view.replace, 0.0)
                )
        return {CLEAN: clean} | weights

    def _share(self, name: str, weight: Number) -> Number:
        """A pass's part in the sum of weights: its weight times its share of the rows."""
        return weight * next((view.row_share for view in self.views if view.name == name), 1.0)

    def divisors(self, step: jax.Array) -> dict[str | None, Number]:
        """Return the divisors of gradients per BatchNorm set, and (None) of all other parameters.

        Without `average` 1. A parameter that only some passes reach is divided by the weights of
        those, not of all: else the steps of each set's scale and bias would be shorter than the
        plain method's.
        """
        if not self.average:
            return {CLEAN: 1.0, ADVERSARIAL: 1.0, None: 1.0}
        shares = {name: self._share(name, weight) for name, weight in self.weights(step).items()}
        adversarial = {view.name for view in self.views if view.norm == ADVERSARIAL}
        total = sum(shares.values())
        own = sum(share for name, share in shares.items() if name in adversarial)
        tiny = 1e-12  # a set that no pass reaches yet has no gradient to divide
        return {CLEAN: _at_least(total - own, tiny), ADVERSARIAL: _at_least(own, tiny), None: total}

    def total_loss(self, losses: Mapping[str, jax.Array], step: jax.Array) -> jax.Array:
        """Equation 10 from each pass's loss at step int32, divided as its gradients are."""
        weights = self.weights(step)
        # A pass's loss is a sum over the rows it has, each with its share in the mean of all rows.
        total = losses[CLEAN] + sum(weights[view.name] * losses[view.name] for view in self.views)
        return total / self.divisors(step)[None]

    def divide(self, gradients: Any, step: jax.Array) -> Any:
        """Gradients of equation 10, a tree like the parameters, after the division."""
        divisors = self.divisors(step)
        sets = set_of_parameters(gradients)
        return jax.tree.map(lambda name, g: g / divisors[name or None], sets, gradients)


def _at_least(value: Number, least: float) -> Number:
    return jnp.maximum(value, least) if isinstance(value, jax.Array) else max(value, least)
