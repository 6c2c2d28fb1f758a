"""What `hexa pretrain` chooses, from facts about images and devices: a table of cases."""

import math

import pytest

from hexa_jax.cli.choices import DataFacts, DeviceFacts, Wishes, choose, choose_recipe, estimate
from hexa_jax.cli.command import parse_command
from hexa_jax.core.recipes import recipe_file
from hexa_jax.parallel.mesh import Layout
from hexa_jax.storage.workdir import flatten

GB = 10**9
LAPTOP = DeviceFacts("cpu", "cpu", 1, 16 * GB, 2, 1.2e11)
SERVER = DeviceFacts("cpu", "cpu", 1, 64 * GB, 32, 1.5e12)
H100 = DeviceFacts("gpu", "NVIDIA H100 80GB HBM3", 1, 80 * GB, 16, 7e14)
EIGHT = DeviceFacts("gpu", "NVIDIA H100 80GB HBM3", 8, 80 * GB, 96, 7e14)
THREE = DeviceFacts("gpu", "of 24 GB", 3, 24 * GB, 32, 1e14)
SMALL_GPU = DeviceFacts("gpu", "of 6 GB", 1, 6 * GB, 8, 2e13)
TPU = DeviceFacts("tpu", "TPU v5 lite", 4, 16 * GB, 100, 1.9e14)
DEVICES = (LAPTOP, SERVER, H100, EIGHT, THREE, SMALL_GPU, TPU)
PHOTOS = DataFacts(1513, 480, 0.01)
IMAGENET = DataFacts(1_281_167, 375, 0.008)
CIFAR = DataFacts(50_000, 32, 0.0001)


def settings_of(recipe):
    """A recipe's flat settings, tuples as tuples."""
    words = ["hexa", f"--config={recipe_file(recipe)}", "--workdir=unused"]
    flat = flatten(parse_command(words).config.to_dict())
    return {key: tuple(value) if isinstance(value, list) else value for key, value in flat.items()}


def chosen(data, device, wishes=None):
    """The recipe, the settings that were chosen, all settings, and the estimate."""
    wishes = wishes or Wishes()
    recipe, why = choose_recipe(data, device, wishes)
    before = settings_of(recipe)
    choices, time = choose(data, device, wishes, before)
    assert why and all(choice.reason for choice in choices)
    named = {choice.key: choice.value for choice in choices}
    assert len(named) == len(choices) and named.keys() <= before.keys()
    return recipe, named, before | wishes.settings | named, time


@pytest.mark.parametrize(
    ("data", "device", "recipe", "expected"),
    [
        # A folder of photographs: minutes on two cores, the paper's network on an H100.
        (PHOTOS, LAPTOP, "photographs", {"model.backbone": "resnet18", "data.crop_size": (96,), "batch_size": 64}),
        (PHOTOS, SERVER, "photographs", {"data.crop_size": (96,), "epochs": 100, "runtime.threads": 32}),
        (PHOTOS, H100, "deepcluster_v2", {"model.backbone": "resnet50", "data.crop_size": (224,), "epochs": 800}),
        (PHOTOS, THREE, "deepcluster_v2", {"batch_size": 63, "bn_group_size": 63}),
        (PHOTOS, SMALL_GPU, "imagenette_deepcluster_v2", {"data.crop_size": (128,), "precision": "bfloat16"}),
        # The paper's data: its recipe as it is.
        (IMAGENET, H100, "deepcluster_v2", {"batch_size": 256, "bn_group_size": 256, "epochs": 200}),
        (IMAGENET, EIGHT, "deepcluster_v2", {"deepcluster.num_clusters": 3000, "optimizer.learning_rate": 0.6}),
        (IMAGENET, LAPTOP, "photographs", {"model.base_channels": 16, "data.crop_size": (64,), "epochs": 5}),
        # Small images.
        (CIFAR, TPU, "cifar10_deepcluster_v2", {"data.crop_size": (32,), "model.stem": "cifar"}),
        (CIFAR, LAPTOP, "photographs", {"data.crop_size": (32,), "knn.crop": 32}),
        (DataFacts(20_000, 96), H100, "imagenette_deepcluster_v2", {"data.crop_size": (128,)}),
        (DataFacts(20_000, 64), H100, "imagenette_deepcluster_v2", {"data.crop_size": (64,), "knn.resize": 64}),
        (DataFacts(12, 480), LAPTOP, "photographs", {"batch_size": 8, "deepcluster.num_clusters": 4}),
    ],
)
def test_what_is_chosen(data, device, recipe, expected):
    name, _, settings, _ = chosen(data, device)
    assert name == recipe
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.count}-{device.kind}")
@pytest.mark.parametrize("images", [8, 100, 1513, 30_000, 2_000_000])
@pytest.mark.parametrize("recipe", ["", "hexa_moco", "deepcluster_v2", "simclr", "tiny"])
def test_every_choice_can_run(device, images, recipe):
    _, _, s, _ = chosen(DataFacts(images, 300), device, Wishes(recipe=recipe))
    assert 1 <= s["batch_size"] <= images
    assert s["deepcluster.num_clusters"] <= images or s["method"] != "deepcluster"
    keys = s["method"] == "moco"
    layout = Layout(
        batch_size=s["batch_size"],
        microbatches=1,
        num_devices=device.count if s["batch_size"] >= device.count else 1,
        bn_group_size=s["bn_group_size"],
        cutmix_block=0,
        shuffle_block=s["shuffle_block"] if keys else 0,
    )
    layout.check()
    if keys:
        assert s["moco.queue_size"] % s["batch_size"] == 0 and s["moco.queue_size"] <= images
    assert s["runtime.microbatches"] == 0 and s["runtime.workers"] <= device.cores


def test_two_cores_end_in_minutes():
    *_, time = chosen(PHOTOS, LAPTOP)
    assert 60 < time.total < 15 * 60
    *_, large = chosen(IMAGENET, LAPTOP)
    assert large.total > 3600  # and the table says so


def test_the_learning_rate_follows_the_batch():
    base = settings_of("photographs")
    _, named, _, _ = chosen(PHOTOS, LAPTOP, Wishes(settings={"batch_size": 32}))
    ratio = named["optimizer.learning_rate"] / base["optimizer.learning_rate"]
    assert math.isclose(ratio, 32 / base["batch_size"], rel_tol=1e-3)
    assert "optimizer.learning_rate" not in chosen(IMAGENET, H100)[1]


def test_what_the_user_says_stays():
    said = {"epochs": 3, "data.crop_size": (48,), "runtime.workers": 1, "optimizer.learning_rate": 0.5}
    for device in (LAPTOP, H100):
        _, _, settings, _ = chosen(PHOTOS, device, Wishes(settings=said | {"batch_size": 16}))
        assert {key: settings[key] for key in said} == said and settings["batch_size"] == 16
        assert settings["knn.crop"] == 48  # what depends on it follows


def test_a_named_recipe_is_changed_only_where_it_could_not_work():
    name, named, _, _ = chosen(IMAGENET, H100, Wishes(recipe="hexa_dcluster"))
    assert name == "hexa_dcluster"
    assert set(named) <= {"precision", "runtime.microbatches", "runtime.workers"}
    _, named, _, _ = chosen(PHOTOS, H100, Wishes(recipe="hexa_moco"))
    assert named["moco.queue_size"] == 512 and "epochs" not in named and "data.crop_size" not in named


def test_weights_decide_the_network():
    _, named, settings, _ = chosen(PHOTOS, LAPTOP, Wishes(backbone="resnet50"))
    assert settings["model.backbone"] == "resnet50" and named["model.base_channels"] == 64
    _, _, settings, _ = chosen(PHOTOS, H100, Wishes(backbone="resnet18", base_channels=16, stem="small"))
    network = [settings[f"model.{key}"] for key in ("backbone", "base_channels", "stem")]
    assert network == ["resnet18", 16, "small"]


def test_groups_of_batch_norm_fit_a_small_memory():
    little = DeviceFacts("gpu", "of 13 GB", 1, 13 * GB, 8, 5e13)
    _, named, _, _ = chosen(IMAGENET, little)
    assert named["bn_group_size"] in (32, 64, 128)
    assert "bn_group_size" not in chosen(IMAGENET, H100)[1]


def test_the_estimate_follows_the_work():
    settings = settings_of("photographs")
    base = estimate(PHOTOS, LAPTOP, settings)
    assert estimate(DataFacts(3026, 480, 0.01), LAPTOP, settings).epoch == pytest.approx(2 * base.epoch)
    hard = estimate(PHOTOS, LAPTOP, settings | {"views.adversarial.weight": 1.0})
    assert 2 < hard.epoch / base.epoch < 3  # 8 passes for 3, and the same reading
    slow = estimate(DataFacts(1513, 4000, 1.0), LAPTOP, settings)
    assert slow.limit == "reading the images" and base.limit == "the network"
