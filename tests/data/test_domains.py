"""Presets for kinds of images, pixel statistics that are measured, and what reaches the crops."""

import json

import numpy as np
import pytest
from command_line import REPOSITORY
from small import small_config

from configs import common
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.data import statistics
from hexa_jax.data.decode import BadImage
from hexa_jax.data.domains import DOMAINS, set_domain
from hexa_jax.data.source import DataError
from hexa_jax.data.sources import ArraySource
from hexa_jax.evals.backbone import _config_of_run
from hexa_jax.storage.workdir import ADDED, NORMALIZATION, WorkdirError, flatten, open_workdir
from hexa_jax.training.factory import make_photometric, make_resolutions, make_trainer
from hexa_jax.training.normalization import settle_normalization


def command(*words, recipe="hexa_dcluster"):
    """The config of a command."""
    return parse_command(["hexa", f"--config={REPOSITORY}/configs/{recipe}.py", "--workdir=w", *words]).config


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_sets_the_recipe_and_the_command_counts_more(name):
    recipe, config = flatten(command().to_dict()), flatten(command(f"--config.data.domain={name}").to_dict())
    preset = flatten(DOMAINS[name])
    assert {key: config[key] for key in preset} == preset
    assert {key for key in recipe if recipe[key] != config[key]} <= {*preset, "data.domain"}
    kept = command("--config.augment.hue=0.3", f"--config.data.domain={name}", "--config.data.flip=none")
    assert kept.augment.hue == 0.3 and kept.data.flip == "none" and kept.data.domain == name
    (resolution,), photometric = make_resolutions(kept, 0), make_photometric(kept)
    assert resolution.flip == 0 and all(crop.hue == 0.3 for crop in photometric)
    assert flatten(set_domain(command(), name).to_dict()) == config | {"data.domain": ""}


def test_settings_of_crops_reach_them_and_mistakes_are_one_line():
    config = small_config(
        "simclr", **{"data.aspect_ratio": (0.5, 3.0), "data.quarter_turns": True, "precision": "float32"}
    )
    for flip, chances in {"none": (0, 0), "horizontal": (0.5, 0), "vertical": (0, 0.5), "both": (0.5, 0.5)}.items():
        config.data.flip = flip
        (crop,) = make_trainer(config, 70).objective.crops.resolutions
        assert (crop.flip, crop.vertical_flip) == chances and crop.ratio == (0.5, 3.0) and crop.quarter_turns
    for key, value, message in (
        ("data.flip", "up", "data.flip='up' is not known: use one of both, horizontal, none, vertical"),
        ("data.aspect_ratio", (2.0, 1.0), r"data.aspect_ratio=\(2.0, 1.0\) must be"),
        ("data.aspect_ratio", (1.0,), "data.aspect_ratio=.* must be"),
        ("data.domain", "arial", "data.domain='arial' is not known: use one of aerial, grey"),
        ("data.normalization", "auto", "data.normalization='auto' is not known: use one of fixed, measured"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer(small_config("simclr", **{key: value}), 70)
    with pytest.raises(ConfigError, match=r"data.domain='arial' is not known"):
        command("--config.data.domain=arial")
    with pytest.raises(ConfigError, match=r"data.pixel_mean is given, and data.normalization=measured would"):
        command("--config.data.normalization=measured", "--config.data.pixel_mean=(0.0, 0.0, 0.0)")


@pytest.mark.parametrize("settings", [{"data.quarter_turns": True}, {"data.flip": "both"}])
def test_rotation_prediction_refuses_turned_crops(settings):
    config = small_config("rotation", **{"data.num_crops": (1,)}, **settings)
    with pytest.raises(ConfigError, match=r"rotation predicts how far a crop was turned: data.quarter_turns must be"):
        make_trainer(config, 70)
    make_trainer(small_config("rotation", **{"data.num_crops": (1,), "data.flip": "vertical"}), 70)


def images(n=6, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (n, 8, 9, 3), np.uint8)


def test_pixel_statistics_are_those_of_the_pixels():
    pixels = images() // np.array([1, 2, 4], np.uint8)
    found = statistics.measure_pixels(ArraySource(pixels))
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)) / 255, atol=1e-6)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)) / 255, atol=1e-6)
    assert found.images == 6
    part = statistics.measure_pixels(ArraySource(pixels), limit=3)
    np.testing.assert_allclose(part.mean, pixels[::2].mean((0, 1, 2)) / 255, atol=1e-6)
    assert statistics.measure_pixels(ArraySource(np.zeros((2, 4, 4, 3), np.uint8))).std == (round(1 / 255, 6),) * 3


class Broken(ArraySource):
    """Its first image cannot be read; of another seed, none can."""

    def __getitem__(self, index):
        if index == 0 or len(self) == 2:
            raise BadImage(self.name(index), "broken")
        return super().__getitem__(index)


def test_unreadable_images_are_left_out_of_the_statistics():
    pixels = images()
    found = statistics.measure_pixels(Broken(pixels))
    assert found.images == 5
    np.testing.assert_allclose(found.mean, pixels[1:].mean((0, 1, 2)) / 255, atol=1e-6)
    with pytest.raises(DataError, match="none of the first 1000 images can be read, as arrays, index 0"):
        statistics.measure_pixels(Broken(images(2)))


def measuring(**settings):
    return small_config("moco", **{"data.normalization": "measured", **settings})


def test_measured_statistics_are_recorded_once_and_used_ever_after(tmp_path, capsys, monkeypatch):
    source, config = ArraySource(images()), measuring()
    folder = open_workdir(str(tmp_path / "run"), config)
    network = settle_normalization(config, folder, source, make_trainer(config, 70)).objective.network
    assert "pixels of 6 images: mean (" in capsys.readouterr().out
    recorded = json.loads((folder / NORMALIZATION).read_text())
    mean, std = statistics.measure_pixels(source)[:2]
    assert recorded == {"pixel_mean": list(mean), "pixel_std": list(std), "images": 6}
    assert config.data.pixel_mean == mean and config.data.pixel_std == std
    assert network == make_trainer(config, 70).objective.network and network.pixel_mean == mean
    # A resume, whose command knows the recipe's numbers; at no moment does config.json hold them.
    monkeypatch.setattr("hexa_jax.training.normalization.measure_pixels", None)
    again = measuring()
    assert again.data.pixel_mean != mean
    assert open_workdir(str(folder), again) == folder and again.data.pixel_mean == mean
    assert _config_of_run(str(folder)).data.pixel_std == list(std)  # what evaluations and exports read
    trainer = make_trainer(again, 70)
    assert settle_normalization(again, folder, source, trainer) == trainer
    assert again.data.pixel_std == std and not capsys.readouterr().out
    (folder / "metrics.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(WorkdirError, match=r"data.normalization was 'measured', is 'fixed'"):
        open_workdir(str(folder), small_config("moco"))


def test_a_run_that_starts_over_measures_again(tmp_path, caplog):
    source, config = ArraySource(images()), measuring()
    folder = open_workdir(str(tmp_path / "run"), config)
    settle_normalization(config, folder, source, make_trainer(config, 70))
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    other = measuring(**{"data.limit": 3})
    open_workdir(str(folder), other)
    assert "starting over" in caplog.text and not (folder / NORMALIZATION).exists()
    settle_normalization(other, folder, ArraySource(images(seed=1)), make_trainer(other, 70))
    assert other.data.pixel_mean != config.data.pixel_mean


def test_runs_of_before_these_settings_go_on_and_are_evaluated(tmp_path):
    config = common.get_config()
    folder = open_workdir(str(tmp_path / "run"), config)
    saved = json.loads((folder / "config.json").read_text())
    for key in ADDED:
        group, _, name = key.rpartition(".")
        saved.get(group, {}).pop(name, None)  # some are of evaluations
    assert "flip" not in saved["data"]
    (folder / "config.json").write_text(json.dumps(saved))
    old = _config_of_run(str(folder))
    assert flatten(old.to_dict()) == flatten(config.to_dict())
    open_workdir(str(folder), common.get_config())
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "metrics.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(WorkdirError, match=r"data.flip was None, is 'both'"):
        open_workdir(str(folder), command("--config.data.flip=both", recipe="../configs/common"))
