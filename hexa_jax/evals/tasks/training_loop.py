"""The loop of evaluations that train: resume, step, log, evaluate, save, stop."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hexa_jax.checkpoint.checkpointer import Checkpoints
from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.preemption import Diverged, PreemptionGuard, Terminated
from hexa_jax.storage.workdir import Metrics

Results = dict[str, float]


@dataclasses.dataclass(frozen=True)
class TrainingLoop:
    """What stays the same from step to step.

    Attributes:
        config: its `batch_size` and `runtime` are read.
        folder: of checkpoints and metrics.
        total: steps in all.
        steps_per_epoch: epochs may be cut off at the end.
        step: (state, batch) -> (state, scalars), which have "loss" among them; the state has a
            `step`.
        batches: the batches after a step.
        evaluate: (state, epoch) -> results in a few numbers, or nothing; the time it takes is not
            training's.
        advice: what to try when the loss is not finite.
        sound: the part of a state that must be finite to be saved; all of it by default. A task
            that trains several classifiers side by side lets all but the first of them diverge.
    """

    config: ConfigDict
    folder: pathlib.Path
    total: int
    steps_per_epoch: int
    step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    batches: Callable[[int], Iterator[Any]]
    evaluate: Callable[[Any, float], Results]
    advice: str
    sound: Callable[[Any], Any] = lambda state: state

    def run(self, state: Any, stop: PreemptionGuard) -> tuple[Any, list[Results]]:
        """Run to the last step; return its state, and what `evaluate` gave after each epoch.

        Raises:
            Diverged: the loss or the state became NaN or infinite; no checkpoint was overwritten.
            Terminated: SIGTERM arrived; the state is saved.
        """
        self.folder.mkdir(exist_ok=True)
        checkpoints = Checkpoints(self.folder / "checkpoints", keep_last=2)
        try:
            return self._run(state, stop, checkpoints)
        finally:
            checkpoints.close()

    def _run(
        self, state: Any, stop: PreemptionGuard, checkpoints: Checkpoints
    ) -> tuple[Any, list[Results]]:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        history: list[Results] = []
        if (restored := checkpoints.restore_latest(like)) is not None:
            _, state, metadata = restored
            history = metadata.get("history", [])  # older linear probes kept none
        start = int(state.step)
        if start >= self.total:
            return state, history
        metrics = Metrics(self.folder, self.config.runtime.loggers, start, self.config)
        clock, batches = StepTimer(self.config.batch_size, self.total), self.batches(start)
        try:
            clock.start(start)
            for step in range(start + 1, self.total + 1):
                state, scalars = self.step(state, next(batches))
                ends = step % self.steps_per_epoch == 0 or step == self.total
                if step % self.config.runtime.log_every == 0 or ends:
                    self._log(step, scalars, metrics, clock)
                if ends:
                    with clock.paused():
                        results = self.evaluate(state, step / self.steps_per_epoch)
                    if results:
                        history = [*history, results]
                        metrics.write(step, {"epoch": step / self.steps_per_epoch, **results})
                stopping = stop.reached()
                if ends or stopping:
                    # A signal may arrive between two steps that are logged, and so between two
                    # checks.
                    self._check(step, scalars, state)
                    checkpoints.save(step, state, {"history": history})
                if stopping and step < self.total:
                    checkpoints.wait()
                    raise Terminated.after(step, self.folder)
        finally:
            metrics.close()
        return state, history

    def _check(self, step: int, scalars: dict[str, jax.Array], state: Any = None) -> None:
        """Check that the loss of a step, and the state if given, are finite.

        Raises:
            Diverged: they are not.
        """
        loss = float(scalars["loss"])
        if not np.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step}; {self.advice}")
        # The loss is that of the parameters before the step, which may have broken them.
        if state is not None and not _all_finite(self.sound(state)):
            raise Diverged(f"the parameters are no longer finite after step {step}; {self.advice}")

    def _log(
        self, step: int, scalars: dict[str, jax.Array], metrics: Metrics, clock: StepTimer
    ) -> None:
        self._check(step, scalars)
        values = {name: float(value) for name, value in scalars.items()}
        speed, left = clock.read(step)
        metrics.write(step, {**values, "images_per_second": speed})
        epoch = step / self.steps_per_epoch
        speed_text = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
        log(
            f"step {step}/{self.total}  epoch {epoch:.2f}  loss {values['loss']:.4f}  {speed_text} "
            f"images/s  ETA {left}"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    """Whether no floating-point leaf of a tree holds NaN or infinity; a bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all()
