"""A bank of an epoch's embeddings, and its clusters: what DeepCluster-v2 and PCL share.

An embedding stays on the device that computed it; centroids, and a label per example, are all that
travels.

Legend: T steps of an epoch, B batch, A crops, D embedding, K clusters, H sets of clusters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hexa_jax.core.batch import Batch
from hexa_jax.kmeans import Clustering, distances_by_cluster, spherical_kmeans
from hexa_jax.methods.base import Spec

SPLIT = P(None, "data")


class Bank(NamedTuple):
    """Embeddings of the running epoch.

    Attributes:
        rows: [T, B, A, D] in visiting order, split over devices along axis 1.
        index: int32 [T, B], the example of each row, -1 for none; split alike.
        position: int32, the next step to write.
    """

    rows: jax.Array
    index: jax.Array
    position: jax.Array

    @classmethod
    def empty(cls, spec: Spec, crops: int) -> "Bank":
        """A bank of `crops` embeddings per example, none of them written."""
        steps, batch = spec.steps_per_epoch, spec.batch_size
        return cls(
            rows=jnp.zeros((steps, batch, crops, spec.embedding_dim)),
            index=jnp.full((steps, batch), -1, jnp.int32),
            position=jnp.zeros([], jnp.int32),
        )

    @classmethod
    def partition(cls) -> "Bank":
        """PartitionSpecs of the leaves."""
        return cls(SPLIT, SPLIT, P())

    def write(self, rows: jax.Array, batch: Batch, known: jax.Array | None = None) -> "Bank":
        """Return the bank with the embeddings of a step at the next position.

        Args:
            rows: [M, n, A, D] embeddings.
            batch: whose rows they are; unreadable images, which others replaced, count as none.
            known: bool [M, n], False where an embedding is not the example's own: these rows count
                as no example, too. None: all are.
        """
        valid = batch.valid if known is None else batch.valid & known
        # Axis 1 is the split one: moving it to the front before joining the two keeps every row on
        # its device.
        join = lambda x: jnp.swapaxes(x, 0, 1).reshape(1, -1, *x.shape[2:])  # noqa: E731
        index = join(jnp.where(valid, batch.index, -1))
        write = jax.lax.dynamic_update_slice_in_dim
        return Bank(
            rows=write(self.rows, join(rows).astype(self.rows.dtype), self.position, axis=0),
            index=write(self.index, index, self.position, axis=0),
            position=(self.position + 1) % self.rows.shape[0],
        )

    def cluster(self, key: jax.Array, crop: int, num_clusters: int, iterations: int) -> Clustering:
        """Spherical k-means of one crop's embeddings, from those of K random examples.

        Runs under the mesh, with one reduction per iteration; no row leaves its device.

        Args:
            key: typed key; decides the first centroids.
            crop: which of the A embeddings.
            num_clusters: K.
            iterations: updates of the centroids.

        Returns:
            Clustering whose assignments are [T, B], split like the bank; -1 for rows without an
            example.
        """
        x = self.rows[:, :, crop]  # [T, B, D]

        def local(x: jax.Array, index: jax.Array, init: jax.Array) -> Clustering:
            result = spherical_kmeans(
                key,
                x.reshape(-1, x.shape[-1]),
                num_clusters,
                iterations,
                mask=index.reshape(-1) >= 0,
                init=init,
                axis_name="data",
            )
            return result._replace(assignments=result.assignments.reshape(index.shape))

        out_specs = Clustering(P(), SPLIT, P())
        sharded = jax.shard_map(
            local, in_specs=(SPLIT, SPLIT, P()), out_specs=out_specs, check_vma=False
        )
        return sharded(x, self.index, first_centroids(key, x, self.index, num_clusters))

    def distances(self, crop: int, clusters: Clustering) -> tuple[jax.Array, jax.Array]:
        """Return each cluster's sum of distances to its centroid, and its size; each [K]."""

        def local(
            x: jax.Array, centroids: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return distances_by_cluster(
                x.reshape(-1, x.shape[-1]), centroids, labels.reshape(-1), axis_name="data"
            )

        sharded = jax.shard_map(local, in_specs=(SPLIT, P(), SPLIT), out_specs=P(), check_vma=False)
        return sharded(self.rows[:, :, crop], clusters.centroids, clusters.assignments)

    def by_example(self, labels: jax.Array, num_examples: int) -> jax.Array:
        """Scatter labels [T, B] of rows to int32 [num_examples]; -1 for those not in the bank."""
        # Out-of-range positions are dropped: rows without an example write nothing.
        place = jnp.where(self.index >= 0, self.index, num_examples).reshape(-1)
        empty = jnp.full(num_examples, -1, jnp.int32)
        return empty.at[place].set(labels.reshape(-1), mode="drop")


def first_centroids(key: jax.Array, x: jax.Array, index: jax.Array, num_clusters: int) -> jax.Array:
    """Return the embeddings of K random examples.

    They are chosen by example, not by position: the bank's order depends on the devices.

    Args:
        key: typed key.
        x: [T, B, D] embeddings, split along axis 1.
        index: int32 [T, B] examples, -1 for none; split alike.
        num_clusters: K.
    """
    draw = lambda i: jax.random.bits(jax.random.fold_in(key, i), dtype=jnp.uint32) >> 1  # noqa: E731
    priority = jax.vmap(jax.vmap(draw))(jnp.maximum(index, 0))  # [T, B]
    priority = jnp.where(index >= 0, priority, jnp.uint32(2**32 - 1))
    # Only priorities and indices are gathered, never embeddings.
    # Ties go to the lower index: 2^31 values do collide among a million rows.
    flat = [jax.lax.with_sharding_constraint(leaf, P()).reshape(-1) for leaf in (priority, index)]
    place = jnp.arange(index.size, dtype=jnp.int32)
    chosen = jax.lax.sort([*flat, place], num_keys=2)[2][:num_clusters]

    def pick(x: jax.Array, chosen: jax.Array) -> jax.Array:
        batch = index.shape[1]
        column = chosen % batch - jax.lax.axis_index("data") * x.shape[1]
        here = (column >= 0) & (column < x.shape[1])
        rows = x[chosen // batch, jnp.clip(column, 0, x.shape[1] - 1)]
        return jax.lax.psum(jnp.where(here[:, None], rows, 0), "data")

    return jax.shard_map(pick, in_specs=(SPLIT, P()), out_specs=P(), check_vma=False)(x, chosen)


def describe_clusters(
    was: jax.Array, now: jax.Array, num_clusters: Sequence[int], objective: jax.Array
) -> dict[str, jax.Array]:
    """Scalars about a clustering, for the log.

    Args:
        was: int32 [H, num_examples], clusters before, -1 for none.
        now: the same after.
        num_clusters: K of each of the H sets.
        objective: [H] mean cosines.
    """
    empty, moved = 0, 0
    for old, new, clusters in zip(was, now, num_clusters, strict=True):
        members = (
            jnp.zeros(clusters, jnp.int32).at[jnp.where(new < 0, clusters, new)].add(1, mode="drop")
        )
        empty += jnp.sum(members == 0)
        moved += _moved(old, new, clusters)
    both = jnp.sum((was >= 0) & (now >= 0))
    return {
        "kmeans_objective": jnp.mean(objective),
        "empty_clusters": empty / len(num_clusters),
        "changed_cluster": moved / jnp.maximum(both, 1),
    }


def _moved(was: jax.Array, now: jax.Array, num_clusters: int) -> jax.Array:
    """Count the examples that left the group which most of their old cluster moved to.

    Clusters are numbered anew each time, so their numbers cannot be compared.
    """
    both = (was >= 0) & (now >= 0)
    # Sorted by both clusters, a group is a run; a table of all pairs of 100,000 clusters would need
    # 40 GB.
    old, new = jax.lax.sort([jnp.where(both, was, num_clusters), now], num_keys=2)
    start = (old != jnp.roll(old, 1)) | (new != jnp.roll(new, 1))
    group = jnp.cumsum(start.at[0].set(True)) - 1
    size = jnp.zeros(len(old), jnp.int32).at[group].add(1)
    largest = jnp.zeros(num_clusters, jnp.int32).at[old].max(size[group], mode="drop")
    return jnp.sum(both) - jnp.sum(largest)
