"""Loggers: the real libraries without a network where they are installed, and what happens when one fails."""

import contextlib
import importlib.util
import json
import logging
import pathlib
import sqlite3

import pytest

from hexa_jax.storage import loggers
from hexa_jax.storage.loggers import LoggerError, Loggers, check_loggers

# Other people's libraries warn as they like.
pytestmark = pytest.mark.filterwarnings("ignore")


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None,
        reason=f"{package} is not installed; it is too large for the dev extra: pip install {package}",
    )


def run(names, folder):
    """A run of three steps that is resumed from the second."""
    folder.mkdir(exist_ok=True)
    for resume, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        logger = Loggers(names, folder, {"method": "moco", "views.epsilon": 1.0}, resume)
        for step in steps:
            logger.write(step, {"loss": 10.0 - step, "rankme": 5.0 * step})
        logger.close()


@needs("wandb")
def test_wandb_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run(["wandb"], tmp_path / "run")
    assert not caplog.records
    identity = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    files = list((tmp_path / "run").rglob("*.wandb"))
    assert len(files) == 2 and all(identity in file.name for file in files)  # one run in two parts
    content = b"".join(file.read_bytes() for file in files)
    assert b"rankme" in content and b"views.epsilon" in content


@needs("mlflow")
def test_mlflow_in_a_local_file(tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    # Newer versions want a database, for which the small package has no driver.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run(["mlflow"], tmp_path / "run")
    assert not caplog.records
    client = MlflowClient()
    identity = json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"]
    kept = client.get_run(identity)
    assert kept.info.status == "FINISHED" and kept.data.params["method"] == "moco"
    history = client.get_metric_history(identity, "loss")
    assert {(point.step, point.value) for point in history} == {(1, 9), (2, 8), (3, 7), (4, 6)}


@needs("trackio")
def test_trackio_in_its_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    run(["trackio"], tmp_path / "run")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (database,) = (tmp_path / "store").glob("hexa_jax*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    identity = json.loads((tmp_path / "run" / "loggers.json").read_text())["trackio"]
    assert {name for name, _, _ in rows} == {identity}
    assert {step for _, step, _ in rows} == {1, 2, 3, 4} and b"rankme" in bytes(rows[0][2])


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    class Failing:
        def __init__(self, *_):
            self.calls = []

        def write(self, step, values):
            self.calls.append(step)
            if step == 2:
                raise ConnectionError("the service\nis gone")

        def close(self):
            self.calls.append("closed")

    made = []
    monkeypatch.setitem(loggers.MAKERS, "wandb", lambda *_: made.append(Failing()) or made[-1])
    monkeypatch.setattr(loggers, "check_loggers", lambda _: None)
    both = Loggers(["wandb", "tensorboard"], tmp_path, {}, 0)
    for step in (1, 2, 3):
        both.write(step, {"loss": 1.0})
    both.close()
    assert made[0].calls == [1, 2]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "wandb fails and is left out from now on: the service is gone"
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"loss") == 3


def test_a_logger_that_cannot_start_is_left_out(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no key")

    monkeypatch.setitem(loggers.MAKERS, "tensorboard", fails)
    Loggers(["tensorboard"], tmp_path, {}, 0).close()
    assert "tensorboard fails and is left out" in caplog.text


def test_unknown_and_missing_loggers_are_one_line(monkeypatch):
    check_loggers(["tensorboard"])
    with pytest.raises(LoggerError, match="'wanddb' is not known: use some of tensorboard, wandb"):
        check_loggers(["wanddb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LoggerError, match="mlflow, which is not installed: pip install mlflow-skinny"):
        check_loggers(["mlflow"])


def test_names_of_what_is_stored_stay_apart(tmp_path):
    numbers = iter("ab")
    assert loggers._identity(tmp_path, "wandb", lambda: next(numbers)) == "a"
    assert loggers._identity(tmp_path, "mlflow", lambda: next(numbers)) == "b"
    assert loggers._identity(tmp_path, "wandb", lambda: "new") == "a"
    assert isinstance(json.loads((pathlib.Path(tmp_path) / "loggers.json").read_text()), dict)
