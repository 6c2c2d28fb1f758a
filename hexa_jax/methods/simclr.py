"""SimCLR: the pseudo-label of a view is its sibling, among all other views of the step.

Legend: M microbatches, n rows of a microbatch, N rows, V = 2 crops, D embedding, B batch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax.methods.base import Batch, Method, Spec, Targets


class Candidates(NamedTuple):
    """All clean views of the step: embeddings [B, 2, D], and the row number int32 [B] of the example that each shows."""

    embeddings: jax.Array
    rows: jax.Array


@dataclasses.dataclass(frozen=True)
class SimCLR(Method):
    """SimCLR (google-research/simclr), NT-Xent over the whole step.

    The pseudo-label of an example is its row number; for its crop v that means the other crop of the row. The row's crop v
    itself is no candidate, so that a hard view is not compared with the view it was made from.
    """

    temperature: float

    needs_outputs = True
    live_dictionary = True

    def check(self, spec: Spec) -> None:
        if spec.num_crops != (2,):
            raise ValueError(
                f"simclr pairs two crops of one size, data.num_crops={spec.num_crops} has others: use (2,) with one "
                "data.crop_size; deepcluster and swav take more"
            )

    def targets_from_outputs(self, params: dict, state: Any, batch: Batch, outputs: jax.Array) -> Targets:
        def everywhere(leaf: jax.Array) -> jax.Array:  # [M, n, ...] of each device -> [B, ...] of all
            whole = jax.lax.all_gather(leaf, "data", axis=1, tiled=True)
            return whole.reshape(-1, *leaf.shape[2:])

        candidates = Candidates(everywhere(outputs), everywhere(batch.row))
        return Targets(y=batch.row, dictionary=candidates, known=jnp.ones(batch.row.shape, bool))

    def loss(self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: Candidates) -> jax.Array:
        own = y[:, None] == dictionary.rows[None, :]  # [N, B]

        def one_crop(crop: int) -> jax.Array:
            def scores(view: int) -> jax.Array:
                candidates = dictionary.embeddings[:, view]
                return jnp.matmul(outputs[:, crop], candidates.T, precision="highest") / self.temperature

            siblings = scores(1 - crop)
            same_side = jnp.where(own, -jnp.inf, scores(crop))
            positive = jnp.sum(jnp.where(own, siblings, 0), axis=1)
            return jax.nn.logsumexp(jnp.concatenate([siblings, same_side], axis=1), axis=1) - positive

        return jnp.stack([one_crop(0), one_crop(1)], axis=1)
