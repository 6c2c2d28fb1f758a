"""The numbers of each training step: checked, logged and shown, one step late."""

import contextlib
import logging
import math
from typing import Any

from hexa_jax.checkpoint.checkpointer import CheckpointError
from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.preemption import Diverged
from hexa_jax.training.factory import make_schedule
from hexa_jax.training.run import Run

COLLAPSED = 0.02  # embedding_std below this: all embeddings are nearly the same
STARVED = 0.3  # share of the time spent on waiting for input above which the terminal is told


class StepReport:
    """Reports the steps of a run.

    A step's numbers are read when the next one is under way: to read them earlier would be to wait
    for the device between two steps.
    """

    def __init__(self, run: Run, clock: StepTimer):
        self._run, self._clock = run, clock
        self._schedule = make_schedule(run.config, run.steps_per_epoch)
        self._pending: tuple[int, dict] | None = None
        self._text = "first step"  # behind the progress bar

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the scalars of a step that was started, and report the step before.

        Raises:
            Diverged: a number of the step before is not finite.
        """
        self.flush()
        self._pending = step, metrics
        self._run.bar.show(step, self._run.total, self._text)

    def flush(self) -> None:
        """Report the last step, too; then what may be saved is known to be finite.

        Raises:
            Diverged: a number is not.
        """
        if self._pending is not None:
            (step, metrics), self._pending = self._pending, None
            self._check_finite(step, metrics)
            if step % self._run.config.runtime.log_every == 0 or step == self._run.total:
                self._log(step, metrics)

    def _check_finite(self, step: int, metrics: dict[str, Any]) -> None:
        names = "loss", "gradient_norm", "parameter_norm"
        loss, gradients, parameters = (float(metrics[name]) for name in names)
        if all(map(math.isfinite, (loss, gradients, parameters))):
            return
        checkpoints = self._run.checkpoints
        with contextlib.suppress(CheckpointError):  # then an older one is the last
            checkpoints.wait()  # it may still be on its way to the disk
        last = "none was saved"
        if saved := checkpoints.steps():
            last = f"the last good checkpoint is step {saved[-1]} in {checkpoints.directory}"
        raise Diverged(
            f"the loss is {loss}, the norm of gradients {gradients} and of parameters {parameters} "
            f"at step {step}; {last}; try a lower optimizer.learning_rate, a warm-up, "
            "precision=float32, or weaker views (views.*.weight, views.epsilon)"
        )

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        run = self._run
        scored = {f"loss_{name}" for name in run.trainer.objective.scored_passes(step - 1)}
        values = {
            name: float(value)
            for name, value in metrics.items()
            if name in scored or not name.startswith("loss_")
        }
        speed, left = self._clock.read(step)
        values |= {
            "learning_rate": float(self._schedule(step - 1)),
            "epoch": step / run.steps_per_epoch,
            "unreadable_images": len(run.data.bad_images.seen),
            "images_per_second": speed,
            "input_wait": self._clock.input_wait,
        }
        run.metrics.write(step, values)
        waited = values["input_wait"]
        self._text = (
            f"epoch {values['epoch']:.2f}/{run.config.epochs}  loss {values['loss']:.4f}  "
            f"{speed:.0f} images/s  ETA {left}"
            + (f"  waited for input {waited:.0%} of the time" if waited > STARVED else "")
        )
        if not run.bar.active:
            log(f"step {step}/{run.total}  {self._text}")
        if values["embedding_std"] < COLLAPSED and step > run.steps_per_epoch:
            logging.warning(
                "step %d: embeddings have collapsed (spread %.4f, 1 is a full sphere): the loss "
                "says nothing any more; try a lower learning rate, or more clusters or negatives",
                step,
                values["embedding_std"],
            )
