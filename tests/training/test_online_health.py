"""Health while training: the sample, what of it is independent of devices, the best checkpoint, bad settings."""

import jax
import numpy as np
import pytest
from command_line import finished, lines
from small import SmallRun, small_config

from hexa_jax.checkpoint.checkpointer import CheckpointError, Checkpoints
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.decode import BadImage
from hexa_jax.evals import health
from hexa_jax.evals.backbone import check_checkpoint, load_backbone
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.online_health import make_sample

SIZES = {"precision": "float32", "health.images": 21, "knn.resize": 12, "knn.crop": 12}


@pytest.fixture(scope="module")
def run():
    return SmallRun(small_config("moco", **SIZES))


@pytest.fixture(scope="module")
def sample(run):
    return make_sample(small_config("moco", **SIZES), run.source, run.trainer)


def test_measures_are_those_of_the_networks_outputs(run, sample):
    with jax.set_mesh(run.trainer.mesh):
        values = sample.measure(run.state)
        outputs = sample.forward(
            run.state.params["network"],
            run.state.batch_stats,
            sample.images,
            np.arange(21, dtype=np.int32),
        )
    assert values.keys() == health.HIGHER_IS_BETTER.keys() - {"cluster_stability"}
    features, views = np.asarray(outputs["features"]), np.asarray(outputs["view_outputs"])
    assert features.shape == (21, 32) and views.shape == (21, 2, 8)
    assert values["rankme"] == pytest.approx(health.rankme(features), rel=1e-5)
    assert values["alignment"] == pytest.approx(health.alignment(views[:, 0], views[:, 1]), rel=1e-5)
    assert not np.allclose(views[:, 0], views[:, 1])  # other crops
    assert sample.rank_limit == 21
    with jax.set_mesh(run.trainer.mesh):
        again = sample.measure(run.state)
    assert again["cluster_stability"] == 1 and again["rankme"] == values["rankme"]


def test_two_devices_measure_the_same(run, sample):
    config = small_config("moco", **SIZES)
    trainer = make_trainer(config, len(run.source), jax.devices()[:2], run.source.num_classes)
    with jax.set_mesh(run.trainer.mesh):
        expected = sample.measure(run.state)
    state = jax.device_get(run.state)
    other = make_sample(config, run.source, trainer)  # 21 images on 2 devices: one row is padding
    with jax.set_mesh(trainer.mesh):
        found = other.measure(state)
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


class Holes:
    """A source some of whose images are damaged."""

    def __init__(self, source, bad):
        self.source, self.bad = source, bad
        self.num_classes, self.class_names = None, None

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImage(self.name(index), "damaged")
        return self.source[index]

    def name(self, index):
        return str(index)


def test_unreadable_images_are_left_out(run):
    config = small_config("moco", **SIZES)
    sample = make_sample(config, Holes(run.source, {0, 40}), run.trainer)
    assert len(sample.images) == 19 and not {0, 40} & set(sample.indices.tolist())
    assert make_sample(config, Holes(run.source, set(range(70))), run.trainer) is None
    config.health.every_epochs = 0
    assert make_sample(config, run.source, run.trainer) is None


def test_a_run_logs_health_and_keeps_its_best_checkpoint():
    workdir, output = finished("deepcluster")
    measured = {line["step"]: line for line in lines(workdir) if "neighbor_agreement" in line}
    assert list(measured) == [0, 4, 8, 12, 16, 20, 24]
    assert all(("cluster_stability" in line) == (step > 0) for step, line in measured.items())
    assert "epoch 6: effective rank" in output
    values = {step: line["neighbor_agreement"] for step, line in measured.items() if step}
    best = max(values, key=lambda step: (values[step], -step))
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert best in checkpoints.steps()
    assert checkpoints.metadata(24)["best"]["step"] == best
    backbone = load_backbone(f"{workdir}@best")
    assert backbone.step == best and load_backbone(str(workdir)).step == 24
    check_checkpoint(f"{workdir}@best")


def test_a_run_without_a_best_checkpoint_says_how_to_keep_one():
    workdir, _ = finished("moco")
    with pytest.raises(CheckpointError, match=r"runtime\.keep_best=rankme"):
        check_checkpoint(f"{workdir}@best")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"runtime.keep_best": "rank"}, "keep_best='rank' is not known: use one of"),
        ({"runtime.keep_best": "rankme", "health.every_epochs": 0}, r"needs health\.every_epochs"),
        ({"health.images": 2}, r"health\.images=2"),
        ({"health.every_epochs": -1}, r"health\.every_epochs=-1"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings, words):
    with pytest.raises(ConfigError, match=words):
        make_trainer(small_config("moco", **settings), 70, jax.devices()[:1])
