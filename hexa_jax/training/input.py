"""The data of a run: from a source to batches of any step on the devices."""

import dataclasses
from collections.abc import Generator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from hexa_jax.core.batch import Batch
from hexa_jax.data.pipeline import (
    BadImages,
    HostSteps,
    device_batches,
    host_iterator,
    resident_images,
    tolerated,
)
from hexa_jax.data.source import Source
from hexa_jax.data.subset import labels_are_free
from hexa_jax.parallel.mesh import local_rows
from hexa_jax.training.step import Trainer


@dataclasses.dataclass
class TrainingData:
    """The data of a run: its source, its batches, and resident images if there are any."""

    config: ConfigDict
    source: Source
    trainer: Trainer
    bad_images: BadImages
    resident: jax.Array | None
    labels: np.ndarray  # int32 [num_examples], -1 where none is known yet

    @classmethod
    def open(cls, config: ConfigDict, source: Source, trainer: Trainer) -> "TrainingData":
        """Read what must be in memory: labels, and all images when they live on the device."""
        bad_images, resident = BadImages(source, config.data.max_bad_fraction), None
        if config.data.on_device:
            images = resident_images(source, bad_images, cls._max_failures(config, source))
            # once, not in every step
            resident = jax.device_put(images, NamedSharding(trainer.mesh, PartitionSpec()))
        # else as they pass by
        known = source.labels() if resident is not None or labels_are_free(source) else None
        labels = np.full(len(source), -1, np.int32) if known is None else np.array(known)
        return cls(config, source, trainer, bad_images, resident, labels)

    @staticmethod
    def _max_failures(config: ConfigDict, source: Source) -> int:
        return tolerated(config.data.max_bad_fraction, len(source))

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """Yield batches from step `start` on.

        The first pass is steps 0 to steps_per_epoch - 1; training follows.
        """
        objective, spec, runtime = self.trainer.objective, self.trainer.spec, self.config.runtime
        on_device = self.resident is not None
        steps = HostSteps(
            source=None if on_device else self.source,
            num_examples=spec.num_examples,
            labels=self.labels if on_device else None,
            resolutions=tuple(objective.crops.resolutions),
            key_crops=objective.method.key_crops,
            layout=objective.layout,
            rows=local_rows(self.trainer.mesh, objective.layout),
            seed=self.config.seed,
            num_steps=(1 + self.config.epochs) * spec.steps_per_epoch,
            max_failures=self._max_failures(self.config, self.source),
            bad=frozenset(self.bad_images.seen) if on_device else frozenset(),
            crop_sets=objective.scheme.crop_sets,
        )
        elements = host_iterator(steps, start, runtime.workers, runtime.threads, runtime.prefetch)
        return device_batches(
            elements, self.trainer.mesh, objective.layout, self.bad_images, self.labels
        )
