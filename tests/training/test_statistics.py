"""Statistics that evaluations use: running ones, or re-estimated over a pass of clean training crops."""

import itertools

import jax
import numpy as np
import pytest
from small import SmallRun, largest_difference, small_config

from configs import cifar10_moco_v2, imagenette_swav, moco_v2
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


@pytest.mark.parametrize("wanted", ["running", "reestimated"])
def test_what_a_run_leaves(wanted, tmp_path):
    """At its last parameters, re-estimated statistics are the mean over the first pass's crops; running ones are not."""
    config = small_config("moco", precision="float32", eval_statistics=wanted, epochs=1)
    config.data.shapes_size, config.data.eval_source, config.knn.every_epochs = 32, "", 0
    config.knn.resize = config.knn.crop = 8
    workdir = open_workdir(str(tmp_path / "run"), config)
    pretrain(config, workdir)
    run = load_run(workdir)
    with jax.set_mesh(run.trainer.mesh):
        data = TrainingData.open(run.config, run.source, run.trainer)
        batches = ((batch, data.resident) for batch in data.batches(0))
        expected = mean_moments(run.trainer.compile(), run.state, batches, run.trainer.spec.steps_per_epoch)
    difference = largest_difference(jax.device_get(run.state.batch_stats["clean_batch_stats"]), expected)
    assert (difference < 1e-6) == (wanted == "reestimated")
