"""Measures without labels while training, on a fixed sample of the training images."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax.data.augment import Photometric, augment
from hexa_jax.data.device_crop import random_resized_crop
from hexa_jax.data.source import Source
from hexa_jax.data.subset import spread
from hexa_jax.evals.features import EvalImages
from hexa_jax.evals.health import Health, measure
from hexa_jax.evals.image_size import trained_size
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import CLEAN, EVALUATION, stats_collection
from hexa_jax.training.factory import make_photometric
from hexa_jax.training.step import Trainer, TrainState

BATCH = 256  # images of a forward pass, about
AUGMENTED = 2  # crops of each image


@dataclasses.dataclass
class Sample:
    """Images that stand for the training images, and how the network sees them.

    Attributes:
        indices: int [N] examples of the source.
        images: uint8 [N, S, S, 3], their centers; every process holds all of them.
        mesh: of the run.
        forward: the compiled network: (params, batch_stats, images, numbers) -> see `_represent`.
        features: float32 [N, F] of the images as `measure` last saw them.
        clusters: int32 [N], None before the first `measure` of a run.
    """

    indices: np.ndarray
    images: np.ndarray
    mesh: Mesh
    forward: Any
    features: np.ndarray | None = None
    clusters: np.ndarray | None = None

    def measure(self, state: TrainState) -> dict[str, float]:
        """Return the measures of `hexa_jax.evals.health` by name; keep features and clusters.

        BatchNorm takes the running statistics of the clean set in `state`.
        """
        outputs = [self._batch(state, first) for first in range(0, len(self.images), self._size)]
        named = {name: np.concatenate([batch[name] for batch in outputs]) for name in outputs[0]}
        views = np.moveaxis(named["view_features"], 1, 0), np.moveaxis(named["view_outputs"], 1, 0)
        found: Health = measure(named["features"], named["outputs"], *views, self.clusters)
        self.features, self.clusters = named["features"], found.clusters
        return found.values

    @property
    def rank_limit(self) -> int:
        """The highest effective rank that features of the sample can have."""
        assert self.features is not None
        return min(self.features.shape)

    @property
    def _size(self) -> int:
        """Rows of a forward pass: a multiple of the number of devices."""
        devices = self.mesh.size
        return -(-min(BATCH, len(self.images)) // devices) * devices

    def _batch(self, state: TrainState, first: int) -> dict[str, np.ndarray]:
        images = self.images[first : first + self._size]
        padded = np.zeros((self._size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        numbers = np.arange(first, first + self._size, dtype=np.int32)
        outputs = self.forward(state.params["network"], state.batch_stats, padded, numbers)
        return {
            name: np.asarray(value, np.float32)[: len(images)] for name, value in outputs.items()
        }


def make_sample(config: ConfigDict, source: Source, trainer: Trainer) -> Sample | None:
    """Read `health.images` images, spread evenly over the source.

    Returns:
        The sample; None where `health.every_epochs` is 0 or fewer than three images can be read.
    """
    if not config.health.every_epochs:
        return None
    resize, crop = trained_size(config)
    indices = spread(len(source), config.health.images)
    # Training and kNN warn of the same files.
    chosen = EvalImages(source, indices, resize, crop, quiet=True)
    # All processes read all of them, once: there are few, and no process has to wait for another.
    batches = list(chosen.batches(BATCH))
    images = np.concatenate([batch[:count] for batch, count in batches])
    readable = ~np.isin(chosen.indices, list(chosen.unreadable))
    if readable.sum() < 3:
        logging.warning("health: fewer than 3 of %d images can be read", len(readable))
        return None
    forward = _make_forward(trainer, make_photometric(config))
    return Sample(chosen.indices[readable], images[readable], trainer.mesh, forward)


def _make_forward(trainer: Trainer, photometric: Sequence[Photometric]) -> Any:
    """Return what `Sample.forward` is, with the augmentation of the first crops."""
    rows, whole = NamedSharding(trainer.mesh, P("data")), NamedSharding(trainer.mesh, P())
    network, resolution = trainer.objective.network, trainer.objective.crops.resolutions[0]

    def forward(params: Any, batch_stats: Any, images: jax.Array, numbers: jax.Array) -> Any:
        images = jax.lax.with_sharding_constraint(images, rows)
        views = []
        for view in range(AUGMENTED):
            # The crops are the same in every epoch and for every seed of a run: a change of the
            # measures is one of the network.
            key = jax.random.fold_in(jax.random.key(0), view)
            keys = jax.vmap(lambda n, key=key: jax.random.split(jax.random.fold_in(key, n), 3))(
                numbers
            )
            cut = random_resized_crop(
                keys[:, 0],
                images,
                resolution.size,
                resolution.scale,
                resolution.ratio,
                resolution.flip,
                resolution.vertical_flip,
                resolution.quarter_turns,
                keys[:, 2],
            )
            settings = photometric[min(view, len(photometric) - 1)]
            views.append(augment(keys[:, 1], cut.astype(trainer.dtype), settings))
        name = stats_collection(CLEAN)
        variables = {"params": params, name: batch_stats[name]}
        seen = (images.astype(trainer.dtype) / 255)[:, None]
        features, outputs = network.apply(variables, seen, method=_represent)
        of_views = network.apply(variables, jnp.stack(views, axis=1), method=_represent)
        return {
            "features": features[:, 0],
            "outputs": outputs[:, 0],
            "view_features": of_views[0],
            "view_outputs": of_views[1],
        }

    return jax.jit(forward, in_shardings=whole, out_shardings=whole)


def _represent(network: Network, crops: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return features [N, V, F] and outputs of the head [N, V, D] of crops [N, V, H, W, 3].

    Without a head the features are the outputs.
    """
    features = network.features(crops.reshape(-1, *crops.shape[2:]), EVALUATION)
    outputs = features if network.head is None else network.head(features, EVALUATION)
    lead = crops.shape[:2]
    return features.reshape(*lead, -1), outputs.reshape(*lead, -1)
