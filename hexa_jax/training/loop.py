"""The pre-training loop: refresh, next batch, step, report, evaluate, save."""

import contextlib
import itertools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict
from sklearn.metrics import normalized_mutual_info_score

from hexa_jax.checkpoint.checkpointer import CheckpointError, Checkpoints
from hexa_jax.core.batch import Batch
from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.errors import ConfigError
from hexa_jax.core.preemption import Diverged, PreemptionGuard, Terminated
from hexa_jax.core.progress_bar import ProgressBar
from hexa_jax.data.open import open_training_source
from hexa_jax.data.source import Source
from hexa_jax.evals.health import HIGHER_IS_BETTER
from hexa_jax.models.norm import CLEAN, stats_collection
from hexa_jax.parallel import processes
from hexa_jax.parallel.hardware import accelerator_warning, devices_in_words
from hexa_jax.report import page
from hexa_jax.storage.workdir import PLAIN, Metrics, open_workdir, write_json
from hexa_jax.training.factory import make_schedule, make_trainer
from hexa_jax.training.fit_memory import compile_to_fit
from hexa_jax.training.initial_weights import (
    InitialWeights,
    read_initial_weights,
    record_initial_weights,
)
from hexa_jax.training.input import TrainingData
from hexa_jax.training.live_report import LiveReport
from hexa_jax.training.normalization import settle_normalization
from hexa_jax.training.online_health import Sample, make_sample
from hexa_jax.training.online_probe import Probe, make_probe
from hexa_jax.training.schemes import make_scheme
from hexa_jax.training.step import CompiledSteps, Trainer, TrainState
from hexa_jax.views.preview import ViewPreview

COLLAPSED = 0.02  # embedding_std below this: all embeddings are nearly the same
STARVED = 0.3  # share of the time spent on waiting for input above which the terminal is told
INITIAL = "initial_"  # what the accuracies of the weights that a run started from are called by
# results of the plain run that are shown beside the run's own
COMPARED = ("knn_accuracy", "linear_accuracy", "nmi")
CALIBRATION_STEPS = 50  # forward passes that give a random network its BatchNorm statistics


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
    trainer = make_trainer(config, len(source), num_classes=source.num_classes)
    trainer = settle_normalization(config, workdir, source, trainer)
    if processes.is_main_process() and (unused := accelerator_warning()):
        logging.warning(unused)
    with jax.set_mesh(trainer.mesh):
        run = _Run(config, workdir, source, trainer)
        run.plain, run.with_report = plain, with_report
        return run.run()


class _Run:
    """One start of the loop; what it holds besides the state can be rebuilt from the config."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, source: Source, trainer: Trainer):
        self.config, self.workdir = config, workdir
        self.steps_per_epoch = trainer.spec.steps_per_epoch
        self.total = config.epochs * self.steps_per_epoch
        runtime = config.runtime
        keep_every = runtime.keep_every * self.steps_per_epoch or None
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", keep_last=runtime.keep_last, keep_every=keep_every
        )
        saved = self.checkpoints.steps()
        # Read before anything is compiled; a run that saved something needs them no more.
        self.initial = None if saved else self._read_initial(trainer)
        self.trainer: Trainer = trainer
        if saved[-1:] == [self.total]:  # a finished run takes no step
            self.steps: CompiledSteps = trainer.compile()
        else:
            self.trainer, self.steps = compile_to_fit(config, trainer, source)
        self.state, self.step, self.metadata = self._restore()
        self.input = TrainingData.open(config, source, self.trainer)
        self.probe: Probe | None = make_probe(config, source, self.trainer)
        self.sample: Sample | None = make_sample(config, source, self.trainer)
        if self.sample and "clusters" in self.metadata:
            self.sample.clusters = np.asarray(self.metadata["clusters"], np.int32)
        self.checkpoints.best = self.metadata.get("best", {}).get("step")
        self.report = LiveReport(config, workdir, self.trainer, self.input, self.probe, self.sample)
        self.metrics = Metrics(workdir, runtime.loggers, self.step, config)
        self.clock = StepTimer(config.batch_size, self.total)
        self.stop = PreemptionGuard()
        self.bar, self.bar_text = ProgressBar(), "first step"
        self.schedule: Callable = make_schedule(config, self.steps_per_epoch)
        # results of the plain run that this one is compared with
        self.plain: dict[str, Any] | None = None
        self.with_report = True

    def _read_initial(self, trainer: Trainer) -> InitialWeights | None:
        shapes = trainer.state_shapes()
        variables = {"params": shapes.params["network"], **shapes.batch_stats}
        return read_initial_weights(self.config, trainer.objective.network, variables)

    def _restore(self) -> tuple[TrainState, int, dict]:
        restored = self.checkpoints.restore_latest(self.trainer.state_shapes())
        if restored is None:
            if self.initial is None:
                return self.steps.init(np.uint32(self.config.seed)), 0, {"first_pass": False}
            record_initial_weights(self.workdir, self.initial)
            log(
                "starting from {name}: {architecture}, SHA-256 {sha256:.12}".format(
                    **self.initial.record
                )
            )
            return (
                self.steps.init(np.uint32(self.config.seed), self.initial.variables),
                0,
                {"first_pass": False},
            )
        step, state, metadata = restored
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params)):
            raise Diverged(
                f"step {step} in {self.checkpoints.directory} holds parameters that are not "
                "finite; this program saves none: "
                "remove it, and the same command resumes from the one before"
            )
        log(f"resuming at step {step} from {self.checkpoints.directory}")
        return state, step, metadata

    def run(self) -> dict[str, Any]:
        millions = parameter_overview.count_parameters(self.state.params) / 1e6
        devices = devices_in_words(list(self.trainer.mesh.devices.flat))
        log(f"{len(self.input.source)} images, {millions:.1f} million parameters, {devices}")
        try:
            if not self.metadata["first_pass"]:
                self._first_pass()
            with contextlib.closing(
                self.input.batches(self.steps_per_epoch + self.step)
            ) as batches:
                self._loop(batches)
            self._settle_last_checkpoint()
            return self._finish()
        finally:
            self.bar.close()
            self.stop.close()
            self.metrics.close()
            self.checkpoints.close()

    # ---- The loop --------------------------------------------------------------------------------

    def _loop(self, batches: Iterator[Batch]) -> None:
        pending: tuple[int, dict] | None = None
        every = self.config.runtime.checkpoint_every or self.steps_per_epoch
        epoch = self.step // self.steps_per_epoch
        if self.metadata.pop("evaluate", None) == self.step and (due := self._due(epoch)):
            self._evaluate(epoch, due)
        self.clock.start(self.step)
        while self.step < self.total:
            if self.step % self.steps_per_epoch == 0:
                self._refresh(self.step // self.steps_per_epoch)
            with self.clock.waiting():
                batch = next(batches)
            self.state, metrics = self.steps.train(self.state, batch, self.input.resident)
            if pending:
                # of the step before: reading this one's numbers would wait for it
                self._report(*pending)
            self.step += 1
            pending = (self.step, metrics)
            self.bar.show(self.step, self.total, self.bar_text)
            best = False
            if self.step % self.steps_per_epoch == 0:
                pending, best = self._end_epoch(self.step // self.steps_per_epoch, pending)
            stopping = self.stop.reached()
            if self.step % every == 0 or self.step == self.total or stopping or best:
                if pending:
                    self._report(*pending)  # also the check that what is saved is finite
                pending = None
                # Those of the last checkpoint wait until it is saved: a kill on the way loses no
                # step.
                if (
                    best
                    and self.step < self.total
                    and self.metadata.get("reestimated") != self.step
                ):
                    self._settle_statistics()
                self._save(last=stopping or self.step == self.total)
            if stopping and self.step < self.total:
                raise self._terminated()

    def _end_epoch(
        self, epoch: int, pending: tuple[int, dict]
    ) -> tuple[tuple[int, dict] | None, bool]:
        """Measure and show what is due after an epoch.

        Args:
            epoch: number of epochs done.
            pending: the last step and its metrics, not yet reported.

        Returns:
            `pending` if it is still to be reported, and whether the checkpoint of this step is the
            best so far.
        """
        health, due = self._health_due(epoch), self._due(epoch)
        page_due = self.with_report and self.report.due(epoch)
        if not (health or due or page_due):
            return pending, False
        self._report(*pending)
        with self.clock.paused():
            best = health and self._measure_health(epoch)
            if due:
                self._evaluate(epoch, due)
            if page_due:
                self.report.write(self.state, self.views, self.assignments)
        return None, best

    def _terminated(self) -> Terminated:
        return Terminated(
            f"SIGTERM: saved step {self.step} in {self.workdir}; the same command resumes it"
        )

    def _first_pass(self) -> None:
        """Measure the initial weights, fill the bank, save, and measure a random network."""
        needed = self.trainer.objective.method.needs_first_pass
        measured = bool(self.config.knn.every_epochs and self.probe)
        if self.initial and measured:
            self._measure_initial()
        if needed:
            log(f"first pass: {self.steps_per_epoch} forward steps fill the bank")
            batches = itertools.islice(self.input.batches(0), self.steps_per_epoch)
            for batch in self.bar.track(batches, self.steps_per_epoch, "first pass"):
                self.state = self.steps.observe(self.state, batch, self.input.resident)
                if self.stop.reached():
                    raise Terminated(
                        f"SIGTERM during the first pass, nothing to save yet: {self.workdir}"
                    )
        if measured:
            self._measure_random(calibrated=needed)
        if self.sample:
            made_up = not (needed or self.initial)  # the running statistics of a fresh network
            self._log_health(
                0, self.sample.measure(self._few_statistics() if made_up else self.state)
            )
        self.metadata["first_pass"] = True
        if needed:
            self._save(last=False)

    # ---- Health: measures without labels ---------------------------------------------------------

    def _health_due(self, epoch: int) -> bool:
        every = self.config.health.every_epochs
        return self.sample is not None and (epoch % every == 0 or epoch == self.config.epochs)

    def _measure_health(self, epoch: int) -> bool:
        """Measure and log; return whether this is the best epoch so far by `runtime.keep_best`."""
        assert self.sample is not None
        values = self.sample.measure(self._health_state())
        self._log_health(epoch, values)
        name = self.config.runtime.keep_best
        if name not in values:  # no wish, or no epoch before this one to compare clusters with
            return False
        sign = 1 if HIGHER_IS_BETTER[name] else -1
        best = self.metadata.get("best")
        ahead = best is None or best["name"] != name or sign * values[name] > sign * best["value"]
        if not processes.broadcast_from_main(ahead):
            return False
        self.metadata["best"] = {
            "name": name,
            "value": values[name],
            "step": self.step,
            "epoch": epoch,
        }
        self.checkpoints.best = self.step
        return True

    def _log_health(self, epoch: int, values: dict[str, float]) -> None:
        assert self.sample is not None and self.sample.clusters is not None
        self.metadata["clusters"] = self.sample.clusters.tolist()
        self.metrics.write(self.step, {"epoch": epoch, **values})
        log(
            f"epoch {epoch}: effective rank {values['rankme']:.1f} of {self.sample.rank_limit}, "
            f"neighbors agree {values['neighbor_agreement']:.0%}"
            + (f", clusters stable {s:.0%}" if (s := values.get("cluster_stability")) else "")
        )

    def _health_state(self) -> TrainState:
        """The state with the statistics to measure health by; the run's own stay as they are."""
        return (
            self._few_statistics() if self.config.eval_statistics == "reestimated" else self.state
        )

    def _few_statistics(self) -> TrainState:
        """Re-estimate statistics over about as many images as the sample has."""
        batches = -(-self.config.health.images // self.config.batch_size)
        return self._reestimated(min(batches, self.steps_per_epoch), stoppable=False)

    # ---- Accuracies and statistics ---------------------------------------------------------------

    def _measure_initial(self) -> None:
        results = self._probe_results(self.state)  # by the statistics that came with the weights
        self.metadata |= {f"{INITIAL}{name}": value for name, value in results.items()}
        self.metrics.write(0, results)
        log(f"initial weights: kNN {results['knn_accuracy']:.1f} %")

    def _measure_random(self, calibrated: bool) -> None:
        state = self.state
        if self.initial:
            state, calibrated = self._random_network(), False
        if not calibrated:  # running statistics of a fresh network are made up
            state = self._reestimated(min(CALIBRATION_STEPS, self.steps_per_epoch), state)
        results = self._probe_results(state)
        self.metadata |= {f"random_{name}": value for name, value in results.items()}
        if not self.initial:
            self.metrics.write(0, results)
        log(f"random initialisation: kNN {results['knn_accuracy']:.1f} %")

    def _random_network(self) -> TrainState:
        """Return the state with the network that the run's seed would have drawn.

        No second bank or queue is made.
        """

        def network(seed: jax.Array) -> tuple[Any, Any]:
            state = self.trainer.init_state(seed)
            return state.params, state.batch_stats

        sharding = self.trainer.state_sharding()
        drawn = jax.jit(network, out_shardings=(sharding.params, sharding.batch_stats))
        params, batch_stats = drawn(np.uint32(self.config.seed))
        return self.state._replace(params=params, batch_stats=batch_stats)

    def _reestimated(
        self, num_batches: int, state: TrainState | None = None, stoppable: bool = True
    ) -> TrainState:
        """Return a state with clean statistics that are the mean over batches of training crops.

        Args:
            num_batches: number of batches.
            state: None: the run's own.
            stoppable: whether SIGTERM ends it; few batches are quickly made.

        Raises:
            Terminated: SIGTERM arrived; nothing is saved, and the state is as it was.
        """
        state = self.state if state is None else state
        total: Any = None
        with contextlib.closing(self.input.batches(0)) as batches:
            some = itertools.islice(batches, num_batches)
            for batch in self.bar.track(some, num_batches, "statistics"):
                moments = self.steps.moments(state, batch, self.input.resident)
                total = moments if total is None else jax.tree.map(jnp.add, total, moments)
                if stoppable and self.stop.reached():
                    raise Terminated(
                        f"SIGTERM before the first step, nothing to save yet: {self.workdir}"
                    )
        mean = jax.tree.map(lambda value: value / num_batches, total)
        return state._replace(batch_stats=state.batch_stats | {stats_collection(CLEAN): mean})

    def _settle_statistics(self) -> None:
        """Give the state the statistics that it is evaluated by; training passes never read them.

        Raises:
            Terminated: SIGTERM arrived; the state is saved with the statistics that it had.
        """
        if self.config.eval_statistics != "reestimated":
            return
        try:
            self.state = self._reestimated(self.steps_per_epoch)
        except Terminated:
            # A pass over the data takes longer than a scheduler waits: the next start makes it.
            self.metadata["evaluate"] = self.step
            if self.checkpoints.steps()[-1:] != [self.step]:
                self._save(last=True)
            raise self._terminated() from None
        self.metadata["reestimated"] = self.step

    def _settle_last_checkpoint(self) -> None:
        """Put re-estimated statistics into the last checkpoint, unless they are there."""
        if (
            self.config.eval_statistics == "reestimated"
            and self.metadata.get("reestimated") != self.step
        ):
            self._settle_statistics()
            self._save(last=True)

    def _probe_results(self, state: TrainState) -> dict[str, float]:
        assert self.probe is not None
        return self._accuracies(self.probe.features(state))

    def _accuracies(self, features: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """What the results hold; no linear probe without held-out examples."""
        assert self.probe is not None
        results = {"knn_accuracy": self.probe.knn(features)}
        wanted = self.config.linear.at_end or self.config.linear.every_epochs
        linear = self.probe.linear(features) if wanted else None
        return results | ({} if linear is None else {"linear_accuracy": linear})

    def _refresh(self, epoch: int) -> None:
        self.state, scalars = self.steps.refresh(self.state, np.int32(epoch))
        values = {name: float(value) for name, value in scalars.items()}
        if self.assignments is not None:
            # each process has seen those of its own rows
            labels = processes.largest(self.input.labels)
            # none while a method warms up without clusters
            seen = (self.assignments >= 0).all(axis=0)
            if seen.any() and (labels[seen] >= 0).all():  # after a resume, tfds's are gathered anew
                self.metadata["nmi"] = values["nmi"] = _nmi(self.assignments, labels)
        if values:
            self.metrics.write(self.step, {"epoch": epoch} | values)
            log(
                f"epoch {epoch}: "
                + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            )

    def _due(self, epoch: int) -> list[str]:
        """Accuracies to measure after this epoch; after the last one, `_finish` does."""
        if self.probe is None or epoch == self.config.epochs:
            return []
        every = {"knn": self.config.knn.every_epochs, "linear": self.config.linear.every_epochs}
        return [name for name, epochs in every.items() if epochs and epoch % epochs == 0]

    def _evaluate(self, epoch: int, due: list[str]) -> None:
        assert self.probe is not None
        self._settle_statistics()
        features = self.probe.features(self.state)
        accuracies = {f"{name}_accuracy": getattr(self.probe, name)(features) for name in due}
        values = {name: value for name, value in accuracies.items() if value is not None}
        self.metrics.write(self.step, {"epoch": epoch, **values})
        for name, value in values.items():
            log(
                f"epoch {epoch}: {'kNN' if name == 'knn_accuracy' else 'linear probe'} accuracy "
                f"{value:.1f} %"
            )

    def _report(self, step: int, metrics: dict) -> None:
        """Check and log the numbers of a finished step."""
        loss = float(metrics["loss"])
        norms = {name: float(metrics[name]) for name in ("gradient_norm", "parameter_norm")}
        if not all(math.isfinite(value) for value in (loss, *norms.values())):
            with contextlib.suppress(CheckpointError):  # then an older one is the last
                self.checkpoints.wait()  # it may still be on its way to the disk
            saved = self.checkpoints.steps()
            last = (
                f"the last good checkpoint is step {saved[-1]} in {self.checkpoints.directory}"
                if saved
                else "none was saved"
            )
            raise Diverged(
                f"the loss is {loss}, the norm of gradients {norms['gradient_norm']} and of "
                "parameters "
                f"{norms['parameter_norm']} at step {step}; {last}; "
                "try a lower optimizer.learning_rate, a warm-up, precision=float32, or weaker "
                "views (views.*.weight, views.epsilon)"
            )
        if step % self.config.runtime.log_every and step != self.total:
            return
        scored = {f"loss_{name}" for name in self.trainer.objective.scored_passes(step - 1)}
        values = {
            name: float(value)
            for name, value in metrics.items()
            if name in scored or not name.startswith("loss_")
        }
        values["learning_rate"] = float(self.schedule(step - 1))
        values["epoch"] = step / self.steps_per_epoch
        values["unreadable_images"] = len(self.input.bad_images.seen)
        values["images_per_second"], left = self.clock.read(step)
        values["input_wait"] = waited = self.clock.input_wait
        self.metrics.write(step, values)
        self.bar_text = (
            f"epoch {values['epoch']:.2f}/{self.config.epochs}  loss {loss:.4f}  "
            f"{values['images_per_second']:.0f} images/s  ETA {left}"
            + (f"  waited for input {waited:.0%} of the time" if waited > STARVED else "")
        )
        if not self.bar.active:
            log(f"step {step}/{self.total}  {self.bar_text}")
        if values["embedding_std"] < COLLAPSED and step > self.steps_per_epoch:
            logging.warning(
                "step %d: embeddings have collapsed (spread %.4f, 1 is a full sphere): the loss "
                "says nothing any more; "
                "try a lower learning rate, or more clusters or negatives",
                step,
                values["embedding_std"],
            )

    def _save(self, last: bool) -> None:
        save = self.checkpoints.save_now if last else self.checkpoints.save
        save(self.step, self.state, self.metadata)

    def _finish(self) -> dict[str, Any]:
        self.checkpoints.wait()
        results: dict[str, Any] = {"step": self.step, "epochs": self.config.epochs}
        kept = [
            name for name in self.metadata if name.startswith(("random_", INITIAL)) or name == "nmi"
        ]
        results |= {name: self.metadata[name] for name in kept}
        if self.probe:
            accuracies = self._probe_results(self.state)
            self.metrics.write(self.step, {"epoch": self.config.epochs, **accuracies})
            results |= accuracies
            pixels = self.probe.pixels() if self.config.knn.pixels else None
            if pixels is not None:
                results |= {
                    f"pixels_{name}": value for name, value in self._accuracies(pixels).items()
                }
        if self.plain is not None:
            results |= {
                f"plain_{name}": self.plain[name] for name in COMPARED if name in self.plain
            }
        write_json(self.workdir / "result.json", results)
        if self.sample and self.sample.features is None:  # the run had ended before this start
            self.sample.measure(self.state)
        if not self.with_report:
            return results
        path = self.report.write(self.state, self.views, self.assignments)
        log(page.table(results) + f"\nreport: {path}")
        return results

    # ---- What the report shows -------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """The training examples."""
        return self.input.source

    @property
    def assignments(self) -> np.ndarray | None:
        """int32 [heads, examples] clusters, for methods that have them."""
        assignments = getattr(self.state.method, "assignments", None)
        return None if assignments is None else processes.gather(assignments)

    def views(self) -> ViewPreview:
        """The views of the first batch."""
        return processes.gather(
            self.steps.views(self.state, next(self.input.batches(0)), self.input.resident)
        )


def _nmi(assignments: np.ndarray, labels: np.ndarray) -> float:
    """Return normalized mutual information of clusters [H, N] and labels [N], mean over heads."""
    seen = (labels >= 0) & (assignments >= 0).all(axis=0)
    return float(
        np.mean([normalized_mutual_info_score(labels[seen], head[seen]) for head in assignments])
    )
