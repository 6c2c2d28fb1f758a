"""SimCLR: the pseudo-label of a view is its sibling, among all other views of the step.

Legend: M microbatches, n rows of a microbatch, N rows, V = 2 crops, D embedding, B batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hexa_jax.core.batch import Batch
from hexa_jax.methods.base import LabelsFromOutputs, Spec, Targets, check_positive


class Candidates(NamedTuple):
    """All clean views of the step.

    Embeddings [B, 2, D], and the row int32 [B] of the example that each shows.
    """

    embeddings: jax.Array
    rows: jax.Array


@dataclasses.dataclass(frozen=True)
class SimCLR(LabelsFromOutputs):
    """SimCLR (google-research/simclr), NT-Xent over the whole step.

    The pseudo-label of an example is its row number; for its crop v that means the other crop of
    the row. The row's crop v itself is no candidate, so that a hard view is not compared with the
    view it was made from.
    """

    temperature: float

    live_dictionary = True
    pairs_own_crop = True

    def __post_init__(self) -> None:
        check_positive("simclr", temperature=self.temperature)

    def check(self, spec: Spec) -> None:
        if spec.num_crops != (2,):
            raise ValueError(
                f"simclr pairs two crops of one size, data.num_crops={spec.num_crops} has others: "
                "use (2,) with one "
                "data.crop_size; deepcluster and swav take more"
            )

    def targets_from_outputs(
        self, params: dict, state: Any, batch: Batch, outputs: jax.Array
    ) -> Targets:
        # [M, n, ...] of each device -> [B, ...] of all
        def everywhere(leaf: jax.Array) -> jax.Array:
            whole = jax.lax.all_gather(leaf, "data", axis=1, tiled=True)
            return whole.reshape(-1, *leaf.shape[2:])

        candidates = Candidates(everywhere(outputs), everywhere(batch.row))
        return Targets(y=batch.row, dictionary=candidates, known=jnp.ones(batch.row.shape, bool))

    def loss(
        self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: Candidates
    ) -> jax.Array:
        own = y[:, None] == dictionary.rows[None, :]  # [N, B]
        return self._losses(outputs, jnp.stack([own, own], axis=1), [own], dictionary)[0]

    def mixed_loss(
        self,
        params: dict,
        outputs: jax.Array,
        y: jax.Array,
        y_partner: jax.Array,
        lam: jax.Array,
        dictionary: Candidates,
    ) -> jax.Array:
        """Score mixed crops without their two source crops among the candidates.

        That holds for either sibling that a crop looks for.
        """
        own, partner = (label[:, None] == dictionary.rows[None, :] for label in (y, y_partner))
        # A crop with lambda 1 shows its own image alone.
        shown = own[:, None] | (partner[:, None] & (lam < 1)[..., None])  # [N, 2, B]
        own_loss, partner_loss = self._losses(outputs, shown, [own, partner], dictionary)
        return lam * own_loss + (1 - lam) * partner_loss

    def _losses(
        self,
        outputs: jax.Array,
        shown: jax.Array,
        positives: Sequence[jax.Array],
        dictionary: Candidates,
    ) -> list[jax.Array]:
        """Losses [N, 2] of outputs [N, 2, D], one array for each choice of siblings to find.

        Args:
            outputs: of any views.
            shown: bool [N, 2, B], the rows that a crop shows: their crops of its own side are no
                candidates.
            positives: bool [N, B] each, the row whose sibling is to be found.
            dictionary: all clean views.
        """
        by_crop = []
        for crop in (0, 1):
            scores = [
                jnp.matmul(outputs[:, crop], dictionary.embeddings[:, side].T, precision="highest")
                / self.temperature
                for side in (crop, 1 - crop)
            ]
            same_side, siblings = jnp.where(shown[:, crop], -jnp.inf, scores[0]), scores[1]
            total = jax.nn.logsumexp(jnp.concatenate([siblings, same_side], axis=1), axis=1)
            by_crop.append(
                [total - jnp.sum(jnp.where(own, siblings, 0), axis=1) for own in positives]
            )
        return [jnp.stack(pair, axis=1) for pair in zip(*by_crop, strict=True)]

    def own_crop_labels(
        self, y: jax.Array, dictionary: Candidates, outputs: jax.Array
    ) -> tuple[jax.Array, Candidates]:
        """Swap the two sides of the candidates.

        A crop then finds itself, and its sibling is no candidate.
        """
        return y, dictionary._replace(
            embeddings=jax.lax.stop_gradient(dictionary.embeddings[:, ::-1])
        )
