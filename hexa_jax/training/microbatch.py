"""Loops over the microbatches of a step, on leaves [M, ...].

With one microbatch there is no loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate(function: Callable[[Any], tuple[Any, Any]], leaves: Any) -> tuple[Any, Any]:
    """Map a function that returns (totals, stacked) over microbatches.

    Totals are added up, the rest is stacked to [M, ...].
    """
    first = jax.tree.map(lambda leaf: leaf[0], leaves)
    if _count(leaves) == 1:
        totals, stacked = function(first)
        return totals, jax.tree.map(lambda leaf: leaf[None], stacked)

    def add(totals: Any, one: Any) -> tuple[Any, Any]:
        more, stacked = function(one)
        return jax.tree.map(jnp.add, totals, more), stacked

    shapes = jax.eval_shape(lambda: function(first)[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, leaves)


def map_with_recompute(
    function: Callable[[Any], tuple[Any, Any]], leaves: Any
) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """First results of all microbatches now, second ones later.

    Args:
        function: one microbatch's leaves -> (first, second); `second` may be anything, a function's
            pullback for example.
        leaves: [M, ...].

    Returns:
        The first results, stacked to [M, ...]; and a function that gives (first, second) of one
        microbatch's leaves: kept in memory if there is one microbatch only, computed anew if there
        are several.
    """
    if _count(leaves) == 1:
        kept = function(jax.tree.map(lambda leaf: leaf[0], leaves))
        return jax.tree.map(lambda leaf: leaf[None], kept[0]), lambda _: kept
    return jax.lax.map(lambda one: function(one)[0], leaves), function


def _count(leaves: Any) -> int:
    return len(jax.tree.leaves(leaves)[0])
