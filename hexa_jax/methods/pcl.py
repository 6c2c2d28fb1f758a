"""PCL-v2: MoCo-v2's task, and the example's prototypes in several clusterings.

    L = InfoNCE + mean over h of ProtoNCE_h
    ProtoNCE_h = -log( exp(q . c_s / phi_s) / sum over k of exp(q . c_k / phi_k) )

with c_k the K_h prototypes of clustering h, phi_k their concentrations, and s the cluster of the
example (Li et al. 2021, "Prototypical Contrastive Learning of Unsupervised Representations",
equations 11 and 12).

Legend: H clusterings of K_h clusters each, Q queue, D embedding, M microbatches of n rows, N rows,
    V crops.
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
from hexa_jax.methods.moco import MoCo, MoCoState, check_queue, queue_warnings

SMOOTHING = 10  # alpha of equation 12: keeps small clusters from counting as overly dense
CLIPPED = (10.0, 90.0)  # percentiles that bound the concentrations


class PCLLabels(NamedTuple):
    """Pseudo-labels.

    Attributes:
        key: [..., D], each example's key.
        clusters: int32 [..., H], its clusters; -1 where it has none yet.
    """

    key: jax.Array
    clusters: jax.Array


class PCLDictionary(NamedTuple):
    """What all rows are compared with.

    The queue [Q, D], and per clustering prototypes [K_h, D] and concentrations [K_h].
    """

    queue: jax.Array
    prototypes: tuple[jax.Array, ...]
    concentration: tuple[jax.Array, ...]


class PCLState(NamedTuple):
    """MoCo's state, the clusters, and the bank they are computed from.

    Attributes:
        moco: key encoder and queue.
        assignments: int32 [H, num_examples], -1 for an example without clusters: all of them during
            warm-up, later those not seen in the last epoch.
        prototypes: per clustering [K_h, D] centroids, unit norm; zeros during warm-up.
        concentration: per clustering [K_h], their mean is the temperature.
        objective: [H] mean cosine of the last k-means.
        bank: keys of the running epoch, one per example; of key crops, which no view replaces.
        step: int32, optimizer steps taken.
    """

    moco: MoCoState
    assignments: jax.Array
    prototypes: tuple[jax.Array, ...]
    concentration: tuple[jax.Array, ...]
    objective: jax.Array
    bank: Bank
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class PCL(LabelsBeforeStep):
    """PCL-v2 (salesforce/PCL).

    As there: the momentum encoder's embeddings are clustered anew before each epoch, an example's
    InfoNCE and ProtoNCE are scored on the same query, and the first epochs have InfoNCE alone.
    Otherwise than there:

    * The clustered embeddings are the keys that the epoch before has made anyway. The reference
      passes over all images once more, center crops in evaluation mode; this saves a forward pass
      over the data in each epoch, and the keys are up to an epoch older.
    * k-means is spherical: an example's cluster is the prototype with the highest cosine, which is
      what ProtoNCE scores. The reference runs faiss' Euclidean k-means, the best of 5 starts, and
      normalizes its centroids afterwards. Distances in the concentration are to the unit-norm
      centroids here.
    * All prototypes of a clustering are negatives. The reference draws 16,000 of them for each
      batch to save memory.
    * A row that was not in the last epoch, which leaves out the examples beyond the last whole
      batch, has InfoNCE alone.

    Attributes:
        queue_size: Q, number of negatives; a multiple of the batch size.
        momentum: of the key encoder.
        temperature: of InfoNCE, and the mean of the prototypes' concentrations.
        num_clusters: K_h of each clustering.
        iterations: k-means iterations between epochs.
        warmup_epochs: first epochs with InfoNCE alone; at least 1, in which the bank fills.
    """

    queue_size: int
    momentum: float
    temperature: float
    num_clusters: tuple[int, ...]
    iterations: int
    warmup_epochs: int

    key_crops = 1
    pairs_own_crop = True

    def __post_init__(self) -> None:
        check_positive(
            "pcl",
            queue_size=self.queue_size,
            temperature=self.temperature,
            iterations=self.iterations,
        )
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"pcl.momentum={self.momentum} must be from 0 to 1")
        if not self.num_clusters or min(self.num_clusters) < 1:
            raise ValueError(
                f"pcl.num_clusters={tuple(self.num_clusters)} must be one or more positive numbers"
            )
        if self.warmup_epochs < 1:
            raise ValueError(
                f"pcl.warmup_epochs={self.warmup_epochs} must be 1 or more: the first epoch fills "
                "the bank"
            )

    def check(self, spec: Spec) -> None:
        check_queue("pcl", self.queue_size, spec)
        seen = spec.batch_size * spec.steps_per_epoch
        if max(self.num_clusters) > seen:
            raise ValueError(
                f"pcl.num_clusters={tuple(self.num_clusters)} has more than the {seen} images seen "
                "in an epoch: use fewer"
            )

    def warnings(self, spec: Spec) -> list[str]:
        return queue_warnings("pcl", self.queue_size, spec)

    @property
    def _moco(self) -> MoCo:
        return MoCo(self.queue_size, self.momentum, self.temperature)

    def init(self, key: jax.Array, params: Any, spec: Spec) -> PCLState:
        return PCLState(
            moco=self._moco.init(key, params, spec),
            assignments=jnp.full((len(self.num_clusters), spec.num_examples), -1, jnp.int32),
            prototypes=tuple(jnp.zeros((k, spec.embedding_dim)) for k in self.num_clusters),
            concentration=tuple(self.temperature * jnp.ones((k,)) for k in self.num_clusters),
            objective=jnp.zeros((len(self.num_clusters),)),
            bank=Bank.empty(spec, 1),
            step=jnp.zeros([], jnp.int32),
        )

    def state_spec(self, spec: Spec) -> Any:
        return PCLState(P(), P(), P(), P(), P(), Bank.partition(), P())

    def targets(
        self, encode: Encode, params: Any, state: PCLState, batch: Batch, keys: jax.Array
    ) -> Targets:
        instances = self._moco.targets(encode, params, state.moco, batch, keys)
        clusters = jnp.moveaxis(state.assignments[:, batch.index], 0, -1)  # [M, n, H]
        dictionary = PCLDictionary(instances.dictionary, state.prototypes, state.concentration)
        return instances._replace(y=PCLLabels(instances.y, clusters), dictionary=dictionary)

    def loss(
        self, params: dict, outputs: jax.Array, y: PCLLabels, dictionary: PCLDictionary
    ) -> jax.Array:
        instances = self._moco.loss(params, outputs, y.key, dictionary.queue)

        def one_clustering(
            prototypes: jax.Array, concentration: jax.Array, labels: jax.Array
        ) -> jax.Array:
            scaled = prototypes / concentration[:, None]
            score = lambda z: prototype_cross_entropy(z, scaled, labels, 1.0)  # noqa: E731
            return jax.vmap(score, in_axes=1, out_axes=1)(outputs)  # [N, V]

        clusterings = zip(
            dictionary.prototypes, dictionary.concentration, y.clusters.T, strict=True
        )
        prototypical = [one_clustering(*clustering) for clustering in clusterings]
        return instances + sum(prototypical) / len(prototypical)

    def own_crop_labels(
        self, y: PCLLabels, dictionary: PCLDictionary, outputs: jax.Array
    ) -> tuple[PCLLabels, PCLDictionary]:
        """Put the crop's own output in the key's place.

        The clusters stay: they belong to the example, not to a crop.
        """
        key, queue = self._moco.own_crop_labels(y.key, dictionary.queue, outputs)
        return y._replace(key=key), dictionary._replace(queue=queue)

    def update(
        self,
        state: PCLState,
        params: Any,
        batch: Batch,
        outputs: jax.Array,
        targets: Targets | None,
        step: jax.Array,
    ) -> PCLState:
        """MoCo's update; the keys go into the bank, too."""
        assert targets is not None
        instances = targets._replace(y=targets.y.key)
        return state._replace(
            moco=self._moco.update(state.moco, params, batch, outputs, instances, step),
            bank=state.bank.write(targets.y.key[:, :, None], batch),
            step=step + 1,
        )

    def refresh(self, key: jax.Array, state: PCLState) -> PCLState:
        """Cluster the bank at each granularity, once the warm-up is over."""

        def cluster() -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
            assignments, prototypes, concentrations, objectives = [], [], [], []
            for number, num_clusters in enumerate(self.num_clusters):
                found = state.bank.cluster(
                    jax.random.fold_in(key, number), 0, num_clusters, self.iterations
                )
                distances, counts = state.bank.distances(0, found)
                assignments.append(
                    state.bank.by_example(found.assignments, state.assignments.shape[1])
                )
                prototypes.append(found.centroids)
                concentrations.append(concentration(distances, counts, self.temperature))
                objectives.append(found.objective)
            return (
                jnp.stack(assignments),
                tuple(prototypes),
                tuple(concentrations),
                jnp.stack(objectives),
            )

        def keep() -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
            return state.assignments, state.prototypes, state.concentration, state.objective

        warm = state.step >= self.warmup_epochs * state.bank.index.shape[0]
        assignments, prototypes, concentrations, objective = jax.lax.cond(warm, cluster, keep)
        return state._replace(
            assignments=assignments,
            prototypes=prototypes,
            concentration=concentrations,
            objective=objective,
        )

    def describe(self, before: PCLState, after: PCLState) -> dict[str, jax.Array]:
        return describe_clusters(
            before.assignments, after.assignments, self.num_clusters, after.objective
        )


def concentration(distances: jax.Array, counts: jax.Array, temperature: float) -> jax.Array:
    """Return the concentrations phi of equation 12.

    What the equation leaves open follows the reference's code.

    Mean distance / log(size + 10); a cluster of one member or none gets the largest phi, as its
    distances say nothing, and so does one whose members coincide; bounded by the 10th and 90th
    percentiles; then scaled.

    Args:
        distances: [K] sums of the members' distances to their centroid.
        counts: [K] numbers of members.
        temperature: the mean of the result.

    Returns:
        [K] positive numbers, large for loose clusters; all equal to the temperature if no cluster
        has a distance.
    """
    phi = distances / jnp.maximum(counts, 1) / jnp.log(counts + SMOOTHING)
    phi = jnp.where((counts > 1) & (distances > 0), phi, 0)
    largest = jnp.max(phi)
    phi = jnp.where(phi > 0, phi, jnp.where(largest > 0, largest, 1))
    low, high = jnp.percentile(phi, jnp.array(CLIPPED))
    phi = jnp.clip(phi, low, high)
    return temperature * phi / jnp.mean(phi)
