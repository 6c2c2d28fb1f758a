"""The pre-training loop: refresh, next batch, step, report, evaluate, save."""

import contextlib
import itertools
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from hexa_jax.core.batch import Batch
from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.errors import ConfigError
from hexa_jax.core.preemption import Terminated
from hexa_jax.data.open import open_training_source
from hexa_jax.data.source import Source
from hexa_jax.parallel import processes
from hexa_jax.parallel.hardware import accelerator_warning, devices_in_words
from hexa_jax.report import page
from hexa_jax.storage.workdir import PLAIN, open_workdir, write_json
from hexa_jax.training.clean_statistics import is_settled, settle
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.live_report import LiveReport
from hexa_jax.training.measurements import Accuracies, Health, log_refresh
from hexa_jax.training.normalization import settle_normalization
from hexa_jax.training.run import Run, open_run
from hexa_jax.training.schemes import make_scheme
from hexa_jax.training.step_report import StepReport

# results of the plain run that are shown beside the run's own
COMPARED = ("knn_accuracy", "linear_accuracy", "nmi")


def pretrain(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Run or resume; with `config.compare_with_plain` the plain run first, inside.

    Returns:
        The flat results that `result.json` holds.

    Raises:
        Terminated: SIGTERM arrived; the state is saved.
        Diverged: the loss became NaN or infinite; no checkpoint was overwritten.
        ConfigError: there are no hard views to compare with the plain run.
    """
    source = open_training_source(config)
    if not config.compare_with_plain:
        return _pretrain(config, workdir, source)
    plain = plain_config(config)
    # The epochs have been checked with the run's own config: where they may grow, they may here.
    folder = open_workdir(str(workdir / PLAIN), plain, extend=True)
    log("the plain run first, then the one with hard views")
    found = _finished(folder, plain) or _pretrain(plain, folder, source, with_report=False)
    return _pretrain(config, workdir, source, plain=found)


def plain_config(config: ConfigDict) -> ConfigDict:
    """The same run without hard views.

    Raises:
        ConfigError: the config has none.
    """
    if not make_scheme(config).views:
        raise ConfigError(
            "config.compare_with_plain: this run has no hard views, it is the plain one"
        )
    plain = ConfigDict(config.to_dict())
    plain.scheme, plain.compare_with_plain = "std", False
    plain.knn.pixels = False  # the same images: measured once
    return plain


def _finished(workdir: pathlib.Path, config: ConfigDict) -> dict[str, Any] | None:
    """The results of a run that has ended, None of one that has not."""
    path = workdir / "result.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    return results if results.get("epochs") == config.epochs else None


def _pretrain(
    config: ConfigDict,
    workdir: pathlib.Path,
    source: Source,
    plain: dict[str, Any] | None = None,
    with_report: bool = True,
) -> dict[str, Any]:
    """Run or resume one run; `plain` are the results of the one that it is compared with."""
    trainer = make_trainer(config, len(source), num_classes=source.num_classes)
    trainer = settle_normalization(config, workdir, source, trainer)
    if processes.is_main_process() and (unused := accelerator_warning()):
        logging.warning(unused)
    with jax.set_mesh(trainer.mesh):
        run = open_run(config, workdir, source, trainer)
        try:
            report = LiveReport(run) if with_report else None
            _Loop(run, report).run()
            return _finish(run, report, plain)
        finally:
            run.close()


class _Loop:
    """Takes a run to its last step."""

    def __init__(self, run: Run, report: LiveReport | None):
        self._run, self._report = run, report
        self._clock = StepTimer(run.config.batch_size, run.total)
        self._steps = StepReport(run, self._clock)
        self._accuracies, self._health = Accuracies(run), Health(run)

    def run(self) -> None:
        """Take all steps that are left, and leave a checkpoint of the last.

        Raises:
            Terminated: SIGTERM arrived; the progress is saved.
            Diverged: a number of a step is not finite; no checkpoint was overwritten.
        """
        run = self._run
        millions = parameter_overview.count_parameters(run.state.params) / 1e6
        devices = devices_in_words(list(run.trainer.mesh.devices.flat))
        log(f"{len(run.data.source)} images, {millions:.1f} million parameters, {devices}")
        if not run.metadata["first_pass"]:
            _before_first_step(run, self._accuracies, self._health)
        if run.metadata.pop("evaluate", None) == run.step:  # the last start was stopped before
            self._accuracies.measure(run.step // run.steps_per_epoch)
        with contextlib.closing(run.data.batches(run.steps_per_epoch + run.step)) as batches:
            self._train(batches)
        if not is_settled(run):
            settle(run)
            run.save(last=True)

    def _train(self, batches: Iterator[Batch]) -> None:
        run = self._run
        every = run.config.runtime.checkpoint_every or run.steps_per_epoch
        self._clock.start(run.step)
        while run.step < run.total:
            if run.step % run.steps_per_epoch == 0:
                epoch = run.step // run.steps_per_epoch
                run.state, scalars = run.steps.refresh(run.state, np.int32(epoch))
                log_refresh(run, epoch, scalars)
            with self._clock.waiting():
                batch = next(batches)
            run.state, metrics = run.steps.train(run.state, batch, run.data.resident)
            run.step += 1
            self._steps.add(run.step, metrics)
            ends_epoch = run.step % run.steps_per_epoch == 0
            best = ends_epoch and self._end_epoch(run.step // run.steps_per_epoch)
            stopping, last = run.stop.reached(), run.step == run.total
            if run.step % every == 0 or last or stopping or best:
                self._steps.flush()  # also the check that what is saved is finite
                # Those of the last checkpoint are settled once it is saved: a kill loses no step.
                if best and not last:
                    settle(run)
                run.save(last=stopping or last)
            if stopping and not last:
                raise run.terminated()

    def _end_epoch(self, epoch: int) -> bool:
        """Measure and show what is due after an epoch; return whether it is the best so far."""
        health, accuracies = self._health.due(epoch), self._accuracies.due(epoch)
        report = self._report if self._report and self._report.due(epoch) else None
        if not (health or accuracies or report):
            return False
        self._steps.flush()
        with self._clock.paused():
            best = health and self._health.measure(epoch)
            self._accuracies.measure(epoch)
            if report:
                report.write()
        return best


def _before_first_step(run: Run, accuracies: Accuracies, health: Health) -> None:
    """Measure the initial weights, fill the bank, measure a random network, and save."""
    needed = run.trainer.objective.method.needs_first_pass
    accuracies.measure_initial()
    if needed:
        _fill_bank(run)
    accuracies.measure_random(calibrated=needed)
    health.measure_start(calibrated=bool(needed or run.initial))
    run.metadata["first_pass"] = True
    if needed:
        run.save()


def _fill_bank(run: Run) -> None:
    """Show the method all batches of the first pass."""
    steps = run.steps_per_epoch
    log(f"first pass: {steps} forward steps fill the bank")
    batches = itertools.islice(run.data.batches(0), steps)
    for batch in run.bar.track(batches, steps, "first pass"):
        run.state = run.steps.observe(run.state, batch, run.data.resident)
        if run.stop.reached():
            raise Terminated(f"SIGTERM during the first pass, nothing to save yet: {run.workdir}")


def _finish(run: Run, report: LiveReport | None, plain: dict[str, Any] | None) -> dict[str, Any]:
    """Measure the network that a run ends with, and write results and report."""
    run.checkpoints.wait()
    results: dict[str, Any] = {"step": run.step, "epochs": run.config.epochs}
    results |= Accuracies(run).results()
    if plain is not None:
        results |= {f"plain_{name}": plain[name] for name in COMPARED if name in plain}
    write_json(run.workdir / "result.json", results)
    if run.sample and run.sample.features is None:  # the run had ended before this start
        run.sample.measure(run.state)
    if report is not None:
        path = report.write()
        log(page.table(results) + f"\nreport: {path}")
    return results
