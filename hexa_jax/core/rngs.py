"""Derive PRNG keys from (seed, purpose, pass or step, example or row)."""

import enum
import zlib
from typing import NamedTuple

import jax


class Purpose(enum.IntEnum):
    """What random numbers are for: each purpose is folded into the seed's key as a number."""

    AUGMENT = 0
    ATTACK = 1
    CUTMIX = 2
    PARTNER = 3
    INIT = 4
    REFRESH = 5
    TASK = 6
    SECOND_CUTMIX = 7


def purpose_of(view: str) -> int:
    """Return the purpose of a hard view, a hash of its name: new views need no entry."""
    # The two views that came first keep the numbers of their own.
    known = {"cutmix": Purpose.CUTMIX, "cutmix_adversarial": Purpose.SECOND_CUTMIX}
    return known.get(view) or zlib.crc32(view.encode()) | 1 << 31


class Rngs(NamedTuple):
    """Scalars that key a step's random numbers, traced: one compiled program serves all steps.

    Attributes:
        seed: uint32, the run's seed.
        epoch: int32, pass over the data; 0 is the first pass, before training.
        step: int32, number of optimizer steps taken.
    """

    seed: jax.Array
    epoch: jax.Array
    step: jax.Array

    def per_example_keys(self, purpose: int, index: jax.Array) -> jax.Array:
        """Return keys [...] of (seed, purpose, epoch, example) for examples int32 [...]."""
        key = jax.random.fold_in(purpose_key(self.seed, purpose), self.epoch)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index.reshape(-1))
        return keys.reshape(index.shape)

    def per_row_keys(self, purpose: int, row: jax.Array) -> jax.Array:
        """Return keys [R] of (seed, purpose, step, row) for rows int32 [R] of the batch."""
        key = jax.random.fold_in(purpose_key(self.seed, purpose), self.step)
        return jax.vmap(lambda r: jax.random.fold_in(key, r))(row)


def purpose_key(seed: jax.Array, purpose: int) -> jax.Array:
    """Return the key that all random numbers of one purpose start from; seed is uint32."""
    return jax.random.fold_in(jax.random.key(seed), int(purpose))
