"""A run under way: its progress, which checkpoints hold, and the parts that work on it."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from hexa_jax.checkpoint.checkpointer import Checkpoints
from hexa_jax.core.console import log
from hexa_jax.core.preemption import Diverged, PreemptionGuard, Terminated
from hexa_jax.core.progress_bar import ProgressBar
from hexa_jax.data.source import Source
from hexa_jax.parallel import processes
from hexa_jax.storage.workdir import Metrics
from hexa_jax.training.fit_memory import compile_to_fit
from hexa_jax.training.initial_weights import (
    InitialWeights,
    read_initial_weights,
    record_initial_weights,
)
from hexa_jax.training.input import TrainingData
from hexa_jax.training.online_health import Sample, make_sample
from hexa_jax.training.online_probe import Probe, make_probe
from hexa_jax.training.step import CompiledSteps, Trainer, TrainState


@dataclasses.dataclass
class Run:
    """One start of a run; all but its progress can be rebuilt from the config.

    Attributes:
        config: of the run.
        workdir: its folder.
        trainer: static parts, with the layout that fits the devices.
        steps: its compiled functions.
        data: batches of any step.
        probe: labeled examples to measure accuracies with; None without labels.
        sample: images to measure health with; None where it is not measured.
        initial: weights that this start begins from; None for random ones and for a resumed run.
        checkpoints: of the workdir.
        metrics: numbers for the log.
        stop: listens for SIGTERM.
        bar: the progress bar.
        state: progress: parameters and all else that training changes.
        step: progress: optimizer steps taken.
        metadata: progress: what a checkpoint tells besides, JSON. `first_pass` (whether the bank is
            filled), `evaluate` (a step whose accuracies the next start is to measure),
            `reestimated` (the step whose statistics were re-estimated), `best` (by
            `runtime.keep_best`), `clusters` (of the sample), `nmi`, `random_*` and `initial_*`
            (results).
    """

    config: ConfigDict
    workdir: pathlib.Path
    trainer: Trainer
    steps: CompiledSteps
    data: TrainingData
    probe: Probe | None
    sample: Sample | None
    initial: InitialWeights | None
    checkpoints: Checkpoints
    metrics: Metrics
    stop: PreemptionGuard
    bar: ProgressBar
    state: TrainState
    step: int
    metadata: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.trainer.spec.steps_per_epoch

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def assignments(self) -> np.ndarray | None:
        """int32 [heads, examples] clusters, for methods that have them; all processes ask."""
        assignments = getattr(self.state.method, "assignments", None)
        return None if assignments is None else processes.gather(assignments)

    def save(self, last: bool = False) -> None:
        """Save the progress: in the background, or, if it is the last time, before returning."""
        save = self.checkpoints.save_now if last else self.checkpoints.save
        save(self.step, self.state, self.metadata)

    def terminated(self) -> Terminated:
        """What to raise where SIGTERM arrived and the progress is saved."""
        return Terminated.after(self.step, self.workdir)

    def close(self) -> None:
        """Close the parts; the last save ends first."""
        self.bar.close()
        self.stop.close()
        self.metrics.close()
        self.checkpoints.close()


def open_run(config: ConfigDict, workdir: pathlib.Path, source: Source, trainer: Trainer) -> Run:
    """Start a run, or resume it from its newest checkpoint.

    Args:
        config: of the run.
        workdir: its folder.
        source: the training examples.
        trainer: made from the config; its mesh is the current one.

    Raises:
        ConfigError: the step does not fit the devices.
        DataError: examples or labels that cannot be used.
        WeightsError: no usable weights where `model.init` says.
        CheckpointError: every checkpoint is damaged, or of another architecture.
        Diverged: the newest checkpoint holds parameters that are not finite.
    """
    runtime, steps_per_epoch = config.runtime, trainer.spec.steps_per_epoch
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_last=runtime.keep_last,
        keep_every=runtime.keep_every * steps_per_epoch or None,
    )
    saved = checkpoints.steps()
    # Read before anything is compiled; a run that saved something needs them no more.
    initial = None if saved else _read_initial(config, trainer)
    if saved[-1:] == [config.epochs * steps_per_epoch]:  # a finished run takes no step
        steps = trainer.compile()
    else:
        trainer, steps = compile_to_fit(config, trainer, source)
    restored = _restore(checkpoints, trainer)
    if restored is None:
        restored = 0, _initial_state(config, workdir, steps, initial), {"first_pass": False}
    step, state, metadata = restored
    checkpoints.best = metadata.get("best", {}).get("step")
    data = TrainingData.open(config, source, trainer)
    probe, sample = make_probe(config, source, trainer), make_sample(config, source, trainer)
    if sample and "clusters" in metadata:
        sample.clusters = np.asarray(metadata["clusters"], np.int32)
    return Run(
        config=config,
        workdir=workdir,
        trainer=trainer,
        steps=steps,
        data=data,
        probe=probe,
        sample=sample,
        initial=initial,
        checkpoints=checkpoints,
        # Last, when nothing of the config can be wrong any more: its file says that a run began.
        metrics=Metrics(workdir, runtime.loggers, step, config),
        stop=PreemptionGuard(),
        bar=ProgressBar(),
        state=state,
        step=step,
        metadata=metadata,
    )


def _read_initial(config: ConfigDict, trainer: Trainer) -> InitialWeights | None:
    shapes = trainer.state_shapes()
    variables = {"params": shapes.params["network"], **shapes.batch_stats}
    return read_initial_weights(config, trainer.objective.network, variables)


def _initial_state(
    config: ConfigDict, workdir: pathlib.Path, steps: CompiledSteps, initial: InitialWeights | None
) -> TrainState:
    seed = np.uint32(config.seed)
    if initial is None:
        return steps.init(seed)
    record_initial_weights(workdir, initial)
    log("starting from {name}: {architecture}, SHA-256 {sha256:.12}".format(**initial.record))
    return steps.init(seed, initial.variables)


def _restore(
    checkpoints: Checkpoints, trainer: Trainer
) -> tuple[int, TrainState, dict[str, Any]] | None:
    """Return step, state and metadata of the newest checkpoint; None where there is none."""
    restored = checkpoints.restore_latest(trainer.state_shapes())
    if restored is None:
        return None
    step, state, _ = restored
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params)):
        raise Diverged(
            f"step {step} in {checkpoints.directory} holds parameters that are not finite; this "
            "program saves none: remove it, and the same command resumes from the one before"
        )
    log(f"resuming at step {step} from {checkpoints.directory}")
    return restored
