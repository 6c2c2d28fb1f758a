"""A finished or stopped run, opened again from its workdir."""

import json
import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from hexa_jax.checkpoint.checkpointer import CheckpointError, Checkpoints
from hexa_jax.data.open import open_training_source
from hexa_jax.data.source import Source
from hexa_jax.storage.workdir import with_added
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.step import Trainer, TrainState


class LoadedRun(NamedTuple):
    """A run's config, training examples, trainer, and its state at `step`."""

    config: ConfigDict
    source: Source
    trainer: Trainer
    state: TrainState
    step: int


def load_run(workdir: pathlib.Path) -> LoadedRun:
    """The run in a workdir at its newest checkpoint, on this process's devices.

    Raises:
        CheckpointError: no run, or none with a checkpoint, is there.
    """
    saved = workdir / "config.json"
    if not saved.is_file():
        raise CheckpointError(f"{workdir} is not the workdir of a run: it has no config.json")
    config = with_added(ConfigDict(json.loads(saved.read_text()), convert_dict=True))
    source = open_training_source(config)
    trainer = make_trainer(config, len(source), num_classes=source.num_classes)
    checkpoints = Checkpoints(workdir / "checkpoints")
    with jax.set_mesh(trainer.mesh):
        restored = checkpoints.restore_latest(trainer.state_shapes())
    checkpoints.close()
    if restored is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet")
    step, state, _ = restored
    return LoadedRun(config, source, trainer, state, step)
