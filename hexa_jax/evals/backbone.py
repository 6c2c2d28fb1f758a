"""A frozen backbone from the workdir of a pre-training run."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hexa_jax.build import make_method, make_network
from hexa_jax.checkpoint import CheckpointError, Checkpoints
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import CLEAN, EVALUATION, stats_collection

RANDOM = "random"


class Backbone(NamedTuple):
    """A network whose head is not used, with what its features need: clean running statistics, float32.

    Attributes:
        network: `network.apply(variables, images, EVALUATION, method=Network.features)` gives pooled features [N, F].
        variables: parameters and statistics of the backbone.
        step: of pre-training.
        config: of the pre-training run.
    """

    network: Network
    variables: Any
    step: int
    config: ConfigDict

    @property
    def feature_dim(self) -> int:
        """Length of a pooled feature."""
        return self.network.backbone.feature_dim


def load_backbone(checkpoint: str) -> Backbone:
    """The backbone at the newest intact checkpoint of a workdir.

    Raises:
        CheckpointError: the folder holds no run, or no checkpoint, or a damaged one.
    """
    workdir = pathlib.Path(checkpoint).expanduser()
    saved = workdir / "config.json"
    if not saved.is_file():
        raise CheckpointError(f"config.checkpoint={checkpoint!r} is not the workdir of a run: it has no config.json")
    config = ConfigDict(json.loads(saved.read_text()), convert_dict=True)
    if "model" not in config:
        raise CheckpointError(f"config.checkpoint={checkpoint!r} is no pre-training run: its config has no model")
    config.precision = "float32"
    network = make_network(config, make_method(config))
    crops = (jnp.zeros((1, 1, 32, 32, 3)),)
    shapes = dict(jax.eval_shape(lambda: network.init(jax.random.key(0), crops, EVALUATION)))
    params, clean = shapes.pop("params")["backbone"], stats_collection(CLEAN)
    like = {"params": {"backbone": params}, "batch_stats": {clean: {"backbone": shapes[clean]["backbone"]}}}
    checkpoints = Checkpoints(workdir / "checkpoints")
    restored = checkpoints.restore_latest(like, partial=True)
    if restored is None:
        raise CheckpointError(f"config.checkpoint={checkpoint!r} has no checkpoint yet")
    step, tree, _ = restored
    return Backbone(network, {"params": tree["params"], **tree["batch_stats"]}, step, config)
