"""DeepCluster-v2: predict an example's cluster of the epoch before.

Equations 3 and 4, Algorithm 2.

Legend: A assign crops, H heads, K clusters, D embedding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hexa_jax.core.batch import Batch
from hexa_jax.losses import prototype_cross_entropy
from hexa_jax.methods.bank import Bank, describe_clusters
from hexa_jax.methods.base import Encode, LabelsBeforeStep, Spec, Targets, check_positive


class DeepClusterState(NamedTuple):
    """Clusters and the bank they are computed from.

    Attributes:
        assignments: int32 [H, num_examples], -1 for an example whose clean crops the last epoch did
            not embed: it was in no batch, or a hard view replaced them.
        prototypes: [H, K, D] centroids, unit norm.
        objective: [H] mean cosine of the last k-means.
        bank: clean embeddings of the first A crops.
    """

    assignments: jax.Array
    prototypes: jax.Array
    objective: jax.Array
    bank: Bank


@dataclasses.dataclass(frozen=True)
class DeepCluster(LabelsBeforeStep):
    """DeepCluster-v2 (facebookresearch/swav main_deepclusterv2.py).

    Prototypes are the centroids and get no gradient: in the reference they are frozen for longer
    than any run lasts.

    The bank holds embeddings of clean crops only. An example whose clean crops a hard view replaces
    (`views.*.replace`) has none in that epoch, hence no cluster and no loss in the next one.

    Attributes:
        num_clusters: K.
        num_heads: H sets of clusters; head h clusters the embeddings of assign crop h mod A.
        assign_crops: A, how many of the first crops are kept in the bank.
        iterations: k-means iterations between epochs.
        temperature: of the softmax.
    """

    num_clusters: int
    num_heads: int
    assign_crops: int
    iterations: int
    temperature: float

    needs_first_pass = True

    def __post_init__(self) -> None:
        check_positive("deepcluster", **vars(self))

    def check(self, spec: Spec) -> None:
        if self.assign_crops > spec.num_crops[0]:
            raise ValueError(
                f"deepcluster.assign_crops={self.assign_crops} is more than the "
                f"{spec.num_crops[0]} large crops"
            )
        seen = round(spec.batch_size * spec.steps_per_epoch * spec.clean_share)
        if not seen:
            raise ValueError(
                "deepcluster clusters the embeddings of clean crops, of which views.*.replace "
                "leave none: "
                "replace fewer rows"
            )
        if self.num_clusters > seen:
            raise ValueError(
                f"deepcluster.num_clusters={self.num_clusters} is more than the {seen} images seen "
                "clean in an epoch: "
                "use fewer"
            )

    def warnings(self, spec: Spec) -> list[str]:
        if spec.clean_share == 1:
            return []
        return [
            f"views.*.replace show {1 - spec.clean_share:.0%} of the images of an epoch without "
            "their clean crops: "
            "deepcluster has no cluster for these images in the next epoch, and leaves them out of "
            "its loss"
        ]

    def init(self, key: jax.Array, params: Any, spec: Spec) -> DeepClusterState:
        return DeepClusterState(
            assignments=jnp.full((self.num_heads, spec.num_examples), -1, jnp.int32),
            prototypes=jnp.zeros((self.num_heads, self.num_clusters, spec.embedding_dim)),
            objective=jnp.zeros((self.num_heads,)),
            bank=Bank.empty(spec, self.assign_crops),
        )

    def state_spec(self, spec: Spec) -> Any:
        return DeepClusterState(P(), P(), P(), Bank.partition())

    def targets(
        self, encode: Encode, params: Any, state: DeepClusterState, batch: Batch, keys: jax.Array
    ) -> Targets:
        labels = jnp.moveaxis(state.assignments[:, batch.index], 0, -1)  # [M, n, H]
        return Targets(y=labels, dictionary=state.prototypes, known=labels[..., 0] >= 0)

    def loss(
        self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: jax.Array
    ) -> jax.Array:
        def one_head(prototypes: jax.Array, labels: jax.Array) -> jax.Array:
            score = lambda z: prototype_cross_entropy(z, prototypes, labels, self.temperature)  # noqa: E731
            return jax.vmap(score, in_axes=1, out_axes=1)(outputs)  # [N, V]

        heads = [one_head(dictionary[head], y[:, head]) for head in range(self.num_heads)]
        return sum(heads) / self.num_heads

    def update(
        self,
        state: DeepClusterState,
        params: Any,
        batch: Batch,
        outputs: jax.Array,
        targets: Targets | None,
        step: jax.Array,
    ) -> DeepClusterState:
        """Write the step's clean embeddings into the bank.

        The first pass calls this with targets None.
        """
        embeddings = outputs[:, :, : self.assign_crops]
        return state._replace(bank=state.bank.write(embeddings, batch, batch.clean))

    def refresh(self, key: jax.Array, state: DeepClusterState) -> DeepClusterState:
        """Cluster the bank."""
        assignments, prototypes, objectives = [], [], []
        for head in range(self.num_heads):
            head_key, crop = jax.random.fold_in(key, head), head % self.assign_crops
            found = state.bank.cluster(head_key, crop, self.num_clusters, self.iterations)
            assignments.append(state.bank.by_example(found.assignments, state.assignments.shape[1]))
            prototypes.append(found.centroids)
            objectives.append(found.objective)
        return state._replace(
            assignments=jnp.stack(assignments),
            prototypes=jnp.stack(prototypes),
            objective=jnp.stack(objectives),
        )

    def describe(self, before: DeepClusterState, after: DeepClusterState) -> dict[str, jax.Array]:
        num_clusters = [self.num_clusters] * self.num_heads
        return describe_clusters(
            before.assignments, after.assignments, num_clusters, after.objective
        )
