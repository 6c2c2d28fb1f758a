"""Evaluations and exports use the size that the network was trained at, unless one is given."""

import json

import pytest
from command_line import REPOSITORY, evaluation_words, finished, result

from configs import common
from configs.eval import common as evaluation
from hexa_jax import export, main
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.backbone import random_backbone
from hexa_jax.evals.image_size import trained_size
from hexa_jax.evals.tasks.image_size import with_size


def run_config(crop_size=(224,), resize=256, crop=224):
    config = common.get_config()
    config.data.crop_size = crop_size
    config.knn.resize, config.knn.crop = resize, crop
    return config


@pytest.mark.parametrize(
    "run, size",
    [
        (None, (256, 224)),
        (run_config(), (256, 224)),
        (run_config((64,), 64, 64), (64, 64)),  # the run's own kNN
        (run_config((64,)), (73, 64)),  # a default that suits nothing
        (run_config((128,)), (146, 128)),
        (run_config((384,)), (439, 384)),
        (run_config((160, 96)), (256, 224)),  # SwAV's 6 crops are tested at 224 pixels
        (run_config((64, 32)), (73, 64)),
        (run_config((32,), 64, 64), (64, 64)),  # asked for
    ],
)
def test_the_size_that_a_network_was_trained_at(run, size):
    assert trained_size(run) == size


@pytest.mark.parametrize(
    ("recipe", "words", "size"),
    [
        ("moco_v2", ["data.crop_size=(96,)"], (110, 96)),
        ("moco_v2", ["data.crop_size=(160,)"], (256, 224)),  # SwAV tests at 224 pixels, too
        ("cifar10_moco_v2", ["data.crop_size=(64,)"], (64, 64)),
        ("moco_v2", ["data.crop_size=(96,)", "knn.crop=64"], (256, 64)),
        ("moco_v2", ["data.crop_size=(96,)", "knn.resize=128"], (128, 224)),
        ("moco_v2", ["batch_size=64"], (256, 224)),
        ("swav:crops=6,batch=256", ["data.crop_size=(448,96)"], (717, 627)),
        ("moco_v2", ["data.crop_size=(0,)"], (256, 224)),  # refused later
    ],
)
def test_the_runs_own_knn_follows_crops_of_the_command_line(recipe, words, size):
    name, _, arguments = recipe.partition(":")
    config = f"--config={REPOSITORY}/configs/{name}.py:{arguments}"
    knn = parse_command(["hexa", config, "--workdir=run", *(f"--config.{word}" for word in words)]).config.knn
    assert (knn.resize, knn.crop) == size


@pytest.mark.parametrize(
    "given, size",
    [
        ({}, (73, 64)),
        ({"resize": 70, "crop": 60}, (70, 60)),
        ({"crop": 112}, (128, 112)),
        ({"resize": 64}, (64, 56)),
    ],
)
def test_given_settings_win(given, size, capsys):
    config = evaluation.get_config("knn")
    config.data.update(given)
    config.lock()
    chosen = with_size(config, run_config((64,)))
    assert (chosen.data.resize, chosen.data.crop) == size
    said = capsys.readouterr().out.splitlines()
    if len(given) == 2:
        assert not said
        return
    (line,) = said
    assert line.startswith(f"images: short side {size[0]}, centre crop {size[1]} pixels, ")
    assert "trained on 64-pixel crops; --config.data.resize" in line
    assert config.data.resize == given.get("resize", 0)  # what the workdir's config.json says stays


def test_a_negative_size_is_a_mistake():
    config = evaluation.get_config("knn")
    config.data.crop = -1
    with pytest.raises(ConfigError, match=r"data\.crop=-1"):
        with_size(config, None)


def evaluated(workdir, checkpoint, **settings):
    settings = {"leave_one_out": True, "runtime.num_devices": 1, "runtime.batch_size": 32} | settings
    assert main.main(["hexa", *evaluation_words("knn.py", workdir, checkpoint=checkpoint, **settings)]) == 0
    return result(workdir)


def test_knn_with_defaults_is_knn_at_the_run_s_own_size(tmp_path, capsys):
    checkpoint, _ = finished("moco")  # crops of 8 pixels, and a kNN at 8
    default = evaluated(tmp_path / "default", checkpoint)
    assert (
        "images: short side 8, centre crop 8 pixels, for a network trained on 8-pixel crops" in capsys.readouterr().out
    )
    assert default == evaluated(tmp_path / "given", checkpoint, **{"data.resize": 8, "data.crop": 8})
    assert "images:" not in capsys.readouterr().out
    assert default != evaluated(tmp_path / "other", checkpoint, **{"data.resize": 20, "data.crop": 16})


def test_exports_say_the_size(tmp_path):
    backbone = random_backbone(backbone="resnet18", base_channels=64)
    export.export(backbone._replace(config=run_config((64,))), "timm", tmp_path / "timm")
    timm = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert timm["input_size"] == [3, 64, 64] and int(64 / timm["crop_pct"]) == 73
    export.export(backbone._replace(config=run_config((64,), 64, 64)), "huggingface", tmp_path / "hf")
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 64} and processor["crop_pct"] == 1.0


def test_libraries_get_every_short_side_back():
    for crop in range(8, 600):
        resize = round(crop * 256 / 224)
        assert int(crop / export._crop_pct(resize, crop)) == resize
    assert export._crop_pct(256, 224) == 0.875
