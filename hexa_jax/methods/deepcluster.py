"""DeepCluster-v2: the pseudo-label of an example is its cluster of the epoch before (equations 3 and 4, Algorithm 2).

Legend: B batch, A assign crops, H heads, K clusters, D embedding, T steps of an epoch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hexa_jax.kmeans import spherical_kmeans
from hexa_jax.losses import prototype_cross_entropy
from hexa_jax.methods.base import Batch, Encode, LabelsBeforeStep, Spec, Targets


class DeepClusterState(NamedTuple):
    """Clusters and the bank they are computed from.

    Attributes:
        assignments: int32 [H, num_examples], -1 for an example not seen in the last epoch.
        prototypes: [H, K, D] centroids, unit norm.
        objective: [H] mean cosine of the last k-means.
        bank: [T, B, A, D] clean embeddings of the running epoch, in visiting order, split over devices along axis 1.
        bank_index: int32 [T, B] the example of each row, -1 for none.
        position: int32, the next step to write.
    """

    assignments: jax.Array
    prototypes: jax.Array
    objective: jax.Array
    bank: jax.Array
    bank_index: jax.Array
    position: jax.Array


@dataclasses.dataclass(frozen=True)
class DeepCluster(LabelsBeforeStep):
    """DeepCluster-v2 (facebookresearch/swav main_deepclusterv2.py).

    Prototypes are the centroids and get no gradient: in the reference they are frozen for longer than any run lasts.

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

    def check(self, spec: Spec) -> None:
        if self.assign_crops > spec.num_crops[0]:
            raise ValueError(
                f"deepcluster.assign_crops={self.assign_crops} is more than the {spec.num_crops[0]} large crops"
            )
        seen = spec.batch_size * spec.steps_per_epoch
        if self.num_clusters > seen:
            raise ValueError(
                f"deepcluster.num_clusters={self.num_clusters} is more than the {seen} images seen in an epoch: use fewer"
            )

    def init(self, key: jax.Array, params: Any, spec: Spec) -> DeepClusterState:
        steps, batch = spec.steps_per_epoch, spec.batch_size
        return DeepClusterState(
            assignments=jnp.full((self.num_heads, spec.num_examples), -1, jnp.int32),
            prototypes=jnp.zeros((self.num_heads, self.num_clusters, spec.embedding_dim)),
            objective=jnp.zeros((self.num_heads,)),
            bank=jnp.zeros((steps, batch, self.assign_crops, spec.embedding_dim)),
            bank_index=jnp.full((steps, batch), -1, jnp.int32),
            position=jnp.zeros([], jnp.int32),
        )

    def state_spec(self, spec: Spec) -> Any:
        return DeepClusterState(P(), P(), P(), P(None, "data"), P(None, "data"), P())

    def targets(self, encode: Encode, params: Any, state: DeepClusterState, batch: Batch, keys: jax.Array) -> Targets:
        labels = jnp.moveaxis(state.assignments[:, batch.index], 0, -1)  # [M, n, H]
        return Targets(y=labels, dictionary=state.prototypes, known=labels[..., 0] >= 0)

    def loss(self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: jax.Array) -> jax.Array:
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
        """Write the step's clean embeddings into the bank; called with targets None by the first pass."""
        # Axis 1 is the split one: moving it to the front before joining the two keeps every row on its device.
        join = lambda x: jnp.swapaxes(x, 0, 1).reshape(1, -1, *x.shape[2:])  # noqa: E731
        rows = join(outputs[:, :, : self.assign_crops]).astype(state.bank.dtype)
        index = join(jnp.where(batch.valid, batch.index, -1))
        write = jax.lax.dynamic_update_slice_in_dim
        return state._replace(
            bank=write(state.bank, rows, state.position, axis=0),
            bank_index=write(state.bank_index, index, state.position, axis=0),
            position=(state.position + 1) % state.bank.shape[0],
        )

    def refresh(self, key: jax.Array, state: DeepClusterState) -> DeepClusterState:
        """Cluster the bank; runs under the mesh, one reduction per iteration, no row leaves its device."""
        dim = state.bank.shape[-1]

        def local(x: jax.Array, index: jax.Array, init: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            clustering = spherical_kmeans(
                key,
                x.reshape(-1, dim),
                self.num_clusters,
                self.iterations,
                mask=index.reshape(-1) >= 0,
                init=init,
                axis_name="data",
            )
            return clustering.centroids, clustering.assignments.reshape(index.shape), clustering.objective

        split = P(None, "data")
        sharded = jax.shard_map(local, in_specs=(split, split, P()), out_specs=(P(), split, P()), check_vma=False)
        prototypes, assignments, objectives = [], [], []
        for head in range(self.num_heads):
            x = state.bank[:, :, head % self.assign_crops]  # [T, B, D]
            init = self._first_centroids(jax.random.fold_in(key, head), x, state.bank_index)
            centroids, labels, objective = sharded(x, state.bank_index, init)
            prototypes.append(centroids)
            objectives.append(objective)
            # Out-of-range positions are dropped: rows without an example write nothing.
            place = jnp.where(state.bank_index >= 0, state.bank_index, state.assignments.shape[1]).reshape(-1)
            empty = jnp.full(state.assignments.shape[1], -1, jnp.int32)
            assignments.append(empty.at[place].set(labels.reshape(-1), mode="drop"))
        return state._replace(
            assignments=jnp.stack(assignments), prototypes=jnp.stack(prototypes), objective=jnp.stack(objectives)
        )

    def _first_centroids(self, key: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
        """K random examples' embeddings, chosen by example and not by position: the bank's order depends on the devices."""
        draw = lambda i: jax.random.bits(jax.random.fold_in(key, i), dtype=jnp.uint32) >> 1  # noqa: E731
        priority = jax.vmap(jax.vmap(draw))(jnp.maximum(index, 0))  # [T, B]
        priority = jnp.where(index >= 0, priority, jnp.uint32(2**32 - 1))
        # Numbers travel, embeddings do not. Ties go to the lower index: 2^31 values do collide among a million rows.
        flat = [jax.lax.with_sharding_constraint(leaf, P()).reshape(-1) for leaf in (priority, index)]
        place = jnp.arange(index.size, dtype=jnp.int32)
        chosen = jax.lax.sort([*flat, place], num_keys=2)[2][: self.num_clusters]

        def pick(x: jax.Array, chosen: jax.Array) -> jax.Array:
            batch = index.shape[1]
            column = chosen % batch - jax.lax.axis_index("data") * x.shape[1]
            here = (column >= 0) & (column < x.shape[1])
            rows = x[chosen // batch, jnp.clip(column, 0, x.shape[1] - 1)]
            return jax.lax.psum(jnp.where(here[:, None], rows, 0), "data")

        return jax.shard_map(pick, in_specs=(P(None, "data"), P()), out_specs=P(), check_vma=False)(x, chosen)

    def describe(self, before: DeepClusterState, after: DeepClusterState) -> dict[str, jax.Array]:
        was, now = before.assignments, after.assignments
        both = (was >= 0) & (now >= 0)
        count = lambda labels: jnp.zeros(self.num_clusters, jnp.int32).at[labels].add(1, mode="drop")  # noqa: E731
        counts = jax.vmap(count)(jnp.where(now < 0, self.num_clusters, now))  # [H, K]
        # Clusters are numbered anew each epoch: an example changed cluster when it left the group that most of its old
        # cluster's members moved to.
        moved = jax.vmap(self._moved)(jnp.where(both, was, -1), now)
        return {
            "kmeans_objective": jnp.mean(after.objective),
            "empty_clusters": jnp.sum(counts == 0) / self.num_heads,
            "changed_cluster": jnp.sum(moved) / jnp.maximum(jnp.sum(both), 1),
        }

    def _moved(self, was: jax.Array, now: jax.Array) -> jax.Array:
        pair = jnp.zeros((self.num_clusters, self.num_clusters), jnp.int32)
        pair = pair.at[jnp.where(was >= 0, was, self.num_clusters), now].add(1, mode="drop")
        return jnp.sum(was >= 0) - jnp.sum(jnp.max(pair, axis=1))
