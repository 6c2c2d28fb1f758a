"""Which rows of a microbatch a pass is made of, where a view replaces the clean pass on some."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class RowShare(NamedTuple):
    """Rows `first` to `stop` - 1 of each `unit` consecutive ones."""

    first: int
    stop: int
    unit: int

    @property
    def whole(self) -> bool:
        """Whether these are all rows."""
        return self.stop - self.first == self.unit

    @property
    def empty(self) -> bool:
        """Whether these are no rows."""
        return self.stop == self.first

    def take(self, tree: Any) -> Any:
        """The rows of leaves [N, ...]."""
        if self.whole:
            return tree

        def one(leaf: jax.Array) -> jax.Array:
            blocks = leaf.reshape(-1, self.unit, *leaf.shape[1:])
            return blocks[:, self.first : self.stop].reshape(-1, *leaf.shape[1:])

        return jax.tree.map(one, tree)


def rejoin(parts: Sequence[jax.Array], rows: Sequence[RowShare]) -> jax.Array:
    """Leaves [N, ...] from what `RowShare.take` took apart."""
    ordered = sorted(zip(rows, parts, strict=True), key=lambda pair: pair[0].first)
    blocks = [part.reshape(-1, row.stop - row.first, *part.shape[1:]) for row, part in ordered]
    joined = jnp.concatenate(blocks, axis=1)
    return joined.reshape(-1, *joined.shape[2:])
