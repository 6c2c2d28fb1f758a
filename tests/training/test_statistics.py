"""Statistics that evaluations use: running ones, or re-estimated over a pass of clean training crops."""

import functools
import itertools

import jax
import numpy as np
import pytest
from command_line import final_state, lines
from small import SmallRun, largest_difference, small_config

from configs import cifar10_moco_v2, imagenette_swav, moco_v2
from hexa_jax.checkpoint.checkpointer import Checkpoints
from hexa_jax.core.preemption import PreemptionGuard, Terminated
from hexa_jax.storage.workdir import open_workdir
from hexa_jax.training.input import TrainingData
from hexa_jax.training.load_run import load_run
from hexa_jax.training.loop import pretrain


def mean_moments(steps, state, batches, count):
    """Mean of the clean moments of some batches, on the host."""
    moments = [jax.device_get(steps.moments(state, *batch)) for batch in itertools.islice(batches, count)]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *moments)


def test_small_image_recipes_reestimate():
    assert cifar10_moco_v2.get_config().eval_statistics == "reestimated"
    assert imagenette_swav.get_config().eval_statistics == "reestimated"
    assert moco_v2.get_config().eval_statistics == "running"


def test_moments_look_like_running_statistics_and_differ_from_them():
    run = SmallRun(small_config("moco", precision="float32"))
    running = run.train(3).batch_stats["clean_batch_stats"]
    with jax.set_mesh(run.trainer.mesh):
        mean = mean_moments(run.steps, run.state, ((batch, None) for batch in run.batches()), run.steps_per_epoch)
    assert jax.tree.structure(mean) == jax.tree.structure(running)
    assert largest_difference(mean, running) > 1e-3  # three steps at momentum 0.1 are far from the mean


def run_config(wanted):
    """Two epochs of two steps; cut-mixed views count in the second."""
    config = small_config("rotation", precision="float32", eval_statistics=wanted, epochs=2, scheme="std+cmx")
    config.data.num_crops, config.runtime.num_devices = (1,), 1
    config.data.shapes_size, config.data.eval_source, config.knn.every_epochs = 32, "", 1
    config.knn.resize = config.knn.crop = 8
    config.views.cutmix.start_epoch, config.runtime.log_every = 1.0, 1
    return config


def stop_at(monkeypatch, call, killed):
    """Let the run be asked to stop at the n-th time that it looks and from then on, or be killed there."""

    class Stop(PreemptionGuard):
        calls = 0

        def reached(self):
            self.calls += 1
            if killed and self.calls >= call:
                raise KeyboardInterrupt
            return self.calls >= call

    monkeypatch.setattr("hexa_jax.training.run.PreemptionGuard", Stop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run that was not stopped, by its statistics."""

    @functools.cache
    def run(wanted):
        config = run_config(wanted)
        workdir = open_workdir(str(tmp_path_factory.mktemp(wanted) / "run"), config)
        pretrain(config, workdir)
        return workdir

    return run


@pytest.mark.parametrize("wanted", ["running", "reestimated"])
def test_what_a_run_leaves(wanted, finished):
    """At its last parameters, re-estimated statistics are the mean over the first pass's crops; running ones are not."""
    run = load_run(finished(wanted))
    with jax.set_mesh(run.trainer.mesh):
        data = TrainingData.open(run.config, run.source, run.trainer)
        batches = ((batch, data.resident) for batch in data.batches(0))
        expected = mean_moments(run.trainer.compile(), run.state, batches, run.trainer.spec.steps_per_epoch)
    difference = largest_difference(jax.device_get(run.state.batch_stats["clean_batch_stats"]), expected)
    assert (difference < 1e-6) == (wanted == "reestimated")


def test_a_stop_while_statistics_are_estimated_loses_nothing(finished, tmp_path, monkeypatch):
    """A run looks after 2 batches of a random network, a step, 2 batches, a step; one that goes on after 2 batches, 2 steps."""
    config = run_config("reestimated")
    workdir = open_workdir(str(tmp_path / "run"), config)
    # Each time in the first batch of an estimate.
    for call, killed, step in ((4, False, 2), (1, False, 2), (5, True, 4), (1, False, 4)):
        stop_at(monkeypatch, call, killed)
        with pytest.raises(KeyboardInterrupt if killed else Terminated) as stopped:
            pretrain(config, workdir)
        assert killed or str(stopped.value).startswith(f"SIGTERM: saved step {step} in ")
        assert Checkpoints(workdir / "checkpoints").steps()[-1] == step
    assert not (workdir / "result.json").exists()
    monkeypatch.undo()
    pretrain(config, workdir)
    expected = finished("reestimated")
    assert (workdir / "result.json").read_text() == (expected / "result.json").read_text()
    ours, whole = (final_state(folder) for folder in (workdir, expected))
    assert largest_difference(*ours[1:], *whole[1:]) == 0
    measured = [[line for line in lines(folder) if "knn_accuracy" in line] for folder in (workdir, expected)]
    assert measured[0] == measured[1] and [line["step"] for line in measured[0]] == [0, 2, 4]


def test_the_log_has_a_views_loss_from_its_start_on(finished):
    steps = [line for line in lines(finished("running")) if "loss" in line]
    assert ["loss_cutmix" in line for line in steps] == [False, False, True, True]
    assert all("loss_clean" in line for line in steps)
