"""Hard views, written once for every method: adversarial (equations 5 to 7) and cut-mixed (equations 8 and 9).

A view knows images and per-example objectives only; it never sees a queue, a cluster or a network.
Legend: N examples, V crops, H W C image. Pixels are in [0, 1]; epsilon and step sizes are in the same unit (1 grey level = 1/255).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

IMAGE = (-3, -2, -1)  # the H, W, C axes of one crop image
TABLE = 8192  # cells of the quantile table that Beta variates are read from


def _per_example(key: jax.Array, count: int) -> jax.Array:
    """One key per example: the caller's own [N] keys, or N keys split from a single one."""
    return key if key.ndim else jax.random.split(key, count)


def _fold_leaf(keys: jax.Array, leaf: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, leaf))(keys)


def _norm(x: jax.Array) -> jax.Array:
    """L2 norm of each crop image, safe to divide by."""
    return jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=IMAGE, keepdims=True)), jnp.finfo(x.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class Ball:
    """Where an attack may go: within epsilon of each crop image and within [0, 1], by steps of step_size (pixel units).

    Attributes:
        epsilon: radius of the ball around each crop image; 1/255 is one grey level.
        step_size: eta of equation 6, same unit.
        norm: "linf" (a step moves every pixel by step_size) or "l2" (a step has length step_size per crop image).

    Raises:
        ValueError: unknown norm.
    """

    epsilon: float
    step_size: float
    norm: str = "linf"

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', not {self.norm!r}")

    def ascend(self, centre: Any, point: Any, slope: Any) -> Any:
        """One step of equation 6 from `point`, around the clean images `centre`, along `slope`: trees of [..., H, W, C]."""

        def move(centre: jax.Array, point: jax.Array, slope: jax.Array) -> jax.Array:
            direction = jnp.sign(slope) if self.norm == "linf" else slope / _norm(slope)
            return self._project(point + self.step_size * direction, centre)

        return jax.tree.map(move, centre, point, slope)

    def random_point(self, key: jax.Array, centre: Any) -> Any:
        """A uniform point of the ball around each crop image [N, (V,) H, W, C]; key: one, or [N]."""
        leaves, treedef = jax.tree.flatten(centre)
        keys = _per_example(key, leaves[0].shape[0])

        def start(position: int, centre: jax.Array) -> jax.Array:
            def draw(key: jax.Array) -> jax.Array:
                direction_key, radius_key = jax.random.split(key)
                if self.norm == "linf":
                    bounds = -self.epsilon, self.epsilon
                    return jax.random.uniform(direction_key, centre.shape[1:], centre.dtype, *bounds)
                direction = jax.random.normal(direction_key, centre.shape[1:], centre.dtype)
                radius = jax.random.uniform(radius_key, (*centre.shape[1:-3], 1, 1, 1), centre.dtype)
                # The radius of a uniform point of the d-ball is U^(1/d), with d = H * W * C.
                return self.epsilon * radius ** (1 / np.prod(centre.shape[-3:])) * direction / _norm(direction)

            return self._project(centre + jax.vmap(draw)(_fold_leaf(keys, position)), centre)

        return treedef.unflatten([start(position, leaf) for position, leaf in enumerate(leaves)])

    def _project(self, candidate: jax.Array, centre: jax.Array) -> jax.Array:
        """Back into the ball, then into the pixel range (which never leaves the ball: both are convex)."""
        delta = candidate - centre
        if self.norm == "linf":
            delta = jnp.clip(delta, -self.epsilon, self.epsilon)
        else:
            delta = delta * jnp.minimum(1.0, self.epsilon / _norm(delta))
        return jnp.clip(centre + delta, 0.0, 1.0)


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
) -> Any:
    """Projected gradient ascent on the method's own loss (equations 5 to 7).

    Args:
        key: one typed key, or [N] keys (one per example); read only for a random start.
        x: array or pytree of arrays [N, H, W, C] or [N, V, H, W, C], float pixels in [0, 1].
        objective: maps an input like x to losses [N] or [N, V]; called once per step for all crops together.
        epsilon: radius of the ball around each crop image, in pixel units: 1/255 is one grey level.
        step_size: eta of equation 6, same unit.
        steps: number of ascent steps.
        norm: "linf" (a step moves every pixel by step_size) or "l2" (a step has length step_size per crop image).
        random_start: start from a uniform point of the ball instead of x.
        gradient: the objective's gradient at x when the caller already has it; saves the first step's pass.

    Returns:
        Views like x, within epsilon of x per crop image and within [0, 1]; constants for differentiation.

    Raises:
        ValueError: unknown norm, no step, or a gradient together with a random start.
    """
    ball = Ball(epsilon, step_size, norm)
    if steps < 1:
        raise ValueError(f"an attack needs at least one step, not {steps}")
    if gradient is not None and random_start:
        raise ValueError("the clean gradient cannot serve a random start: it was taken at another point")
    current = ball.random_point(key, x) if random_start else x
    slope_of = jax.grad(lambda point: jnp.sum(objective(point)))
    for step in range(steps):
        slope = gradient if step == 0 and gradient is not None else slope_of(current)
        current = ball.ascend(x, current, slope)
    return jax.lax.stop_gradient(current)


def sample_beta(uniform: jax.Array, alpha: float, beta: float) -> jax.Array:
    """Beta(alpha, beta) variates from uniform ones through a tabulated quantile function.

    jax.random.beta rejects in a loop whose length depends on the whole batch; across devices that is a collective per turn.
    """
    quantiles = scipy.special.betaincinv(alpha, beta, np.linspace(0, 1, TABLE + 1))
    position = uniform * TABLE
    cell = jnp.minimum(position.astype(jnp.int32), TABLE - 1)
    table = jnp.asarray(quantiles, uniform.dtype)
    return table[cell] + (position - cell) * (table[cell + 1] - table[cell])


def _sides(key: jax.Array, shape: tuple[int, ...], height: int, width: int, alpha: float, beta: float) -> jax.Array:
    """Random boxes as [*shape, 4] pixel bounds (top, bottom, left, right), clipped to the image."""
    uniform = jax.random.uniform(key, (*shape, 3))
    side = jnp.sqrt(1 - sample_beta(uniform[..., 0], alpha, beta))

    def bounds(extent: int, centre: jax.Array) -> list[jax.Array]:
        length = jnp.floor(extent * side).astype(jnp.int32)
        first = jnp.floor(extent * centre).astype(jnp.int32) - length // 2
        return [jnp.clip(first, 0, extent), jnp.clip(first + length, 0, extent)]

    return jnp.stack(bounds(height, uniform[..., 1]) + bounds(width, uniform[..., 2]), axis=-1)


def cutmix_boxes(key: jax.Array, x: Any, *, alpha: float, beta: float) -> Any:
    """One random box per crop image of x: int32 [N, 4] or [N, V, 4] (top, bottom, left, right), a pytree like x."""
    leaves, treedef = jax.tree.flatten(x)
    keys = _per_example(key, leaves[0].shape[0])

    def boxes(position: int, leaf: jax.Array) -> jax.Array:
        crops, (height, width) = leaf.shape[1:-3], leaf.shape[-3:-1]
        return jax.vmap(lambda key: _sides(key, crops, height, width, alpha, beta))(_fold_leaf(keys, position))

    return treedef.unflatten([boxes(position, leaf) for position, leaf in enumerate(leaves)])


def paste(x: jax.Array, partner: jax.Array, box: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Put the partner's pixels into the box (equation 8); also the exact share of pixels that still show x."""
    height, width = x.shape[-3:-1]
    top, bottom, left, right = (box[..., side, None] for side in range(4))
    row = jnp.arange(height).reshape((1,) * (top.ndim - 1) + (height,))
    column = jnp.arange(width).reshape((1,) * (top.ndim - 1) + (width,))
    rows = (row >= top) & (row < bottom)  # [..., H]
    columns = (column >= left) & (column < right)  # [..., W]
    inside = rows[..., :, None] & columns[..., None, :]
    area = ((bottom - top) * (right - left))[..., 0]
    return jnp.where(inside[..., None], partner, x), 1 - area.astype(x.dtype) / (height * width)


def block_permutation(keys: jax.Array, count: int, block: int) -> jax.Array:
    """A random order of `count` rows that only moves rows within blocks of `block` consecutive ones.

    Args:
        keys: [count // block] typed keys, one per block.

    Returns:
        int32 [count] row numbers.
    """
    order = jax.vmap(lambda key: jax.random.permutation(key, block))(keys)  # [count / block, block]
    return (order + block * jnp.arange(count // block)[:, None]).reshape(count).astype(jnp.int32)


def cutmix(
    key: jax.Array,
    x: Any,
    *,
    alpha: float,
    beta: float,
    permutation: jax.Array | None = None,
    one_box: bool = False,
) -> tuple[Any, Any, jax.Array]:
    """Cut-mixed views (equation 8): a box of another example's crop is pasted into each crop.

    The box has side sqrt(1 - lambda0) of the crop with lambda0 ~ Beta(alpha, beta) and a uniform centre, and is clipped to
    the image; lambda is what is left of the first image, counted in pixels (clovaai/CutMix-PyTorch, with one box per crop).

    Args:
        key: one typed key, or [N] keys (one per example; then the partner's permutation must be given).
        x: array or pytree of arrays [N, H, W, C] or [N, V, H, W, C].
        alpha: first parameter of the Beta distribution, static.
        beta: second parameter of the Beta distribution, static.
        permutation: int [N], the partner of each example, the same for all its crops; drawn from the key when None.
        one_box: use the first example's boxes for the whole batch.

    Returns:
        (mixed like x, lambda [N] or [N, V] in a pytree like x, permutation [N]).

    Raises:
        ValueError: per-example keys without a permutation.
    """
    leaves, treedef = jax.tree.flatten(x)
    if permutation is None:
        if key.ndim:
            raise ValueError("per-example keys cannot draw the partner of an example: pass a permutation")
        key, order_key = jax.random.split(key)
        permutation = jax.random.permutation(order_key, leaves[0].shape[0])
    boxes = treedef.flatten_up_to(cutmix_boxes(key, x, alpha=alpha, beta=beta))
    if one_box:
        boxes = [jnp.broadcast_to(box[:1], box.shape) for box in boxes]
    mixed, shares = zip(
        *(paste(leaf, leaf[permutation], box) for leaf, box in zip(leaves, boxes, strict=True)), strict=True
    )
    return treedef.unflatten(mixed), treedef.unflatten(shares), permutation
