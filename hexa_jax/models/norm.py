"""BatchNorm over groups of examples, with a second set for adversarial views (AdvProp).

Each set has its own statistics, scale and bias.

Legend: G groups, n rows of a group, C channels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

CLEAN, ADVERSARIAL = "clean", "adversarial"
MOMENTUM = 0.1  # torch's convention: the weight of the new value
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class NormMode:
    """How a forward pass normalises.

    Attributes:
        branch: which scale, bias and statistics: "clean" or "adversarial".
        groups: number of groups of consecutive rows with statistics of their own; None normalises
            with the running ones.
        axis_name: mesh axis to average the moments over when one group spans several devices, else
            None.
        device_groups: which devices along that axis share a group.
    """

    branch: str = CLEAN
    groups: int | None = None
    axis_name: str | None = None
    device_groups: tuple[tuple[int, ...], ...] | None = None


EVALUATION = NormMode()
Pool = Callable[[jax.Array], jax.Array]  # [N, H, W, C] -> [N, H', W', C], maxima of windows


def stats_collection(branch: str) -> str:
    """Name of the Linen collection that holds a branch's running mean and variance."""
    return f"{branch}_batch_stats"


def set_of_parameters(params: Any) -> Any:
    """Return a tree like the parameters that names the BatchNorm set of each leaf.

    "clean", "adversarial", or "" for what all passes use.
    """
    if not isinstance(params, Mapping):
        return jax.tree.map(lambda _: "", params)
    prefix = f"{ADVERSARIAL}_"
    if f"{prefix}scale" in params:  # a BatchNorm with two sets
        return {name: ADVERSARIAL if name.startswith(prefix) else CLEAN for name in params}
    return {name: set_of_parameters(node) for name, node in params.items()}


def follow_clean(tree: Any) -> Any:
    """Return a copy whose adversarial sets equal the clean ones.

    That holds wherever in the tree both sets stand.

    Args:
        tree: parameters, or an optimizer's state with trees like them inside.
    """
    prefix = f"{ADVERSARIAL}_"

    def has_both(node: Any) -> bool:
        return isinstance(node, Mapping) and f"{prefix}scale" in node

    def copied(node: Any) -> Any:
        return {name: node[name.removeprefix(prefix)] for name in node} if has_both(node) else node

    return jax.tree.map(copied, tree, is_leaf=has_both)


def fill_both_sets(variables: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's variables with another backbone's clean weights in both sets.

    Args:
        variables: {"params": {"backbone": ..., ...}, "clean_batch_stats": ..., and the adversarial
            set's if there is one}.
        backbone: {"params": {"backbone": ...}, "clean_batch_stats": {"backbone": ...}} of the same
            architecture, clean leaves alone.
    """

    def filled(own: Any, given: Any) -> Any:
        if not isinstance(own, Mapping):
            return jnp.asarray(given, own.dtype)
        return {
            name: filled(node, given[name.removeprefix(f"{ADVERSARIAL}_")])
            for name, node in own.items()
        }

    result = {}
    for collection, own in variables.items():
        given = backbone["params" if collection == "params" else stats_collection(CLEAN)]
        result[collection] = {**own, "backbone": filled(own["backbone"], given["backbone"])}
    return result


class BatchNorm(nn.Module):
    """Normalize [N, ..., C] to the same shape in `dtype`.

    Moments are computed in float32 or wider.

    A training pass writes no statistics: it sows the moments of the pass ("moments" collection:
    mean, unbiased variance, averaged over the local groups), and the train step blends them into
    the running ones once per pass.
    """

    dtype: jnp.dtype = jnp.float32
    auxiliary: bool = False  # whether the adversarial set exists
    scale_init: float = 1.0
    affine: bool = True  # whether scale and bias exist

    @nn.compact
    def __call__(self, x: jax.Array, mode: NormMode, pool: Pool | None = None) -> jax.Array:
        """Return pool(BatchNorm(x)) for a `pool` that takes maxima.

        Scale and bias are applied to what it leaves: fewer values, the same result.

        Normalising keeps the order of a channel's values, or turns it round where its scale is
        negative: such a channel is turned round first. What is normalised, masked and kept for the
        backward pass is then a quarter as large.
        """
        channels = x.shape[-1]
        wide = jnp.promote_types(jnp.float32, self.dtype)
        chosen: dict[str, Any] = {}
        for branch in (CLEAN, ADVERSARIAL) if self.auxiliary else (CLEAN,):
            prefix = "" if branch == CLEAN else f"{branch}_"
            branch_scale, branch_bias = jnp.ones((channels,), wide), jnp.zeros((channels,), wide)
            if self.affine:
                scale_init = nn.initializers.constant(self.scale_init)
                branch_scale = self.param(f"{prefix}scale", scale_init, (channels,))
                branch_bias = self.param(f"{prefix}bias", nn.initializers.zeros, (channels,))
            if branch == mode.branch:
                chosen |= {"scale": branch_scale, "bias": branch_bias}
            # A training pass does not read the running statistics.
            if self.is_initializing() or (mode.groups is None and branch == mode.branch):
                collection = stats_collection(branch)
                branch_mean = self.variable(collection, "mean", jnp.zeros, (channels,))
                branch_var = self.variable(collection, "var", jnp.ones, (channels,))
                if branch == mode.branch:
                    chosen |= {"mean": branch_mean.value, "var": branch_var.value}
        if not chosen:
            raise ValueError(f"this network has no {mode.branch} BatchNorm set")
        scale, bias = chosen["scale"].astype(wide), chosen["bias"].astype(wide)
        if pool is not None:
            sign = jnp.where(scale < 0, -1, 1).astype(wide)
            x, scale = (
                x * sign.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (channels,)),
                scale * sign,
            )
        if mode.groups is None:
            mean = chosen["mean"].astype(wide)
            if pool is not None:
                x, mean = pool(x), mean * sign
            factor = scale * jax.lax.rsqrt(chosen["var"].astype(wide) + EPSILON)
            shift = bias - mean * factor
            shape = (1,) * (x.ndim - 1) + (channels,)
            return (x.astype(wide) * factor.reshape(shape) + shift.reshape(shape)).astype(
                self.dtype
            )

        # Per example first, then per group: XLA's CPU back end is several times slower over [G, n,
        # C] when G is small, and accelerators are indifferent.
        values = x.reshape(x.shape[0], -1, channels).astype(wide)  # [N, H * W, C]
        count = values.shape[0] // mode.groups * values.shape[1]

        def group_mean(v: jax.Array) -> jax.Array:
            # [G, C]
            return jnp.sum(jnp.sum(v, axis=1).reshape(mode.groups, -1, channels), axis=1) / count

        moments = jnp.stack([group_mean(values), group_mean(jnp.square(values))])
        if mode.axis_name is not None:
            moments = jax.lax.pmean(moments, mode.axis_name, axis_index_groups=mode.device_groups)
            count *= len(mode.device_groups[0])  # type: ignore[index]
        mean = moments[0]
        var = jnp.maximum(moments[1] - jnp.square(mean), 0)
        average = jnp.mean(mean, axis=0)
        self.sow("moments", "mean", average if pool is None else average * sign)
        self.sow("moments", "var", jnp.mean(var, axis=0) * (count / max(count - 1, 1)))
        factor = scale[None] * jax.lax.rsqrt(var + EPSILON)  # [G, C]
        if pool is not None:
            x = pool(x)
            values = x.reshape(x.shape[0], -1, channels).astype(wide)
        y = values * _per_example(factor, x.shape[0]) + _per_example(
            bias[None] - mean * factor, x.shape[0]
        )
        return y.astype(self.dtype).reshape(x.shape)


def _per_example(value: jax.Array, num: int) -> jax.Array:
    """[G, C] -> [num, 1, C]: each example gets its group's value."""
    groups, channels = value.shape
    return jnp.broadcast_to(value[:, None], (groups, num // groups, channels)).reshape(
        num, 1, channels
    )


def blend(running: dict, moments: dict) -> dict:
    """Running statistics after one training pass.

    Args:
        running: collection of a branch: {module: {"mean", "var"}} of [C] arrays.
        moments: the pass's sown moments, same tree with a tuple in each leaf's place: one entry per
            resolution, in order.
    """

    def update(value: jax.Array, sown: tuple[jax.Array, ...]) -> jax.Array:
        for moment in sown:
            value = ((1 - MOMENTUM) * value + MOMENTUM * moment).astype(value.dtype)
        return value

    return jax.tree.map(update, running, moments)


def average_moments(running: dict, moments: dict) -> dict:
    """One pass's sown moments as a tree like the running statistics; the mean over resolutions."""
    return jax.tree.map(
        lambda value, sown: (jnp.mean(jnp.stack(sown), axis=0)).astype(value.dtype),
        running,
        moments,
    )
