"""The run's folder: whose it is, and files that a crash or a resume leaves readable."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import configs.common
from hexa_jax.storage import workdir
from hexa_jax.storage.loggers import LoggerError
from hexa_jax.storage.workdir import Metrics, WorkdirError, abandon, closest, flatten, held, open_workdir, write_json


@pytest.fixture
def config():
    return configs.common.get_config()


def refused(path, config, **options) -> str:
    with pytest.raises(WorkdirError) as caught:
        open_workdir(str(path), config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_evaluation_is_sent_to_a_folder_of_its_own(tmp_path):
    config = configs.common.get_config()
    open_workdir(str(tmp_path / "run"), config)
    config.task, config.seed = "knn", 5
    with pytest.raises(WorkdirError, match=r"holds a run of config.task=pretrain: give knn a folder of its own$"):
        open_workdir(str(tmp_path / "run"), config)


def test_damaged_pixel_statistics_are_named(tmp_path, config):
    config.data.normalization = "measured"
    open_workdir(str(tmp_path), config)
    for text in ("{", "{}", "[]"):
        (tmp_path / workdir.NORMALIZATION).write_text(text)
        assert "normalization.json is damaged" in refused(tmp_path, config)


def test_a_new_folder_holds_the_config(tmp_path, config):
    folder = open_workdir(str(tmp_path / "deep" / "run"), config)
    assert folder == tmp_path / "deep" / "run"
    assert flatten(json.loads((folder / "config.json").read_text())) == flatten(config.to_dict())
    assert open_workdir(str(folder), configs.common.get_config()) == folder


def test_home_and_relative_paths(tmp_path, config, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_workdir("~/run", config) == open_workdir("run", config) == tmp_path / "run"


def test_another_config_is_refused_by_its_keys(tmp_path, config):
    open_workdir(str(tmp_path), config)
    before = (tmp_path / "config.json").read_bytes()
    config.model.backbone = "resnet18"
    config.data.crop_size = (96,)
    config.runtime.workers = 3
    message = refused(tmp_path, config)
    assert "model.backbone was 'resnet50', is 'resnet18'" in message and str(tmp_path) in message
    assert "data.crop_size was [224], is [96]" in message
    assert "runtime" not in message and "--extend" not in message
    assert message.count(" was ") == 2
    assert (tmp_path / "config.json").read_bytes() == before


def test_keys_that_one_side_lacks_are_named(tmp_path, config):
    open_workdir(str(tmp_path), config)
    with config.unlocked():
        config.novel = 3
        del config.moco.momentum
    message = refused(tmp_path, config)
    assert "novel was None, is 3" in message and "moco.momentum was 0.999, is None" in message


def test_a_switch_that_an_older_run_did_not_know_counts_as_off(tmp_path, config):
    older = configs.common.get_config()
    with older.unlocked():
        del older.views.average
    open_workdir(str(tmp_path), older)
    config.views.average = True
    assert "views.average was None, is True" in refused(tmp_path, config)
    config.views.average = False
    assert open_workdir(str(tmp_path), config) == tmp_path


def test_runtime_settings_may_differ(tmp_path, config):
    open_workdir(str(tmp_path), config)
    config.runtime.microbatches = 4
    config.runtime.data_dir = "/elsewhere"
    open_workdir(str(tmp_path), config)
    assert json.loads((tmp_path / "config.json").read_text())["runtime"]["microbatches"] == 4


def test_epochs_need_extend_and_may_only_grow(tmp_path, config, caplog):
    open_workdir(str(tmp_path), config)
    config.epochs = 300
    message = refused(tmp_path, config)
    assert "epochs was 200, is 300" in message and "--extend" in message
    with caplog.at_level(logging.WARNING):
        open_workdir(str(tmp_path), config, extend=True)
    assert "200" in caplog.text and "300" in caplog.text and "cosine" in caplog.text
    open_workdir(str(tmp_path), config)  # it is a run of 300 epochs now
    config.epochs = 100
    assert "epochs was 300, is 100" in refused(tmp_path, config, extend=True)
    config.epochs, config.seed = 400, 1
    assert "seed was 0, is 1" in refused(tmp_path, config, extend=True)


@pytest.mark.parametrize("content", ["{", "", "[]", "3", '"x"', "null", b"\xff\xfe\x00"])
def test_a_foreign_config_file_is_one_clear_line(tmp_path, config, content):
    saved = tmp_path / "config.json"
    saved.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = saved.read_bytes()
    assert "config.json" in refused(tmp_path, config) and saved.read_bytes() == before


def test_a_mistake_leaves_the_folder_free_for_the_corrected_command(tmp_path, config):
    folder = open_workdir(str(tmp_path / "run"), config)
    abandon(folder)
    assert not folder.exists() and tmp_path.exists()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    abandon(open_workdir(str(folder), config))
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
    open_workdir(str(folder), config)
    Metrics(folder, ("tensorboard",), 0).close()
    abandon(folder)  # a run that began stays
    assert (folder / "config.json").exists() and (folder / "metrics.jsonl").exists()


def test_a_tolerance_for_bad_files_may_change(tmp_path, config):
    open_workdir(str(tmp_path), config)
    config.data.max_bad_fraction = 0.01
    assert open_workdir(str(tmp_path), config) == tmp_path
    assert json.loads((tmp_path / "config.json").read_text())["data"]["max_bad_fraction"] == 0.01


def test_a_setting_that_an_older_run_did_not_know_stands_for_what_it_did(tmp_path, config):
    older = configs.common.get_config()
    with older.unlocked():
        del older.data.labels
    open_workdir(str(tmp_path), older)
    config.data.labels = "none"
    assert "data.labels was None, is 'none'" in refused(tmp_path, config)
    config.data.labels = "auto"
    assert open_workdir(str(tmp_path), config) == tmp_path


def begun(folder, config, step):
    """A run that wrote metrics and a checkpoint of a step; what an interrupted save leaves lies beside it."""
    open_workdir(str(folder), config)
    metrics = Metrics(folder, ("tensorboard",), 0)
    metrics.write(step, {"knn_accuracy": 3.0})
    metrics.close()
    for name in (f"step_{step:08d}", f"step_{step:08d}_1"):
        (folder / "checkpoints" / name).mkdir(parents=True)


def test_a_run_that_made_no_step_gives_way_to_the_corrected_command(tmp_path, config, caplog):
    begun(tmp_path, config, step=0)
    (tmp_path / "notes.txt").write_text("mine")
    open_workdir(str(tmp_path), config)  # the same config: the first pass is kept
    assert (tmp_path / "checkpoints" / "step_00000000").exists() and not caplog.text
    config.batch_size = 64
    assert open_workdir(str(tmp_path), config) == tmp_path
    assert "batch_size was 256, is 64; it made no step: starting over" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 64


def test_a_run_that_made_a_step_does_not(tmp_path, config):
    begun(tmp_path / "a", config, step=1)
    begun(tmp_path / "b", config, step=0)
    (tmp_path / "b" / "result.json").write_text("{}")
    config.batch_size = 64
    for name in ("a", "b"):
        before = sorted(tmp_path.joinpath(name).rglob("*"))
        assert "batch_size was 256, is 64" in refused(tmp_path / name, config)
        assert sorted(tmp_path.joinpath(name).rglob("*")) == before
    begun(tmp_path / "c", configs.common.get_config(), step=0)
    config.task = "knn"  # no command to train: it would evaluate into the run's own folder
    assert "holds a run of config.task=pretrain: give knn" in refused(tmp_path / "c", config)


def test_unwritable_folders(tmp_path, config, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "cannot write to workdir" in refused(tmp_path / "file", config)
    message = refused(tmp_path / "file" / "below", config)
    assert str(tmp_path / "file" / "below") in message and "Not a directory" in message

    def full(*_):
        raise OSError(28, "No space left on device")

    open_workdir(str(tmp_path / "run"), config)
    before = (tmp_path / "run" / "config.json").read_bytes()
    monkeypatch.setattr(workdir.pathlib.Path, "write_text", full)
    assert "No space left on device" in refused(tmp_path / "run", config)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path, config):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(tmp_path / "run", config)


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"b": 1, "a": [2.5, None]})
    assert json.loads(path.read_text()) == {"a": [2.5, None], "b": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    seen = {}
    replace = os.replace

    def spy(source, target):  # at the moment of the switch the new file is complete and the old one still there
        seen["new"], seen["old"] = (json.loads(pathlib.Path(path).read_text()) for path in (source, target))
        replace(source, target)

    monkeypatch.setattr(workdir.os, "replace", spy)
    write_json(path, {"a": 3})
    assert seen == {"new": {"a": 3}, "old": {"a": [2.5, None], "b": 1}}
    assert json.loads(path.read_text()) == {"a": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_lines_at_once(tmp_path):
    metrics = Metrics(tmp_path, ("tensorboard",), 0)
    metrics.write(1, {"loss": jnp.float32(2.5), "count": np.int64(3), "array": np.array([7.0])[0]})
    assert lines_of(tmp_path) == [{"step": 1, "loss": 2.5, "count": 3.0, "array": 7.0}]  # before it is closed
    metrics.write(2, {"loss": 2})
    metrics.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1 and b"loss" in events[0].read_bytes()


def test_resume_drops_what_will_be_done_again(tmp_path, caplog):
    metrics = Metrics(tmp_path, ("tensorboard",), 0)
    for step in (0, 1, 2, 2, 3, 4):
        metrics.write(step, {"loss": step / 2})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # torn by a crash
    with caplog.at_level(logging.WARNING):
        metrics = Metrics(tmp_path, ("tensorboard",), 2)
    assert "torn" in caplog.text
    metrics.write(3, {"loss": 30})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(0, 0), (1, 0.5), (2, 1), (2, 1), (3, 30)]
    assert {entry.name for entry in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_unknown_logger(tmp_path):
    with pytest.raises(
        LoggerError, match=r"runtime\.loggers: 'tensorbord' is not known: use some of tensorboard, wandb"
    ):
        Metrics(tmp_path, ("tensorbord",), 0)


def test_closest():
    names = ["model.backbone", "model.stem", "epochs"]
    assert closest("model.backbon", names) == "; did you mean 'model.backbone'?"
    assert closest("epoch", names) == "; did you mean 'epochs'?"
    assert closest("zzzz", names) == "" and closest("x", []) == ""


def test_flatten():
    nested = {"a": {"b": (1, 2), "c": {"d": None}}, "e": 0.5}
    assert flatten(nested) == {"a.b": [1, 2], "a.c.d": None, "e": 0.5}


# ---- One run at a time -------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import sys, time
from hexa_jax.storage.workdir import held
with held({str(folder)!r}):
    print("in", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[2]
    )
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(WorkdirError, match=f"is in use by process {other.pid} on ") as caught, held(str(folder)):
            pytest.fail("two runs in one workdir")
        assert "\n" not in str(caught.value)
    finally:
        other.kill()
        other.wait()
    with held(str(folder)):
        pass
    with held(str(folder)):  # and again
        abandon(folder)
    assert not folder.exists()
