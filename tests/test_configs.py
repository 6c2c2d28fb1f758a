"""Every config builds, takes its real-size step in the abstract, and holds the numbers of its source."""

import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import SmallRun, largest_difference, small_config

from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.tasks.linear_sgd import probe_schedule
from hexa_jax.training.factory import make_schedule, make_trainer
from hexa_jax.views.preview import PICTURES

NAMES = sorted(path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem not in ("common", "__init__"))
IMAGENET = 1_281_167
# From the papers and the reference code (see the docstrings in configs/): method, batch, epochs, learning rate, weight decay,
# optimizer, temperature, crops, their sides, alpha1, alpha2, key momentum (MoCo) or clusters or prototypes.
TABLE = {
    "moco_v2": ("moco", 256, 200, 0.03, 1e-4, "sgd", 0.2, (2,), (224,), 0, 0, 0.999),
    "moco_v2:epochs=800": ("moco", 256, 800, 0.03, 1e-4, "sgd", 0.2, (2,), (224,), 0, 0, 0.999),
    "pcl_v2": ("pcl", 256, 200, 0.03, 1e-4, "sgd", 0.2, (2,), (224,), 0, 0, 0.999),
    "hexa_moco": ("moco", 256, 200, 0.03, 1e-4, "sgd", 0.2, (2,), (224,), 1, 0, 0.99),
    "hexa_moco:epochs=800": ("moco", 256, 800, 0.03, 1e-4, "sgd", 0.2, (2,), (224,), 1, 0, 0.99),
    "deepcluster_v2": ("deepcluster", 256, 200, 0.6, 1e-6, "larc", 0.1, (2,), (224,), 0, 0, 3000),
    "deepcluster_v2:batch=4096,epochs=400": ("deepcluster", 4096, 400, 4.8, 1e-6, "larc", 0.1, (2,), (224,), 0, 0, 3000),
    "deepcluster_v2:crops=6,epochs=400": ("deepcluster", 4096, 400, 4.8, 1e-6, "larc", 0.1, (2, 4), (160, 96), 0, 0, 3000),
    "deepcluster_v2:crops=8,epochs=800": ("deepcluster", 4096, 800, 4.8, 1e-6, "larc", 0.1, (2, 6), (224, 96), 0, 0, 3000),
    "hexa_dcluster": ("deepcluster", 256, 200, 0.6, 1e-6, "larc", 0.1, (2,), (224,), 1, 0, 3000),
    "hexa_dcluster_8crop": ("deepcluster", 4096, 200, 4.8, 1e-6, "larc", 0.1, (2, 6), (224, 96), 1, 0, 3000),
    "hexa_plus_dcluster_8crop:epochs=800": ("deepcluster", 4096, 800, 4.8, 1e-6, "larc", 0.1, (2, 6), (224, 96), 1, 1, 3000),
    "swav": ("swav", 4096, 200, 4.8, 1e-6, "larc", 0.1, (2, 6), (224, 96), 0, 0, 3000),
    "swav:batch=256": ("swav", 256, 200, 0.6, 1e-6, "larc", 0.1, (2, 6), (224, 96), 0, 0, 3000),
    "hexa_swav": ("swav", 4096, 200, 4.8, 1e-6, "larc", 0.1, (2, 6), (224, 96), 1, 0, 3000),
    "simclr": ("simclr", 4096, 100, 4.8, 1e-6, "lars", 0.1, (2,), (224,), 0, 0, None),
    "hexa_simclr": ("simclr", 4096, 100, 4.8, 1e-6, "lars", 0.1, (2,), (224,), 1, 0, None),
    "rotation": ("rotation", 256, 105, 0.1, 1e-4, "sgd", None, (1,), (224,), 0, 0, None),
}  # fmt: skip


def load(name):
    name, _, text = name.partition(":")
    return importlib.import_module(f"configs.{name}").get_config(text)


def settings_of(config):
    """The method's own group of settings."""
    return config.get(config.method, ConfigDict())


@pytest.mark.parametrize("name", NAMES)
def test_config_takes_a_real_size_step(name):
    config = load(name)
    sizes = {"shapes:train": config.data.shapes_count, "tfds:cifar10:train": 50_000}
    num_examples = sizes.get(config.data.source, 9_469 if "imagenette" in config.data.source else IMAGENET)
    trainer = make_trainer(config, num_examples, jax.devices()[:1], num_classes=1000)
    resident = jax.ShapeDtypeStruct((num_examples, 32, 32, 3), jnp.uint8) if config.data.on_device else None
    with jax.set_mesh(trainer.mesh):
        shapes = trainer.state_shapes()
        state, metrics = jax.eval_shape(
            trainer.train_step, shapes, trainer.batch_shapes(config.data.on_device), resident
        )
    strip = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert strip(state) == strip(shapes)
    assert metrics["loss"].shape == ()
    assert ("loss_adversarial" in metrics) == ("hexa" in name or name in ("quickstart", "tiny"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tiny", "photographs")])
def test_recipes_take_cut_mixed_views_on_eight_devices(name):
    config = load(name)
    config.scheme = "std+cmx"
    layout = make_trainer(config, IMAGENET, jax.devices()[:8], num_classes=1000).objective.layout
    assert layout.rows % layout.cutmix_block == 0


@pytest.mark.parametrize("name", TABLE)
def test_numbers_are_those_of_the_sources(name):
    config = load(name)
    own = settings_of(config)
    row = (
        config.method,
        config.batch_size,
        config.epochs,
        config.optimizer.learning_rate,
        config.optimizer.weight_decay,
        config.optimizer.name,
        own.get("temperature"),
        config.data.num_crops,
        config.data.crop_size,
        config.views.adversarial.weight,
        config.views.cutmix.weight,
        own.get("momentum") or own.get("num_clusters") or own.get("num_prototypes"),
    )
    assert row == TABLE[name]
    assert (config.views.epsilon, config.views.step_size, config.views.steps, config.views.norm) == (1, 1, 1, "linf")
    assert (config.views.cutmix.alpha, config.views.cutmix.beta) == (5, 3)
    assert config.model.backbone == "resnet50" and config.model.head_dim == 128
    assert config.bn_group_size == {"moco": 32, "pcl": 32, "rotation": 32, "simclr": config.batch_size}.get(
        config.method, min(512, config.batch_size)
    )


def test_numbers_beside_the_table():
    small, large = load("swav:batch=256"), load("swav")
    assert (small.swav.queue_length, small.swav.queue_start_epoch, small.swav.freeze_steps) == (3840, 15, 5005)
    assert (large.swav.queue_length, large.swav.freeze_steps, large.swav.epsilon, large.swav.iterations) == (
        0,
        313,
        0.05,
        3,
    )
    for config in (large, load("deepcluster_v2:crops=8")):
        assert (config.optimizer.warmup_epochs, config.optimizer.warmup_start) == (10, 0.3)
        assert config.optimizer.final_learning_rate == 0.0048
        assert (config.data.min_scale, config.data.max_scale) == ((0.14, 0.05), (1.0, 0.14))
        assert (config.augment.brightness, config.augment.hue, config.data.pixel_std[0]) == (0.8, 0.2, 0.228)
    assert load("deepcluster_v2:crops=6").data.min_scale == (0.08, 0.05)
    moco = load("moco_v2")
    assert (moco.augment.brightness, moco.augment.hue, moco.data.min_scale, moco.moco.queue_size) == (
        0.4,
        0.1,
        (0.2,),
        65536,
    )
    assert load("simclr").model.zero_init_residual and not moco.model.zero_init_residual


# Method, batch, epochs, learning rate, weight decay, optimizer, schedule, BatchNorm group, head's layers and sizes.
OTHERS = {
    "byol": ("byol", 4096, 1000, 3.2, 1.5e-6, "lars", "cosine", 4096, (2, 4096, 256)),
    "byol:epochs=300": ("byol", 4096, 300, 4.8, 1e-6, "lars", "cosine", 4096, (2, 4096, 256)),
    "byol:epochs=100": ("byol", 4096, 100, 7.2, 1e-6, "lars", "cosine", 4096, (2, 4096, 256)),
    "simsiam": ("byol", 512, 100, 0.1, 1e-4, "sgd", "epoch_cosine", 512, (3, 2048, 2048)),
    "moco_v1": ("moco", 256, 200, 0.03, 1e-4, "sgd", "steps", 32, (1, 0, 128)),
    "supervised": ("supervised", 256, 90, 0.1, 1e-4, "sgd", "steps", 32, (2, 0, 128)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_numbers_of_other_methods_are_those_of_the_sources(name):
    config = load(name)
    model, optimizer = config.model, config.optimizer
    row = (
        config.method,
        config.batch_size,
        config.epochs,
        pytest.approx(optimizer.learning_rate),
        optimizer.weight_decay,
        optimizer.name,
        optimizer.schedule,
        config.bn_group_size,
        (model.head_layers, model.head_hidden, model.head_dim),
    )
    assert row == OTHERS[name]
    assert config.data.crop_size == (224,) and config.views.adversarial.weight == 0


def test_numbers_beside_the_table_of_other_methods():
    momenta = [load(f"byol:epochs={epochs}").byol.momentum for epochs in (100, 300, 1000)]
    assert momenta == [0.99, 0.99, 0.996]
    others = [
        load(f"byol:epochs={epochs}") for epochs in (5, 200, 2000)
    ]  # the recipe's that differs by the smallest factor
    assert [other.optimizer.learning_rate / 16 for other in others] == pytest.approx([0.45, 0.3, 0.2])
    assert [other.optimizer.warmup_epochs for other in others] == [2, 10, 10]
    assert [load(f"pcl_v2:epochs={epochs}").pcl.warmup_epochs for epochs in (1, 20, 200, 800)] == [1, 2, 20, 20]
    byol, simsiam, moco = load("byol"), load("simsiam"), load("moco_v1")
    assert (byol.byol.predictor_hidden, byol.byol.simsiam, byol.optimizer.warmup_epochs) == (4096, False, 10)
    assert (byol.augment.blur_probability, byol.augment.solarize_probability) == ((1.0, 0.1), (0.0, 0.2))
    assert (byol.augment.brightness, byol.augment.saturation, byol.data.min_scale) == (0.4, 0.2, (0.08,))
    assert (simsiam.byol.predictor_hidden, simsiam.byol.simsiam) == (512, True)
    assert simsiam.model.head_output_norm and simsiam.augment.blur_probability == (0.5,)
    assert (moco.moco.temperature, moco.optimizer.milestones, moco.data.min_scale) == (0.07, (120, 160), (0.2,))
    assert (moco.augment.jitter_probability, moco.augment.hue, moco.augment.blur_probability) == ((1.0,), 0.4, (0.0,))
    assert load("supervised").optimizer.milestones == (30, 60, 80)


@pytest.mark.parametrize(
    "wrong",
    ["byol:epochs=0", "moco_v2:epoch=1", "moco_v2:epochs=many", "swav:crops=3", "swav:batch=512", "swav:crops"],
)
def test_wrong_arguments_name_what_is_known(wrong):
    with pytest.raises(ValueError, match=r"config argument|is not known|has no recipe"):
        load(wrong)


SCHEMES = {
    "std": ["clean"],
    "std+adv": ["clean", "adversarial"],
    "std+cmx": ["clean", "cutmix"],
    "std+adv+cmx": ["clean", "adversarial", "cutmix"],
    "std+adv+cmxA": ["clean", "adversarial", "cutmix_adversarial"],
    "all": ["clean", "adversarial", "cutmix", "cutmix_adversarial"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_choose_the_terms_of_the_objective(scheme):
    config = load("hexa_moco")
    config.views.adversarial.weight = 0.5  # kept where the scheme has the term
    config.scheme = scheme
    weights = make_trainer(config, IMAGENET, jax.devices()[:1]).objective.scheme.weights(0)
    assert list(weights) == SCHEMES[scheme]
    assert weights.get("adversarial", 0.5) == 0.5
    assert weights.get("cutmix", 1) == weights.get("cutmix_adversarial", 1) == 1


@pytest.mark.parametrize("method", ["moco", "simclr", "deepcluster", "swav", "byol", "rotation", "supervised"])
@pytest.mark.parametrize("scheme", ["std", "all"])
def test_every_method_takes_a_step_in_every_family_of_schemes(method, scheme):
    run = SmallRun(small_config(method, scheme=scheme, precision="float32"))
    state = run.train(1)
    assert np.isfinite(run.losses).all() and state.step == 1


def test_an_averaged_objective_is_the_sum_at_a_smaller_learning_rate(x64):
    # Both passes reach every parameter: those of a BatchNorm set that only some reach are divided by less.
    settings = {"scheme": "std+cmx", "views.cutmix.weight": 3.0}
    averaged = SmallRun(small_config("rotation", **settings, **{"views.average": True}))
    config = small_config("rotation", **settings)
    config.optimizer.learning_rate, config.optimizer.weight_decay = (
        config.optimizer.learning_rate / 4,
        config.optimizer.weight_decay * 4,
    )
    summed = SmallRun(config)
    start = jax.device_get(averaged.state.params)
    end = averaged.train(2).params
    assert largest_difference(end, summed.train(2).params) < 1e-9 < 1e-3 < largest_difference(end, start)
    np.testing.assert_allclose(4 * np.array(averaged.losses), summed.losses, rtol=1e-9)


def test_schedules_of_the_two_families():
    moco, deepcluster = make_schedule(load("moco_v2"), 5004), make_schedule(load("deepcluster_v2"), 5004)
    assert float(moco(0)) == float(moco(5003)) == pytest.approx(0.03)
    assert float(moco(5004)) < 0.03  # once per epoch
    assert float(deepcluster(0)) == pytest.approx(0.6)
    assert float(deepcluster(200 * 5004)) == pytest.approx(0.0006, rel=1e-3)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("name", "base", "decay", "percents"),
    [
        ("eval.linear_imagenet:family=moco,", 30.0, 0.1, (60, 80)),
        ("cifar10_rotation:", 0.1, 0.2, (30, 60, 80)),
        ("imagenette_rotation:", 0.1, 0.2, (30, 60, 80)),
        ("cifar10_supervised:", 0.1, 0.2, (30, 60, 80)),
        ("moco_v1:", 0.03, 0.1, (60, 80)),
    ],
)
def test_a_short_run_has_the_same_learning_rates_as_a_long_one(name, base, decay, percents, epochs):
    """Each for its share of the steps: one epoch begins with the recipe's learning rate, too."""
    config, steps = load(f"{name}epochs={epochs}"), 500
    if config.task == "linear":
        (rate,) = config.optimizer.learning_rates
        factor = probe_schedule(config, steps)
        schedule = lambda step: rate * factor(step)  # noqa: E731
    else:
        schedule = make_schedule(config, steps)
    total, bounds = epochs * steps, (0, *percents, 100)
    for passed, (start, end) in enumerate(itertools.pairwise(bounds)):
        for step in (total * start // 100, total * end // 100 - 1):
            assert float(schedule(step)) == pytest.approx(base * decay**passed, rel=1e-5), step
    if epochs == 100:
        assert config.optimizer.milestones == percents and all(type(m) is int for m in config.optimizer.milestones)


@pytest.mark.parametrize(
    ("name", "whole", "milestones"),
    [
        ("eval.finetune_cifar", 20, (7, 14)),
        ("eval.linear_cifar", 20, (7, 14)),
        ("eval.semi_imagenet", 20, (12, 16)),
        ("supervised", 90, (30, 60, 80)),
        ("rotation", 105, (30, 60, 90, 100)),
    ],
)
def test_milestones_follow_the_number_of_epochs(name, whole, milestones):
    for epochs in (whole, 2 * whole, 1):
        config = load(f"{name}:epochs={epochs}")
        found = config.milestones if name == "eval.linear_cifar" else config.optimizer.milestones
        assert found == pytest.approx([epochs * milestone / whole for milestone in milestones])
        assert config.epochs == epochs and all(type(m) is int for m in found if epochs > 1)


@pytest.mark.parametrize(("counts", "sizes"), [((2, 4), (160, 96)), ((2, 6), (224, 96))])
def test_multi_crop_is_a_matter_of_settings(counts, sizes):
    config = load("hexa_dcluster")
    config.data.num_crops, config.data.crop_size = counts, sizes
    config.data.min_scale, config.data.max_scale = (0.14, 0.05), (1.0, 0.14)
    config.views.cutmix.weight = 1.0
    trainer = make_trainer(config, IMAGENET, jax.devices()[:1])
    with jax.set_mesh(trainer.mesh):
        views = jax.eval_shape(trainer.preview_step, trainer.state_shapes(), trainer.batch_shapes(), None)
    expected = [(1, PICTURES, count, size, size, 3) for count, size in zip(counts, sizes, strict=True)]
    for name in ("clean", "adversarial", "cutmix"):
        assert [crops.shape for crops in views.images[name]] == expected
        assert views.outputs[name].shape == (1, config.batch_size, sum(counts), 128)
    assert views.lam["cutmix"].shape == (1, config.batch_size, sum(counts))
    assert [mask.shape for mask in views.mask] == [(*shape[:-1], 1) for shape in expected]


def test_a_warm_up_longer_than_the_run_is_refused():
    config = load("hexa_dcluster_8crop")
    config.epochs = 5
    with pytest.raises(ConfigError, match=r"warmup_epochs=10 is longer than the run, epochs=5"):
        make_schedule(config, 10)


@pytest.mark.parametrize(("group", "block", "warned"), [(16, 32, False), (32, 32, True), (32, 16, True)])
def test_shuffle_bn_that_does_nothing_is_told(group, block, warned, caplog):
    config = small_config("moco", bn_group_size=group, shuffle_block=block)
    make_trainer(config, 70, jax.devices()[:1])
    assert ("shuffle-BN does nothing" in caplog.text) == warned
