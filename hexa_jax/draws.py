"""Derives PRNG keys from (seed, purpose, pass or step, example or row)."""

import zlib
from typing import NamedTuple

import jax

# Purposes: one number each, folded into the seed's key.
AUGMENT, ATTACK, CUTMIX, PARTNER, INIT, REFRESH, TASK, SECOND_CUTMIX = range(8)


def purpose_of(view: str) -> int:
    """The purpose of a hard view's own draws; a function of its name, so that views elsewhere need no number from here."""
    known = {"cutmix": CUTMIX, "cutmix_adversarial": SECOND_CUTMIX}
    return known.get(view) or zlib.crc32(view.encode()) | 1 << 31


class Draws(NamedTuple):
    """Scalars that a step's random draws are keyed by. All are traced: one compiled program serves every seed and step.

    Attributes:
        seed: uint32, the run's.
        epoch: int32, pass over the data; 0 is the first pass, before training.
        step: int32, optimiser steps taken.
    """

    seed: jax.Array
    epoch: jax.Array
    step: jax.Array

    def of_examples(self, purpose: int, index: jax.Array) -> jax.Array:
        """Keys [...] of the examples int32 [...], each a function of (seed, purpose, epoch, example) only."""
        key = jax.random.fold_in(purpose_key(self.seed, purpose), self.epoch)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index.reshape(-1))
        return keys.reshape(index.shape)

    def of_rows(self, purpose: int, row: jax.Array) -> jax.Array:
        """Keys [R] of the rows int32 [R] of this step, each a function of (seed, purpose, step, row) only."""
        key = jax.random.fold_in(purpose_key(self.seed, purpose), self.step)
        return jax.vmap(lambda r: jax.random.fold_in(key, r))(row)


def purpose_key(seed: jax.Array, purpose: int) -> jax.Array:
    """The key that all draws of one purpose start from; seed uint32."""
    return jax.random.fold_in(jax.random.key(seed), purpose)
