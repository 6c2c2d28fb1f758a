"""What a run measures of its network: accuracies with labels, and health without."""

from typing import Any

import jax
import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from hexa_jax.core.console import log
from hexa_jax.core.preemption import Terminated
from hexa_jax.evals.health import HIGHER_IS_BETTER
from hexa_jax.parallel import processes
from hexa_jax.training.clean_statistics import REESTIMATED, reestimate, settle
from hexa_jax.training.run import Run
from hexa_jax.training.step import TrainState

INITIAL = "initial_"  # what the accuracies of the weights that a run started from are called by
RANDOM = "random_"  # and those of a random network
CALIBRATION_STEPS = 50  # forward passes that give a random network its BatchNorm statistics


class Accuracies:
    """Accuracies of kNN and of a linear probe; all are logged, some kept for the results."""

    def __init__(self, run: Run):
        self._run, self._probe = run, run.probe

    def measure_initial(self) -> None:
        """Measure the weights that the run starts from, if any were read."""
        run = self._run
        if not (run.initial and self._measured_at_start):
            return
        values = self._of(run.state)  # by the statistics that came with the weights
        run.metadata |= {f"{INITIAL}{name}": value for name, value in values.items()}
        run.metrics.write(0, values)
        log(f"initial weights: kNN {values['knn_accuracy']:.1f} %")

    def measure_random(self, calibrated: bool) -> None:
        """Measure a random network, the run's own if it starts from one.

        Args:
            calibrated: whether a first pass has given the run's own running statistics.

        Raises:
            Terminated: SIGTERM arrived; nothing is saved.
        """
        run = self._run
        if not self._measured_at_start:
            return
        state: TrainState | None = run.state
        if run.initial or not calibrated:  # running statistics of a fresh network are made up
            network = self._with_random_network() if run.initial else run.state
            state = reestimate(run, network, CALIBRATION_STEPS, run.stop)
        if state is None:
            raise Terminated(f"SIGTERM before the first step, nothing to save yet: {run.workdir}")
        values = self._of(state)
        run.metadata |= {f"{RANDOM}{name}": value for name, value in values.items()}
        if not run.initial:
            run.metrics.write(0, values)
        log(f"random initialisation: kNN {values['knn_accuracy']:.1f} %")

    def due(self, epoch: int) -> list[str]:
        """Names of the accuracies to measure after an epoch; after the last, `results` does."""
        config = self._run.config
        if self._probe is None or epoch == config.epochs:
            return []
        every = {"knn": config.knn.every_epochs, "linear": config.linear.every_epochs}
        return [name for name, epochs in every.items() if epochs and epoch % epochs == 0]

    def measure(self, epoch: int) -> None:
        """Settle the statistics and measure what is due after an epoch, if anything is.

        Raises:
            Terminated: SIGTERM arrived; the state is saved, and the next start measures.
        """
        run, due = self._run, self.due(epoch)
        if not due:
            return
        assert self._probe is not None
        settle(run)
        features = self._probe.features(run.state)
        accuracies = {f"{name}_accuracy": getattr(self._probe, name)(features) for name in due}
        values = {name: value for name, value in accuracies.items() if value is not None}
        run.metrics.write(run.step, {"epoch": epoch, **values})
        for name, value in values.items():
            probe = "kNN" if name == "knn_accuracy" else "linear probe"
            log(f"epoch {epoch}: {probe} accuracy {value:.1f} %")

    def results(self) -> dict[str, float]:
        """Measure the network at the end; return that with what was kept on the way."""
        run = self._run
        results = {
            name: value
            for name, value in run.metadata.items()
            if name.startswith((RANDOM, INITIAL)) or name == "nmi"
        }
        if self._probe is None:
            return results
        values = self._of(run.state)
        run.metrics.write(run.step, {"epoch": run.config.epochs, **values})
        results |= values
        if run.config.knn.pixels and (pixels := self._probe.pixels()) is not None:
            values = self._of_features(pixels)
            results |= {f"pixels_{name}": value for name, value in values.items()}
        return results

    @property
    def _measured_at_start(self) -> bool:
        return bool(self._run.config.knn.every_epochs and self._probe)

    def _with_random_network(self) -> TrainState:
        """The state with the network that the run's seed would have drawn.

        No second bank or queue is made.
        """
        trainer = self._run.trainer

        def network(seed: jax.Array) -> tuple[Any, Any]:
            state = trainer.init_state(seed)
            return state.params, state.batch_stats

        sharding = trainer.state_sharding()
        drawn = jax.jit(network, out_shardings=(sharding.params, sharding.batch_stats))
        params, batch_stats = drawn(np.uint32(self._run.config.seed))
        return self._run.state._replace(params=params, batch_stats=batch_stats)

    def _of(self, state: TrainState) -> dict[str, float]:
        assert self._probe is not None
        return self._of_features(self._probe.features(state))

    def _of_features(self, features: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """What the results hold; no linear probe without held-out examples."""
        assert self._probe is not None
        values, wanted = {"knn_accuracy": self._probe.knn(features)}, self._run.config.linear
        if wanted.at_end or wanted.every_epochs:
            linear = self._probe.linear(features)
            values |= {} if linear is None else {"linear_accuracy": linear}
        return values


class Health:
    """Measures without labels on the run's sample, and which epoch was the best by them."""

    def __init__(self, run: Run):
        self._run, self._sample = run, run.sample

    def due(self, epoch: int) -> bool:
        """Whether to measure after an epoch; False without a sample."""
        config = self._run.config
        return self._sample is not None and (
            epoch % config.health.every_epochs == 0 or epoch == config.epochs
        )

    def measure_start(self, calibrated: bool) -> None:
        """Measure what the run starts from.

        Args:
            calibrated: whether its running statistics are those of images, not made up.
        """
        if self._sample is not None:
            self._measure(0, self._run.state if calibrated else self._with_few_statistics())

    def measure(self, epoch: int) -> bool:
        """Measure after an epoch; return whether it is the best so far by `runtime.keep_best`."""
        run = self._run
        few = run.config.eval_statistics == REESTIMATED
        values = self._measure(epoch, self._with_few_statistics() if few else run.state)
        name, best = run.config.runtime.keep_best, run.metadata.get("best")
        if name not in values:  # no wish, or no epoch before this one to compare clusters with
            return False
        sign = 1 if HIGHER_IS_BETTER[name] else -1
        ahead = best is None or best["name"] != name or sign * values[name] > sign * best["value"]
        if not processes.broadcast_from_main(ahead):
            return False
        best = {"name": name, "value": values[name], "step": run.step, "epoch": epoch}
        run.metadata["best"], run.checkpoints.best = best, run.step
        return True

    def _measure(self, epoch: int, state: TrainState) -> dict[str, float]:
        run, sample = self._run, self._sample
        assert sample is not None
        values = sample.measure(state)
        assert sample.clusters is not None
        run.metadata["clusters"] = sample.clusters.tolist()
        run.metrics.write(run.step, {"epoch": epoch, **values})
        log(
            f"epoch {epoch}: effective rank {values['rankme']:.1f} of {sample.rank_limit}, "
            f"neighbors agree {values['neighbor_agreement']:.0%}"
            + (f", clusters stable {s:.0%}" if (s := values.get("cluster_stability")) else "")
        )
        return values

    def _with_few_statistics(self) -> TrainState:
        """The state with statistics over about as many images as the sample has."""
        run = self._run
        batches = -(-run.config.health.images // run.config.batch_size)
        state = reestimate(run, run.state, batches)
        assert state is not None  # nothing stops it
        return state


def log_refresh(run: Run, epoch: int, scalars: dict[str, jax.Array]) -> None:
    """Log what a method tells of its clusters before an epoch, and how they agree with labels."""
    values = {name: float(value) for name, value in scalars.items()}
    if (assignments := run.assignments) is not None:
        # each process has seen those of its own rows
        labels = processes.largest(run.data.labels)
        # none while a method warms up without clusters
        seen = (assignments >= 0).all(axis=0)
        if seen.any() and (labels[seen] >= 0).all():  # after a resume, tfds's are gathered anew
            run.metadata["nmi"] = values["nmi"] = _nmi(assignments, labels)
    if values:
        run.metrics.write(run.step, {"epoch": epoch} | values)
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log(f"epoch {epoch}: {told}")


def _nmi(assignments: np.ndarray, labels: np.ndarray) -> float:
    """Return normalized mutual information of clusters [H, N] and labels [N], mean over heads."""
    seen = (labels >= 0) & (assignments >= 0).all(axis=0)
    return float(
        np.mean([normalized_mutual_info_score(labels[seen], head[seen]) for head in assignments])
    )
