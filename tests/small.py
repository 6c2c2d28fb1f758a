"""Miniature runs that several test files share: the smallest network and data that still have every part."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from hexa_jax.data.pipeline import BadImages, HostSteps, device_batches, host_iterator
from hexa_jax.data.shapes import ShapesSource
from hexa_jax.models import resnet
from hexa_jax.parallel.mesh import local_rows
from hexa_jax.training.factory import make_trainer

# The least network that has both kinds of shortcut, the first stage and the last: most of a test is compiling.
resnet.STAGES[6] = (1, 0, 0, 1)


def small_config(method="deepcluster", **overrides):
    """Batch 32, groups of 8, 8-pixel crops, two residual blocks of 4 and 32 channels, both hard views; overrides by dotted key."""
    config = common.get_config()
    config.method = method
    config.precision = "float64"
    config.epochs, config.batch_size, config.bn_group_size = 3, 32, 8
    config.cutmix_block, config.shuffle_block = 4, 16
    config.model.backbone, config.model.stem, config.model.base_channels = "resnet6", "cifar", 4
    config.model.head_dim, config.model.head_hidden = 8, 16
    config.model.head_batch_norm = method in ("simclr", "deepcluster", "swav", "byol")
    config.moco.queue_size = 64
    config.pcl.queue_size, config.pcl.num_clusters, config.pcl.warmup_epochs = 64, (5, 7), 1
    config.deepcluster.num_clusters, config.deepcluster.num_heads = 7, 2
    config.swav.num_prototypes, config.swav.queue_length = 7, 64
    config.byol.momentum, config.byol.predictor_hidden = 0.9, 16
    config.data.source, config.data.shapes_count, config.data.crop_size = "shapes", 70, (8,)
    # Jitter changes brightness alone: the other operations are functions of the same draws, and each takes seconds to compile.
    config.augment.contrast = config.augment.saturation = config.augment.hue = 0.0
    config.augment.blur_probability = (0.0,)
    config.views.adversarial.weight = config.views.cutmix.weight = 1.0
    config.update_from_flattened_dict(overrides)
    return config


class SmallRun:
    """A run in memory, step by step."""

    def __init__(self, config, num_devices=1):
        self.source = ShapesSource("train", image_size=32, num_examples=config.data.shapes_count, seed=0)
        self.trainer = make_trainer(config, len(self.source), jax.devices()[:num_devices], self.source.num_classes)
        self.steps_per_epoch = self.trainer.spec.steps_per_epoch
        self.steps = self.trainer.compile()
        self.losses = []
        with jax.set_mesh(self.trainer.mesh):
            self.state = self.steps.init(config.seed)

    def batches(self, start=0):
        """Batches from step `start` of the first pass on."""
        objective = self.trainer.objective
        host = HostSteps(
            source=self.source,
            num_examples=len(self.source),
            labels=None,
            resolutions=objective.crops.resolutions,
            key_crops=objective.method.key_crops,
            layout=objective.layout,
            rows=local_rows(self.trainer.mesh, objective.layout),
            seed=0,
            num_steps=100,
            max_failures=1,
            crop_sets=objective.scheme.crop_sets,
        )
        labels = np.full(len(self.source), -1, np.int32)
        iterator = host_iterator(host, start, 0, 1, 1)
        return device_batches(iterator, self.trainer.mesh, objective.layout, BadImages(self.source, 0.5), labels)

    def train(self, num_steps):
        """First pass if the method has one, then steps with a refresh at each epoch; returns the final state on the host."""
        with jax.set_mesh(self.trainer.mesh):
            batches = self.batches()
            for _ in range(self.steps_per_epoch):
                batch = next(batches)
                if self.trainer.objective.method.needs_first_pass:
                    self.state = self.steps.observe(self.state, batch, None)
            for step in range(num_steps):
                if step % self.steps_per_epoch == 0:
                    self.state, _ = self.steps.refresh(self.state, jnp.int32(step // self.steps_per_epoch))
                self.state, metrics = self.steps.train(self.state, next(batches), None)
                self.losses.append(float(metrics["loss"]))
            return jax.device_get(self.state)


def largest_difference(a, b):
    """Largest absolute difference between two trees of arrays."""
    differences = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0), a, b)
    return max(jax.tree.leaves(differences), default=0.0)
