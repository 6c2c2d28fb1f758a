"""Projected gradient ascent on a method's own loss (equations 5 to 7).

Legend: N examples, V crops, H W C image. Pixels are in [0, 1]; epsilon and step sizes are in the
    same unit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hexa_jax.models.norm import ADVERSARIAL, CLEAN

IMAGE = (-3, -2, -1)  # the H, W, C axes of one crop image


def _l2_norm(x: jax.Array) -> jax.Array:
    """L2 norm [..., 1, 1, 1] of each crop image, safe to divide by."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=IMAGE, keepdims=True))
    return jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class Attack:
    """How strong an attack is and how it is made.

    The paper gives epsilon = eta = 1 without a unit. Our reading is one grey level of 255, as in
    AdvProp. A PyTorch port of AdvProp applies the same numbers as 2/255 of *normalized* pixels,
    about 0.45 of a grey level: the second reading. Under precision "bfloat16" the attack is made in
    float32, but the network rounds normalized pixels to 8 bits: a move of one level arrives as 0.9
    to 1.8 levels (computed over all 256 levels and ImageNet's means and deviations), and one of
    less than half a level may not arrive at all.

    Attributes:
        epsilon: radius of the ball around each crop image, in pixels of [0, 1]: 1/255 is one grey
            level.
        step_size: eta of equation 6, same unit.
        steps: number of ascent steps.
        norm: "linf" (a step moves every pixel by step_size) or "l2" (a step has length step_size
            per crop image).
        random_start: start from a uniform point of the ball.
        norm_set: BatchNorm set of the passes that make the attack: "adversarial" (AdvProp) or
            "clean".
        share_gradient: with norm_set "clean", take the first gradient from the clean training pass.
        max_increase: t of the adaptive radius min(epsilon, t / |gradient|), with the dual norm, in
            units of the loss: to first order no crop raises the sum of losses by more than t, at
            any age of the network. 0: always epsilon.

    Raises:
        ValueError: a setting that makes no sense, in one line that names it.
    """

    epsilon: float
    step_size: float
    steps: int = 1
    norm: str = "linf"
    random_start: bool = False
    norm_set: str = ADVERSARIAL
    share_gradient: bool = True
    max_increase: float = 0.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', not {self.norm!r}")
        if self.norm_set not in (CLEAN, ADVERSARIAL):
            raise ValueError(
                f"norm_set must be {CLEAN!r} or {ADVERSARIAL!r}, not {self.norm_set!r}"
            )
        if self.steps < 1:
            raise ValueError(f"an attack needs at least one step, not {self.steps}")
        if self.max_increase and self.random_start:
            raise ValueError(
                "max_increase limits the radius by the gradient at the image itself: no "
                "random_start with it"
            )
        if self.epsilon < 0 or self.step_size <= 0 or self.max_increase < 0:
            raise ValueError("epsilon and max_increase must be 0 or more, step_size positive")

    @property
    def shares_gradient(self) -> bool:
        """Whether the clean training pass's own backward also gives the attack's first gradient."""
        return self.norm_set == CLEAN and not self.random_start and self.share_gradient

    def start(self, keys: jax.Array, x: Any) -> Any:
        """Where the ascent begins: x, or a uniform point of the ball around each crop image.

        Args:
            keys: one typed key, or [N]; read only for a random start.
            x: array or pytree of arrays [N, (V,) H, W, C].
        """
        if not self.random_start:
            return x
        leaves, treedef = jax.tree.flatten(x)
        keys = keys if keys.ndim else jax.random.split(keys, leaves[0].shape[0])

        def start(position: int, center: jax.Array) -> jax.Array:
            def draw(key: jax.Array) -> jax.Array:
                direction_key, radius_key = jax.random.split(key)
                if self.norm == "linf":
                    bounds = -self.epsilon, self.epsilon
                    return jax.random.uniform(
                        direction_key, center.shape[1:], center.dtype, *bounds
                    )
                direction = jax.random.normal(direction_key, center.shape[1:], center.dtype)
                radius = jax.random.uniform(
                    radius_key, (*center.shape[1:-3], 1, 1, 1), center.dtype
                )
                # The radius of a uniform point of the d-ball is U^(1/d), with d = H * W * C.
                return (
                    self.epsilon
                    * radius ** (1 / np.prod(center.shape[-3:]))
                    * direction
                    / _l2_norm(direction)
                )

            own = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys)
            return self._project(center + jax.vmap(draw)(own), center, self.epsilon)

        return treedef.unflatten([start(position, leaf) for position, leaf in enumerate(leaves)])

    def radius(self, gradient: Any, loss_scale: jax.Array | None = None) -> Any:
        """The ball's radius for each crop image: epsilon, or less where the loss is steep.

        Args:
            gradient: array or pytree [N, (V,) H, W, C], of the attacked losses.
            loss_scale: [N], what each example's losses were multiplied by; 1 by default.

        Returns:
            epsilon itself, or a pytree like `gradient` of [N, (V,) 1, 1, 1].
        """
        if not self.max_increase:
            return jax.tree.map(lambda _: self.epsilon, gradient)

        def one(gradient: jax.Array) -> jax.Array:
            if self.norm == "linf":
                steepness = jnp.sum(jnp.abs(gradient), axis=IMAGE, keepdims=True)
            else:
                steepness = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=IMAGE, keepdims=True))
            rise = jnp.asarray(self.max_increase, gradient.dtype)
            if loss_scale is not None:
                rise = rise * loss_scale.reshape(-1, *(1,) * (gradient.ndim - 1))
            # A product, not a quotient: a flat loss leaves the whole ball, and no 0 / 0 arises.
            limited = rise / jnp.maximum(steepness, jnp.finfo(gradient.dtype).tiny)
            return jnp.where(steepness * self.epsilon > rise, limited, self.epsilon)

        return jax.tree.map(one, gradient)

    def ascend(self, center: Any, point: Any, gradient: Any, radius: Any) -> Any:
        """Make one step of equation 6 from `point`, around the clean images `center`."""

        def move(
            center: jax.Array, point: jax.Array, gradient: jax.Array, radius: Any
        ) -> jax.Array:
            direction = jnp.sign(gradient) if self.norm == "linf" else gradient / _l2_norm(gradient)
            return self._project(point + self.step_size * direction, center, radius)

        return jax.tree.map(move, center, point, gradient, radius)

    def noise(self, keys: jax.Array, x: Any) -> Any:
        """Move x in a random direction by as much as one attack moves it.

        Keys are [N], x is a pytree of [N, V, H, W, C].
        """
        length = min(self.epsilon, self.steps * self.step_size)
        leaves, treedef = jax.tree.flatten(x)

        def shift(position: int, center: jax.Array) -> jax.Array:
            def direction(key: jax.Array) -> jax.Array:
                key = jax.random.fold_in(key, position)
                if self.norm == "linf":
                    return jax.random.rademacher(key, center.shape[1:], center.dtype)
                normal = jax.random.normal(key, center.shape[1:], center.dtype)
                return normal / _l2_norm(normal)

            return self._project(center + length * jax.vmap(direction)(keys), center, self.epsilon)

        return treedef.unflatten([shift(position, leaf) for position, leaf in enumerate(leaves)])

    def _project(self, candidate: jax.Array, center: jax.Array, radius: Any) -> jax.Array:
        """Project into the ball, then into the pixel range.

        Both are convex: the second never leaves the first.
        """
        delta = candidate - center
        if self.norm == "linf":
            delta = jnp.clip(delta, -radius, radius)
        else:
            delta = delta * jnp.minimum(1.0, radius / _l2_norm(delta))
        return jnp.clip(center + delta, 0.0, 1.0)


def adversarial(
    key: jax.Array,
    x: Any,
    objective: Callable[[Any], jax.Array],
    *,
    epsilon: float,
    step_size: float,
    steps: int = 1,
    norm: str = "linf",
    random_start: bool = False,
    gradient: Any = None,
    max_increase: float = 0.0,
    loss_scale: jax.Array | None = None,
) -> Any:
    """Make adversarial views: projected gradient ascent on a method's own loss.

    Equations 5 to 7 of the paper.

    Args:
        key: one typed key, or [N] keys (one per example); read only for a random start.
        x: array or pytree of arrays [N, H, W, C] or [N, V, H, W, C], float pixels in [0, 1].
        objective: maps an input like x to losses [N] or [N, V]; called once per step for all crops
            together.
        epsilon: radius of the ball around each crop image, in pixel units: 1/255 is one grey level.
        step_size: eta of equation 6, same unit.
        steps: number of ascent steps.
        norm: "linf" (a step moves every pixel by step_size) or "l2" (a step has length step_size
            per crop image).
        random_start: start from a uniform point of the ball instead of x.
        gradient: the objective's gradient at x when the caller already has it; saves the first
            step's pass.
        max_increase: see `Attack`; the radius is chosen once, at the starting point.
        loss_scale: [N], what the objective multiplied each example's losses by; read only with
            max_increase.

    Returns:
        Views like x, within epsilon of x per crop image and within [0, 1]; constants for
        differentiation.

    Raises:
        ValueError: a setting that `Attack` refuses, or a gradient together with a random start.
    """
    attack = Attack(epsilon, step_size, steps, norm, random_start, max_increase=max_increase)
    if gradient is not None and random_start:
        raise ValueError(
            "the clean gradient cannot serve a random start: it was taken at another point"
        )
    point, radius = attack.start(key, x), None
    gradient_of = jax.grad(lambda point: jnp.sum(objective(point)))
    for step in range(steps):
        slope = gradient if step == 0 and gradient is not None else gradient_of(point)
        radius = attack.radius(slope, loss_scale) if step == 0 else radius
        point = attack.ascend(x, point, slope, radius)
    return jax.lax.stop_gradient(point)
