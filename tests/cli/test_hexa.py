"""The command `hexa`: its help, mistakes, and the words that its commands make of theirs."""

import importlib
import json
import os
import shutil

import jax
import pytest
from command_line import image_folder
from small import small_config

from hexa_jax import main
from hexa_jax.cli import app, doctor, evaluate, export, pretrain
from hexa_jax.cli.command import parse_command
from hexa_jax.cli.facts import data_facts, network_of_weights
from hexa_jax.cli.words import Mistake, source_of
from hexa_jax.core import compiled
from hexa_jax.data.open import open_training_source
from hexa_jax.data.source import DataError
from hexa_jax.data.sources import make_source
from hexa_jax.storage.workdir import flatten
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.online_probe import make_probe


def run_words(monkeypatch, *argv):
    """The words that a command gives to `python -m hexa_jax.main`, as its config and workdir."""
    given = []
    monkeypatch.setattr("hexa_jax.main.main", lambda words: given.append(words) or 0)
    assert pretrain.main(list(argv)) == 0
    (words,) = given
    return parse_command(words)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    image_folder(folder, by_class=False, count=40)
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def test_help_version_and_a_wrong_command(capsys):
    assert app.main([]) == app.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(f"hexa {name}  ") == 2 for name in app.COMMANDS)
    assert app.main(["pretain"]) == 2
    assert "did you mean 'pretrain'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pretrain", "embed", "evaluate", "export", "recipes", "doctor"])
def test_every_command_explains_itself(name, capsys):
    module = importlib.import_module(app.COMMANDS[name].module)
    assert module.main(["--help"]) == 0
    assert f"hexa {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "argv", "line"),
    [
        (pretrain.main, [], "the following arguments are required: IMAGES; see hexa pretrain --help"),
        (pretrain.main, ["x", "--epoch=2"], "unknown option '--epoch=2'; see hexa pretrain --help"),
        (pretrain.main, ["nowhere", "--dry-run"], "nowhere does not exist"),
        (pretrain.main, ["shapes", "--recipe=hexa_dclustr"], "did you mean --config=hexa_dcluster?"),
        (pretrain.main, ["shapes", "--config.batchsize=2"], "did you mean 'batch_size'?"),
        (pretrain.main, ["shapes", "--config.checkpoint=w"], "did you mean 'model.init'?"),
        (pretrain.main, ["shapes", "--config.model.pretrained=True"], "did you mean 'model.init'?"),
        (pretrain.main, ["shapes", "--config.lr=0.1"], "did you mean 'optimizer.learning_rate'?"),
        (pretrain.main, ["tfds:cifar10", "more"], "cannot be combined"),
        (pretrain.main, ["tfsd:cifar10"], "unknown data source 'tfsd:cifar10'; did you mean tfds:cifar10? use"),
        (pretrain.main, ["a", "foldr:b"], "did you mean folder:b?"),
        (pretrain.main, ["nonsense:x"], "or one of folder:DIR"),
        (evaluate.main, ["random", "knn", "--workdir=w", "--data=Folder:x"], "unknown data source"),
        (pretrain.main, ["shapes", "--domain=arial"], "data.domain='arial' is not known: use one of aerial"),
        (evaluate.main, ["w"], "the following arguments are required: TASK; see hexa evaluate --help"),
        (evaluate.main, ["random", "knn"], "--workdir is missing"),
        (evaluate.main, ["random", "knnn", "--workdir=x"], "recipe 'eval/knnn' is not known"),
        (export.main, [], "W is missing"),
        (doctor.main, ["now"], "it takes no words"),
    ],
)
def test_a_mistake_is_one_line(command, argv, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(argv) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("hexa ") and line in message
    assert not list(tmp_path.iterdir())


def test_what_images_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source_of(["a", "/b"]) == f"folder:{tmp_path}/a,/b"
    assert source_of(["folder:a"]) == f"folder:{tmp_path}/a"
    assert source_of(["arrays:x.npz"]) == f"arrays:{tmp_path}/x.npz"
    for other in ("tfds:cifar10:train", "shapes"):
        assert source_of([other]) == other
    with pytest.raises(Mistake, match="tfds:x"):
        source_of(["a", "tfds:x"])
    (tmp_path / "trip:1").mkdir()  # a folder, whatever its name looks like
    assert source_of(["trip:1"]) == f"folder:{tmp_path}/trip:1"


def test_options_become_settings_and_go_before_choices(photos, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    command = run_words(
        monkeypatch,
        str(photos),
        "--epochs=3",
        f"--labelled={photos}",
        "--domain=aerial",
        "--config.batch_size=8",
        "--extend",
    )
    config = command.config
    assert config.data.domain == "aerial" and config.data.quarter_turns
    assert command.workdir == "runs/photos" and command.extend
    assert config.data.source == f"folder:{photos}" and config.knn.source == f"folder:{photos}"
    assert (config.epochs, config.batch_size, config.data.labels) == (3, 8, "none")
    assert config.runtime.microbatches == 0 and config.bn_group_size == 8
    said = capsys.readouterr().out
    assert "empty.jpg" in said and "expected time" in said and "as you said" in said


def test_a_dry_run_prints_the_command_that_a_run_would_be(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main([str(photos), "--dry-run", "--workdir=w"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("  python -m hexa_jax.main --config=photographs --workdir=w ")
    assert list(tmp_path.iterdir()) == []
    started = run_words(monkeypatch, str(photos), "--workdir=w").config
    words = [word.strip("'") for word in line.split()[3:]]
    assert parse_command(["hexa", *words]).config.batch_size == started.batch_size


def test_a_second_start_keeps_the_settings_of_the_first(photos, monkeypatch, tmp_path):
    first = run_words(monkeypatch, str(photos), f"--workdir={tmp_path / 'w'}", "--config.model.base_channels=4")
    folder = tmp_path / "w"
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    saved = first.config.to_dict()
    saved["deepcluster"]["num_clusters"] = 7  # what another machine might have chosen
    (folder / "config.json").write_text(json.dumps(saved))
    second = run_words(monkeypatch, str(photos), f"--workdir={folder}")
    before, after = (flatten(config.to_dict()) for config in (first.config, second.config))
    assert after == before | {"deepcluster.num_clusters": 7}
    shutil.rmtree(folder / "checkpoints")  # no step was made: chosen anew
    third = run_words(monkeypatch, str(photos), f"--workdir={folder}")
    assert third.config.deepcluster.num_clusters == first.config.deepcluster.num_clusters


def test_processes_of_a_launcher_are_sent_to_the_plain_command(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert pretrain.main(["shapes"]) == 2
    assert "hexa pretrain --dry-run" in capsys.readouterr().err


def test_an_evaluation_is_a_recipe_with_a_workdir(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": {"eval_source": ""}}))
    command = parse_command(["hexa", *evaluate.evaluation([str(run), "knn"])])
    assert command.workdir == str(run / "knn") and command.config.task == "knn"
    assert command.config.checkpoint == str(run) and command.config.leave_one_out
    words = evaluate.evaluation([str(run), "linear:epochs=3", "--data=a", "--held_out=b", "--workdir=x"])
    config = parse_command(["hexa", *words]).config
    assert (config.task, config.epochs) == ("linear_features", 3)
    assert config.data.eval_source.endswith("/b") and config.data.source.endswith("/a")


def test_facts_about_images(photos, tmp_path):
    facts, problems = data_facts(make_source(f"folder:{photos}"))
    assert (facts.images, facts.sampled, facts.unreadable) == (41, 41, 1)
    assert 20 <= facts.short_side <= 24 and facts.decode_seconds > 0
    assert len(problems) == 1 and "empty.jpg" in problems[0]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 1 images can be read"):
        data_facts(make_source(f"folder:{tmp_path}"))


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("timm:resnet50.a1_in1k", {"backbone": "resnet50"}),
        ("torchvision:resnet18", {"backbone": "resnet18"}),
        ("hf:microsoft/resnet-34", {"backbone": "resnet34"}),
        ("timm:wide_resnet50_2", {}),
        ("timm:vit_small", {}),
    ],
)
def test_the_network_of_weights_by_name(name, network):
    assert network_of_weights(name) == network


def test_the_network_of_a_run(tmp_path):
    model = {"backbone": "resnet18", "base_channels": 16, "stem": "small", "head_dim": 3}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    assert network_of_weights(str(tmp_path)) == {"backbone": "resnet18", "base_channels": 16, "stem": "small"}


def test_accuracy_is_measured_on_labeled_images_of_their_own(tmp_path):
    """Training images without labels; those of `knn.source` have the folders as classes whatever `data.labels` says."""
    image_folder(tmp_path, count=12)
    settings = {"data.labels": "none", "knn.source": f"folder:{tmp_path}"}
    config = small_config("deepcluster", precision="float32", **settings)
    config.data.eval_source = ""
    source = open_training_source(config)
    probe = make_probe(config, source, make_trainer(config, len(source)))
    assert probe.leave_one_out and len(probe.bank.indices) == 12
    config.knn.source = "folder:" + str(next(path for path in tmp_path.iterdir() if path.is_dir()))
    with pytest.raises(DataError, match="sub-folders"):
        make_probe(config, source, make_trainer(config, len(source)))


def test_compiled_programs_are_kept_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv(compiled.VARIABLE, "")
    compiled.keep_compiled_programs()
    assert os.environ[compiled.VARIABLE] == "" and jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv(compiled.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        compiled.keep_compiled_programs()
        folder = os.environ[compiled.VARIABLE]
        assert folder.startswith(f"{tmp_path}/.cache/hexa_jax/compiled/")
        assert jax.config.jax_compilation_cache_dir == folder
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        monkeypatch.setenv(compiled.VARIABLE, folder)  # monkeypatch puts back what was there


@pytest.mark.parametrize("saved", [False, True])
def test_an_interruption_promises_only_what_is_there(saved, tmp_path, monkeypatch, capsys):
    def stopped(_, workdir):
        if saved:
            (workdir / "checkpoints" / "step_00000003").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setitem(main.TASKS, "pretrain", stopped)
    assert main.main(["hexa", "--config=tiny", f"--workdir={tmp_path / 'w'}"]) == 130
    said = capsys.readouterr().err
    assert ("resumes from the last checkpoint" in said) == saved and ("nothing was saved" in said) != saved


def test_doctor_finds_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "accelerator_warning", lambda: "")
    monkeypatch.setattr(doctor, "SHARED_MEMORY", 0)
    monkeypatch.setattr(doctor, "DISK", 0)
    assert doctor.find_problems() == []
    monkeypatch.setattr(doctor, "accelerator_warning", lambda: "this machine has a TPU, but ...")
    monkeypatch.setattr(doctor, "DISK", 1 << 60)
    assert doctor.main([]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 2 and "a TPU" in problems[0] and "too little for checkpoints" in problems[1]
