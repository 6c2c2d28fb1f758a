"""The programs of a config, lowered from shapes alone: pre-training's, or the detector's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax.core.errors import choose
from hexa_jax.detection.batches import DetectionBatch
from hexa_jax.detection.canvases import Canvases
from hexa_jax.detection.task import make_base_optimizer, make_model
from hexa_jax.detection.training import (
    STATS,
    DetectorState,
    Frozen,
    make_detect,
    make_optimizer,
    make_step,
)
from hexa_jax.evals.backbone import IMAGENET_MEAN, IMAGENET_STD
from hexa_jax.evals.features import make_extractor
from hexa_jax.methods.base import Method
from hexa_jax.models.resnet import make_resnet
from hexa_jax.training.factory import PRECISIONS
from hexa_jax.training.step import Trainer

Lowerings = dict[str, Callable[[], Any]]
PRETRAINING = ("train", "augment", "init", "refresh", "features")
DETECTION = ("train", "detect")
EVALUATION_ROWS = 256  # images a device


def pretraining(trainer: Trainer) -> Lowerings:
    """Return {program: a function that lowers it}; without "refresh" where the method has nothing to do between epochs."""
    mesh, steps, state = trainer.mesh, trainer.compile(), trainer.state_shapes()

    def features() -> Any:
        size = trainer.objective.crops.resolutions[0].size
        images = jax.ShapeDtypeStruct((EVALUATION_ROWS * mesh.size, size, size, 3), jnp.uint8)
        extractor: Any = make_extractor(trainer.objective.network, mesh, jnp.bfloat16)
        return extractor.lower(state.params["network"], state.batch_stats, images)

    programs: Lowerings = {
        "train": lambda: steps.train.lower(state, trainer.batch_shapes(), None),
        "augment": lambda: steps.augment.lower(state, trainer.batch_shapes(), None),
        "init": lambda: steps.init.lower(jax.ShapeDtypeStruct((), jnp.uint32)),
        "refresh": lambda: steps.refresh.lower(state, jax.ShapeDtypeStruct((), jnp.int32)),
        "features": features,
    }
    if type(trainer.objective.method).refresh is Method.refresh:
        del programs["refresh"]
    return programs


def detection(config: ConfigDict, mesh: Mesh, num_classes: int, steps_per_epoch: int) -> Lowerings:
    """Return {program: a function that lowers it} of the detector, on lying images of the largest canvas.

    Args:
        config: of the task detection.
        mesh: with the axis "data".
        num_classes: objects' classes.
        steps_per_epoch: for the schedule.
    """
    dtype = choose("precision", config.precision, PRECISIONS)[0]
    random = config.random
    resnet = make_resnet(random.backbone, random.base_channels, stem=random.stem, dtype=dtype)
    model: Any = make_model(config, resnet, num_classes, IMAGENET_MEAN, IMAGENET_STD)
    frozen = Frozen(config.model.frozen_stages, config.model.batch_norm == "frozen")
    optimizer = make_optimizer(make_base_optimizer(config, steps_per_epoch), frozen)
    sizes = Canvases(config.data.canvases, config.data.short_sides, config.data.long_limit)
    height, width = sizes.shapes(portrait=False)[-1]

    def fresh() -> DetectorState:
        variables = model.network.init(
            jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64, jnp.int32)
        )
        params = variables["params"]
        return DetectorState(
            jnp.uint32(0), jnp.int32(0), params, variables[STATS], optimizer.init(params)
        )

    def batch(count: int) -> DetectionBatch:
        boxes = config.data.max_boxes

        def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                (count, *shape), dtype, sharding=NamedSharding(mesh, P("data"))
            )

        return DetectionBatch(
            images=leaf(np.uint8, height, width, 3),
            sizes=leaf(np.int32, 2),
            boxes=leaf(np.float32, boxes, 4),
            labels=leaf(np.int32, boxes),
            index=leaf(np.int32),
        )

    whole = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(fresh),
    )
    step: Any = make_step(model, optimizer, frozen, mesh, config.batch_size)
    detect: Any = make_detect(model, mesh)
    return {
        "train": lambda: step.lower(state, batch(config.batch_size)),
        "detect": lambda: detect.lower(state.params, state.stats, batch(config.runtime.batch_size)),
    }
