"""The pre-training loop: refresh, next batch, step, report, evaluate, save."""

import dataclasses
import itertools
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict
from sklearn.metrics import normalized_mutual_info_score

from hexa_jax import report
from hexa_jax.build import make_schedule, make_trainer, open_training_source
from hexa_jax.checkpoint import Checkpoints
from hexa_jax.data.pipeline import BadImages, HostSteps, device_batches, host_iterator, resident_images
from hexa_jax.data.sources import Source
from hexa_jax.data.subset import labels_are_free
from hexa_jax.evals.online import Probe, make_probe
from hexa_jax.mesh import local_rows
from hexa_jax.methods.base import Batch
from hexa_jax.train_step import Steps, Trainer, TrainState
from hexa_jax.workdir import Metrics, write_json

COLLAPSED = 0.02  # embedding_std below this: all embeddings are nearly the same
CALIBRATION_STEPS = 50  # forward passes that give a random network its BatchNorm statistics


class Diverged(RuntimeError):
    """The loss is not finite; the message says at which step, where the last good checkpoint is, and what to try."""


class Terminated(Exception):
    """SIGTERM arrived and the state is on disk."""


@dataclasses.dataclass
class Input:
    """The data of a run: its source, the batches of any step, and the resident images if there are any."""

    config: ConfigDict
    source: Source
    trainer: Trainer
    bad_images: BadImages
    resident: jax.Array | None
    labels: np.ndarray  # int32 [num_examples], -1 where none is known yet

    @classmethod
    def open(cls, config: ConfigDict, source: Source, trainer: Trainer) -> "Input":
        """Read what must be in memory: labels, and all images when they live on the device."""
        bad_images, resident = BadImages(source, config.data.max_bad_fraction), None
        if config.data.on_device:
            resident = jax.device_put(resident_images(source, bad_images, cls._max_failures(config, source)))
        known = source.labels() if resident is not None or labels_are_free(source) else None  # else as they pass by
        labels = np.full(len(source), -1, np.int32) if known is None else np.array(known)
        return cls(config, source, trainer, bad_images, resident, labels)

    @staticmethod
    def _max_failures(config: ConfigDict, source: Source) -> int:
        return int(config.data.max_bad_fraction * len(source))

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, where the first pass is steps 0 to steps_per_epoch - 1 and training follows."""
        objective, spec, runtime = self.trainer.objective, self.trainer.spec, self.config.runtime
        on_device = self.resident is not None
        steps = HostSteps(
            source=None if on_device else self.source,
            num_examples=spec.num_examples,
            labels=self.labels if on_device else None,
            resolutions=tuple(objective.crops.resolutions),
            key_crops=objective.method.key_crops,
            layout=objective.layout,
            rows=local_rows(self.trainer.mesh, objective.layout),
            seed=self.config.seed,
            num_steps=(1 + self.config.epochs) * spec.steps_per_epoch,
            max_failures=self._max_failures(self.config, self.source),
            bad=frozenset(self.bad_images.seen) if on_device else frozenset(),
        )
        elements = host_iterator(steps, start, runtime.workers, runtime.threads, runtime.prefetch)
        return device_batches(elements, self.trainer.mesh, objective.layout, self.bad_images, self.labels)


def pretrain(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Run or resume; returns the flat results that `result.json` holds.

    Raises:
        Terminated: SIGTERM arrived; the state is saved.
        Diverged: the loss became NaN or infinite; no checkpoint was overwritten.
    """
    source = open_training_source(config)
    trainer = make_trainer(config, len(source))
    with jax.set_mesh(trainer.mesh):
        return _Run(config, workdir, source, trainer).run()


class _Run:
    """One start of the loop; what it holds besides the state can be rebuilt from the config."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, source: Source, trainer: Trainer):
        self.config, self.workdir, self.trainer = config, workdir, trainer
        self.steps: Steps = trainer.compile()
        self.steps_per_epoch = trainer.spec.steps_per_epoch
        self.total = config.epochs * self.steps_per_epoch
        runtime = config.runtime
        keep_every = runtime.keep_every * self.steps_per_epoch or None
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep_last=runtime.keep_last, keep_every=keep_every)
        self.state, self.step, self.metadata = self._restore()
        self.input = Input.open(config, source, trainer)
        self.probe: Probe | None = make_probe(config, source, trainer)
        self.metrics = Metrics(workdir, runtime.writer, self.step)
        self.clock = _Clock(config.batch_size, self.total)
        self.stopping = False
        self.schedule: Callable = make_schedule(config, self.steps_per_epoch)

    def _restore(self) -> tuple[TrainState, int, dict]:
        restored = self.checkpoints.restore_latest(self.trainer.state_shapes())
        if restored is None:
            return self.steps.init(), 0, {"first_pass": False}
        step, state, metadata = restored
        _say(f"resuming at step {step} from {self.checkpoints.directory}")
        return state, step, metadata

    def run(self) -> dict[str, Any]:
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        millions = parameter_overview.count_parameters(self.state.params) / 1e6
        _say(f"{len(self.input.source)} images, {millions:.1f} million parameters, {self.trainer.mesh.size} devices")
        try:
            if not self.metadata["first_pass"]:
                self._first_pass()
            self._loop()
            return self._finish()
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.metrics.close()
            self.checkpoints.close()

    def _on_sigterm(self, *_: Any) -> None:
        self.stopping = True

    # ---- The loop -----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        batches = self.input.batches(self.steps_per_epoch + self.step)
        pending: tuple[int, dict] | None = None
        every = self.config.runtime.checkpoint_every or self.steps_per_epoch
        self.clock.start(self.step)
        while self.step < self.total:
            if self.step % self.steps_per_epoch == 0:
                self._refresh(self.step // self.steps_per_epoch)
            self.state, metrics = self.steps.train(self.state, next(batches), self.input.resident)
            if pending:
                self._report(*pending)  # of the step before: reading this one's numbers would wait for it
            self.step += 1
            pending = (self.step, metrics)
            if self.step % self.steps_per_epoch == 0 and self._due(self.step // self.steps_per_epoch):
                with self.clock.paused():
                    self._evaluate(self.step // self.steps_per_epoch)
            if self.step % every == 0 or self.step == self.total or self.stopping:
                self._report(*pending)  # also the check that what is saved is finite
                pending = None
                self._save()
            if self.stopping and self.step < self.total:
                self.checkpoints.wait()
                raise Terminated(f"SIGTERM: saved step {self.step} in {self.workdir}; the same command resumes it")

    def _first_pass(self) -> None:
        """Fill the bank, save, and measure the untrained network."""
        needed = self.trainer.objective.method.needs_first_pass
        if needed:
            _say(f"first pass: {self.steps_per_epoch} forward steps fill the bank")
            for batch in itertools.islice(self.input.batches(0), self.steps_per_epoch):
                self.state = self.steps.observe(self.state, batch, self.input.resident)
                if self.stopping:
                    raise Terminated(f"SIGTERM during the first pass, nothing to save yet: {self.workdir}")
        if self.config.knn.every_epochs and self.probe:
            self._measure_random(calibrated=needed)
        self.metadata["first_pass"] = True
        if needed:
            self._save()

    def _measure_random(self, calibrated: bool) -> None:
        state = self.state
        if not calibrated:  # running statistics of a fresh network are made up; give it real ones, then forget them
            state = jax.tree.map(jnp.copy, state)
            for batch in itertools.islice(self.input.batches(0), min(CALIBRATION_STEPS, self.steps_per_epoch)):
                state = self.steps.observe(state, batch, self.input.resident)
        results = self._probe_results(state)
        self.metadata |= {f"random_{name}": value for name, value in results.items()}
        self.metrics.write(0, {"knn_accuracy": results["knn_accuracy"]})
        _say(f"random initialisation: kNN {results['knn_accuracy']:.1f} %")

    def _probe_results(self, state: TrainState) -> dict[str, float]:
        assert self.probe is not None
        features = self.probe.features(state)
        results = {"knn_accuracy": self.probe.knn(features)}
        linear = self.probe.linear(features) if self.config.linear.at_end else None
        return results | ({} if linear is None else {"linear_accuracy": linear})

    def _refresh(self, epoch: int) -> None:
        self.state, scalars = self.steps.refresh(self.state, jnp.int32(epoch))
        values = {name: float(value) for name, value in scalars.items()}
        if self.assignments is not None and (self.input.labels >= 0).any():
            values["nmi"] = _nmi(self.assignments, self.input.labels)
        if values:
            self.metrics.write(self.step, {"epoch": epoch} | values)
            _say(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _due(self, epoch: int) -> bool:
        every = self.config.knn.every_epochs
        return bool(self.probe and every and (epoch % every == 0))

    def _evaluate(self, epoch: int) -> None:
        assert self.probe is not None
        knn = self.probe.knn(self.probe.features(self.state))
        self.metrics.write(self.step, {"epoch": epoch, "knn_accuracy": knn})
        _say(f"epoch {epoch}: kNN accuracy {knn:.1f} %")

    def _report(self, step: int, metrics: dict) -> None:
        """Check and log the numbers of a finished step."""
        loss = float(metrics["loss"])
        if not math.isfinite(loss) or not math.isfinite(
            float(metrics["gradient_norm"])
        ):  # else the parameters are lost
            self.checkpoints.wait()  # the last good one may still be on its way to the disk
            saved = self.checkpoints.steps()
            last = (
                f"the last good checkpoint is step {saved[-1]} in {self.checkpoints.directory}"
                if saved
                else "none was saved"
            )
            raise Diverged(
                f"the loss is {loss} and the gradient norm {float(metrics['gradient_norm'])} at step {step}; {last}; "
                "try a lower optimizer.learning_rate, a warm-up, precision=float32, or weaker views (alpha1, epsilon)"
            )
        if step % self.config.runtime.log_every and step != self.total:
            return
        values = {name: float(value) for name, value in metrics.items()}
        values["learning_rate"] = float(self.schedule(step - 1))
        values["epoch"] = step / self.steps_per_epoch
        values["unreadable_images"] = len(self.input.bad_images.seen)
        values["images_per_second"], left = self.clock.read(step)
        self.metrics.write(step, values)
        _say(
            f"step {step}/{self.total}  epoch {values['epoch']:.2f}/{self.config.epochs}  loss {loss:.4f}  "
            f"{values['images_per_second']:.0f} images/s  ETA {left}"
        )
        if values["embedding_std"] < COLLAPSED and step > self.steps_per_epoch:
            logging.warning(
                "step %d: embeddings have collapsed (spread %.4f, 1 is a full sphere): the loss says nothing any more; "
                "try a lower learning rate, or more clusters or negatives",
                step,
                values["embedding_std"],
            )

    def _save(self) -> None:
        self.checkpoints.save(self.step, self.state, self.metadata)

    def _finish(self) -> dict[str, Any]:
        self.checkpoints.wait()
        results: dict[str, Any] = {"step": self.step, "epochs": self.config.epochs}
        results |= {name: value for name, value in self.metadata.items() if name.startswith("random_")}
        if self.probe:
            results |= self._probe_results(self.state)
            pixels = self.probe.pixels()
            results["pixels_knn_accuracy"] = self.probe.knn(pixels)
            linear = self.probe.linear(pixels) if self.config.linear.at_end else None
            results |= {} if linear is None else {"pixels_linear_accuracy": linear}
        path = report.write_report(self.workdir, self.config, self, results)
        write_json(self.workdir / "result.json", results)
        _say(report.table(results) + f"\nreport: {path}")
        return results

    # ---- What the report shows ----------------------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """The training examples."""
        return self.input.source

    @property
    def assignments(self) -> np.ndarray | None:
        """int32 [heads, examples] clusters, for methods that have them."""
        assignments = getattr(self.state.method, "assignments", None)
        return None if assignments is None else np.asarray(assignments)

    def views(self) -> dict[str, Any]:
        """The views of the first batch."""
        return self.steps.views(self.state, next(self.input.batches(0)), self.input.resident)


class _Clock:
    """Images per second since the last reading and time left, evaluations not counted."""

    def __init__(self, batch_size: int, total: int):
        self.batch_size, self.total = batch_size, total
        self.start(0)

    def start(self, step: int) -> None:
        self.last_step, self.last_time, self.rate = step, time.monotonic(), 0.0

    def paused(self) -> "_Clock":
        return self

    def __enter__(self) -> None:
        self._paused_at = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.last_time += time.monotonic() - self._paused_at

    def read(self, step: int) -> tuple[float, str]:
        """(images per second since the last call, time left as h:mm:ss)."""
        now = time.monotonic()
        done, elapsed = step - self.last_step, max(now - self.last_time, 1e-9)
        if done:
            self.rate, self.last_step, self.last_time = done * self.batch_size / elapsed, step, now
        left = int((self.total - step) * self.batch_size / self.rate) if self.rate else 0
        return self.rate, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def _nmi(assignments: np.ndarray, labels: np.ndarray) -> float:
    """Normalised mutual information between clusters [H, N] and labels [N], mean over heads; unseen examples left out."""
    seen = (labels >= 0) & (assignments >= 0).all(axis=0)
    return float(np.mean([normalized_mutual_info_score(labels[seen], head[seen]) for head in assignments]))


def _say(text: str) -> None:
    """A line for the person at the terminal."""
    if jax.process_index() == 0:
        print(text, flush=True)
