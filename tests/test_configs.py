"""Every config builds, takes its real-size step in the abstract, and holds the numbers of its source."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from hexa_jax.build import make_schedule, make_trainer
from hexa_jax.objective import PICTURES

NAMES = sorted(path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem not in ("common", "__init__"))
IMAGENET = 1_281_167
# From the papers and reference code (see the docstrings in configs/): method, batch, epochs, lr, weight decay, optimizer,
# temperature, crops, alpha1, key momentum or clusters.
TABLE = {
    "moco_v2": ("moco", 256, 200, 0.03, 1e-4, "sgd", 0.2, (2,), 0, 0.999),
    "hexa_moco": ("moco", 256, 200, 0.03, 1e-4, "sgd", 0.2, (2,), 1, 0.99),
    "deepcluster_v2": ("deepcluster", 256, 200, 0.6, 1e-6, "larc", 0.1, (2,), 0, 3000),
    "hexa_dcluster": ("deepcluster", 256, 200, 0.6, 1e-6, "larc", 0.1, (2,), 1, 3000),
}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_config_takes_a_real_size_step(name):
    config = load(name)
    num_examples = {"shapes:train": config.data.shapes_count, "tfds:cifar10:train": 50_000}.get(
        config.data.source, IMAGENET
    )
    trainer = make_trainer(config, num_examples, jax.devices()[:1])
    resident = jax.ShapeDtypeStruct((num_examples, 32, 32, 3), jnp.uint8) if config.data.on_device else None
    with jax.set_mesh(trainer.mesh):
        shapes = trainer.state_shapes()
        state, metrics = jax.eval_shape(
            trainer.train_step, shapes, trainer.batch_shapes(config.data.on_device), resident
        )
    strip = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert strip(state) == strip(shapes)
    assert metrics["loss"].shape == ()
    assert ("loss_adversarial" in metrics) == name.startswith(("hexa_", "quickstart", "cifar10_hexa"))


@pytest.mark.parametrize("name", TABLE)
def test_numbers_are_those_of_the_sources(name):
    config = load(name)
    method = config.moco if config.method == "moco" else config.deepcluster
    row = (
        config.method,
        config.batch_size,
        config.epochs,
        config.optimizer.learning_rate,
        config.optimizer.weight_decay,
        config.optimizer.name,
        method.temperature,
        config.data.num_crops,
        config.views.alpha1,
        config.moco.momentum if config.method == "moco" else config.deepcluster.num_clusters,
    )
    assert row == TABLE[name]
    assert (config.views.alpha2, config.views.epsilon, config.views.step_size, config.views.steps) == (0, 1, 1, 1)
    assert (config.views.cutmix_alpha, config.views.cutmix_beta) == (5, 3)
    assert config.model.backbone == "resnet50"
    assert config.data.crop_size == (224,)


def test_schedules_of_the_two_families():
    moco, deepcluster = make_schedule(load("moco_v2"), 5004), make_schedule(load("deepcluster_v2"), 5004)
    assert float(moco(0)) == float(moco(5003)) == pytest.approx(0.03)
    assert float(moco(5004)) < 0.03  # once per epoch
    assert float(deepcluster(0)) == pytest.approx(0.6)
    assert float(deepcluster(200 * 5004)) == pytest.approx(0.0006, rel=1e-3)


@pytest.mark.parametrize(("counts", "sizes"), [((2, 4), (160, 96)), ((2, 6), (224, 96))])
def test_multi_crop_is_a_matter_of_settings(counts, sizes):
    config = load("hexa_dcluster")
    config.data.num_crops, config.data.crop_size = counts, sizes
    config.data.min_scale, config.data.max_scale = (0.14, 0.05), (1.0, 0.14)
    config.views.alpha2 = 1.0
    trainer = make_trainer(config, IMAGENET, jax.devices()[:1])
    with jax.set_mesh(trainer.mesh):
        views = jax.eval_shape(trainer.view_step, trainer.state_shapes(), trainer.batch_shapes(), None)
    for name in ("clean", "adversarial", "cutmix"):
        shapes = [crops.shape for crops in views[name]]
        assert shapes == [(1, PICTURES, count, size, size, 3) for count, size in zip(counts, sizes, strict=True)]
    assert views["lambda"].shape == (1, PICTURES, sum(counts))
