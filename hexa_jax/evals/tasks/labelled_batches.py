"""Batches of labelled examples for the evaluations that train."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hexa_jax.core.batch import Batch
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.crops import Resolution
from hexa_jax.data.pipeline import BadImages, HostSteps, device_batches, host_iterator, tolerated
from hexa_jax.data.source import Source
from hexa_jax.parallel.mesh import Layout, local_rows


class LabelledBatches:
    """Examples of a source in a new order each epoch, in as many whole batches as fit.

    Attributes:
        steps_per_epoch: batches of an epoch.
        total: batches of all epochs.

    Raises:
        ConfigError: batches that are too large, or that the devices or BatchNorm groups do not
            divide.
    """

    def __init__(self, config: ConfigDict, source: Source, mesh: Mesh, bn_group_size: int):
        batch = config.batch_size
        if batch > len(source):
            raise ConfigError(
                f"batch_size={batch} is more than the {len(source)} images: use a smaller one"
            )
        self.config, self.source, self.mesh = config, source, mesh
        self.layout = Layout(batch, 1, mesh.size, bn_group_size=bn_group_size, cutmix_block=0)
        try:
            self.layout.check()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.steps_per_epoch = len(source) // batch
        self.total = config.epochs * self.steps_per_epoch
        self.bad_images = BadImages(source, config.data.max_bad_fraction)

    def after(self, step: int, resolution: Resolution, source: Any = None) -> Iterator[Batch]:
        """Yield the batches after a step, with crops as `resolution` says.

        `source` may give the same examples other pixels.
        """
        config, runtime = self.config, self.config.runtime
        steps = HostSteps(
            source=source or self.source,
            num_examples=len(self.source),
            labels=None,
            resolutions=(resolution,),
            key_crops=0,
            layout=self.layout,
            rows=local_rows(self.mesh, self.layout),
            seed=config.seed,
            num_steps=self.total,
            max_failures=tolerated(config.data.max_bad_fraction, len(self.source)),
        )
        elements = host_iterator(steps, step, runtime.workers, runtime.threads, runtime.prefetch)
        labels = np.full(len(self.source), -1, np.int32)
        return device_batches(elements, self.mesh, self.layout, self.bad_images, labels)
