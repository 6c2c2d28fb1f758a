"""Every stage of every experiment finds its data: miniatures of the data sets that the presets name, in tfds's own format."""

import json

import jax
import numpy as np
import pytest
from command_line import REPOSITORY
from ml_collections import ConfigDict
from official_archives import encoded, prepare, write_cifar, write_official_tars

from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.open import open_source, open_training_source
from hexa_jax.evals.backbone import Backbone
from hexa_jax.evals.tasks.labelled import open_both
from hexa_jax.experiments.presets import GRIDS, PRESETS
from hexa_jax.training.factory import make_trainer

SYNSETS = ("n01440764", "n02102040")  # of ImageNet and of Imagenette
PUBLISHED = {"imagenet": 1_281_167, "imagenette": 9_469, "cifar10": 50_000, "tiny": 128}  # images to train on


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """A folder with imagenet2012, imagenette/160px-v2 and cifar10 of a few images each, as `hexa_jax.prepare` leaves them."""
    root = tmp_path_factory.mktemp("presets")
    photos = {s: {f"{s}_{i}.JPEG": encoded((90 * k, 60 * i, 9)) for i in range(3)} for k, s in enumerate(SYNSETS)}
    validation = {f"ILSVRC2012_val_{number:08d}.JPEG": encoded((9, 9, 80 * number)) for number in (1, 2)}
    write_official_tars(root / "manual", photos, validation)
    prepare("imagenet2012", root / "tfds", root / "manual")
    for split in ("train", "val"):
        for synset, members in photos.items():
            folder = root / "imagenette" / "imagenette2-160" / split / synset
            folder.mkdir(parents=True)
            for name, data in members.items():
                (folder / name).write_bytes(data)
    prepare("imagenette/160px-v2", root / "tfds", downloads=root / "imagenette")
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    files = {name: (np.arange(3)[:, None], images) for name in names}
    kinds = {"batches.meta.txt": [f"kind{i}" for i in range(10)]}
    write_cifar(root / "cifar", "cifar-10-batches-bin", files, kinds)
    prepare("cifar10", root / "tfds", downloads=root / "cifar")
    return root / "tfds"


def parsed(*words):
    return parse_command(["hexa", *map(str, words)]).config


def saved(config):
    """The config as an evaluation finds it in the run's workdir."""
    return ConfigDict(json.loads(json.dumps(config.to_dict())), convert_dict=True)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("experiment", GRIDS)
def test_every_stage_finds_both_of_its_splits(preset, experiment, miniatures, tmp_path):
    """The user's word on where data lie is given to the pre-training alone, as an experiment does with its overrides."""
    entries = GRIDS[experiment](preset, tuple(PRESETS[preset].configs), [0])
    seen = set()
    for train, *probes in {entry.cell.name: entry.cell.stages for entry in entries}.values():
        config = parsed(*train.command(tmp_path, [f"--config.runtime.data_dir={miniatures}"])[3:])
        trainer = make_trainer(config, PUBLISHED[preset], jax.devices()[:1], num_classes=10)
        assert trainer.spec.steps_per_epoch
        key = (config.data.source, config.data.eval_source, *(probe.config for probe in probes))
        if key in seen:
            continue
        seen.add(key)
        source, held_out = open_training_source(config), open_source(config, config.data.eval_source)
        assert source.num_classes == held_out.num_classes > 1 and len(held_out) > 1
        for probe in probes:
            evaluation = parsed(*probe.command(tmp_path, ())[3:])
            trained_on, tested_on = open_both(evaluation, Backbone(None, None, 1, saved(config)))
            assert [len(trained_on), len(tested_on)] == [len(source), len(held_out)]
            assert tested_on.name(0) == held_out.name(0) != source.name(0)
    assert seen


RECIPES = ("moco_v2", "simclr", "deepcluster_v2", "swav", "rotation", "hexa_moco", "hexa_dcluster", "hexa_swav")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_probe_of_a_default_imagenet_run_finds_the_validation_set(recipe, miniatures):
    """The documented `linear_imagenet` command after a run with default settings."""
    run = parsed(f"--config={REPOSITORY}/configs/{recipe}.py", "--workdir=run")
    run.runtime.data_dir = str(miniatures)
    probe = parsed(f"--config={REPOSITORY}/configs/eval/linear_imagenet.py", "--workdir=probe")
    train, held_out = open_both(probe, Backbone(None, None, 1, saved(run)))
    assert train.name(0).startswith("tfds:imagenet2012:train")
    assert held_out.name(0).startswith("tfds:imagenet2012:validation")


@pytest.mark.parametrize(
    ("recipe", "words", "held_out"),
    [
        ("hexa_dcluster", ["--config.data.source=folder:mine"], ""),
        (
            "imagenette_moco_v2",
            ["--config.data.source=tfds:imagenette/160px:train"],
            "",
        ),  # other images are held out there
        ("cifar10_moco_v2", ["--config.data.source=arrays:mine.npz"], ""),
        ("cifar10_moco_v2", ["--config.data.source=tfds:cifar10:3.0.2:train[:50%]"], "tfds:cifar10:test"),
        ("eval/semi_imagenet", ["--config.data.source=tfds:imagenet2012:train[:2%]"], "tfds:imagenet2012:validation"),
        ("quickstart", ["--config.data.source=shapes"], "shapes:test"),
        ("moco_v2", ["--config.data.source=folder:a", "--config.data.eval_source=folder:b"], "folder:b"),
        ("moco_v2", ["--config.data.eval_source="], ""),
    ],
)
def test_held_out_examples_of_a_recipe_do_not_judge_other_data(recipe, words, held_out):
    config = parsed(f"--config={REPOSITORY}/configs/{recipe}.py", "--workdir=run", *words)
    assert config.data.eval_source == held_out


def test_without_held_out_examples_the_message_says_what_to_give(miniatures):
    run = parsed(f"--config={REPOSITORY}/configs/moco_v2.py", "--workdir=run", "--config.data.eval_source=")
    run.runtime.data_dir = str(miniatures)
    probe = parsed(f"--config={REPOSITORY}/configs/eval/linear_imagenet.py", "--workdir=probe")
    with pytest.raises(ConfigError, match="had none either: give --config"):
        open_both(probe, Backbone(None, None, 1, saved(run)))
