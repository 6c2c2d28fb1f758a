"""The folder of a run: config, metrics, events and result, readable after any crash."""

import contextlib
import difflib
import fcntl
import json
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hexa_jax.core import console
from hexa_jax.parallel import processes
from hexa_jax.storage.loggers import Loggers

LOCK = ".lock"
# What a run's weights started from where they were not random: name, hash, architecture.
INIT_RECORD = "init.json"
COMMAND = "command.json"  # how the run was last started
# Besides `runtime`: settings that only say when to give up, and change no number of a run.
FREE = {"data.max_bad_fraction"}
# Settings that older runs did not know, with the values that say what those runs did.
ADDED = {
    "data.labels": "auto",
    "knn.source": "",
    "model.init": "",
    "without": "",
    "corruptions": "imagenet",
    "data.image_column": "",
    "data.label_column": "",
    "data.video_seconds": 1.0,
    "data.aspect_ratio": [0.75, 1.3333333333333333],
    "data.flip": "horizontal",
    "data.quarter_turns": False,
    "data.domain": "",
    "data.normalization": "fixed",
}
NORMALIZATION = "normalization.json"  # pixel statistics of a run that measured them
MEASURED = ("data.pixel_mean", "data.pixel_std")
PLAIN = "plain"  # folder of the plain run that a run is compared with, inside its workdir


class WorkdirError(ValueError):
    """A workdir that cannot be used; the message is one line."""


def flatten(config: dict) -> dict[str, Any]:
    """Return nested settings as {"model.stem": "cifar", ...}, with lists for tuples as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config)).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def closest(name: str, names: list[str]) -> str:
    """Return a hint with the nearest known name; empty where none is near."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file atomically; only the first process does."""
    if not processes.is_main_process():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


@contextlib.contextmanager
def _writing(workdir: pathlib.Path) -> Iterator[None]:
    """Raise what the system refuses as WorkdirError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WorkdirError(f"cannot write to workdir {workdir}: {reason}") from None


class Finished:
    """Results of the parts of a long task, in a JSON file: a second start does the rest."""

    def __init__(self, path: pathlib.Path, about: Any):
        """Read the file; results about anything else than `about` (a JSON value) are dropped."""
        self.path, self.about = path, json.loads(json.dumps(about))
        saved = json.loads(path.read_text()) if path.is_file() else {}
        self.values = saved["values"] if saved.get("about") == self.about else {}

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of a part: from the file, or computed and saved."""
        if name not in self.values:
            self.values[name] = compute()
            write_json(self.path, {"about": self.about, "values": self.values})
        return self.values[name]


def open_workdir(path: str, config: ConfigDict, *, extend: bool = False) -> pathlib.Path:
    """Make the folder, or check that it holds a run of the same config.

    What a pre-training run of another config left before its first step is removed.

    Args:
        path: the folder.
        config: of this start.
        extend: allow more epochs than the run in the folder had; its cosine schedule changes.

    Raises:
        WorkdirError: it cannot be written to, or holds a run of another config (settings of
            `runtime`, `health` and FREE may differ).
    """
    workdir = _absolute(path)
    saved = workdir / "config.json"
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if saved.exists():
            try:
                before = flatten(json.loads(saved.read_text()))
            except (ValueError, AttributeError):  # neither UTF-8 nor JSON, or not an object
                raise WorkdirError(
                    f"{saved} is not readable as a config: is this another program's folder?"
                ) from None
            try:
                _check_same(workdir, before, flatten(config.to_dict()), extend)
            except WorkdirError as error:
                if not (before.get("task") == config.task == "pretrain" and _made_no_step(workdir)):
                    raise
                _start_over(workdir, str(error))
        apply_normalization(config, workdir)
        write_json(saved, config.to_dict())
    return workdir


def apply_normalization(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Give a config the measured pixel statistics that its workdir records, if any."""
    recorded = workdir / NORMALIZATION
    if config.task == "pretrain" and config.data.normalization == "measured" and recorded.exists():
        try:
            found = json.loads(recorded.read_text())
            config.data.update({key: tuple(found[key]) for key in ("pixel_mean", "pixel_std")})
        except (ValueError, KeyError, TypeError):
            raise WorkdirError(
                f"{recorded} is damaged: remove it, and the pixels are measured again"
            ) from None


def with_added(config: ConfigDict) -> ConfigDict:
    """Give an older run's config the settings added since, with the values it was run with."""
    for name, value in ADDED.items():
        group, _, key = name.rpartition(".")
        if group in config and key not in config[group]:
            config[group][key] = tuple(value) if isinstance(value, list) else value
    return config


@contextlib.contextmanager
def held(path: str) -> Iterator[None]:
    """Make a workdir and lock it against other runs.

    The system frees the lock however the process ends.

    Raises:
        WorkdirError: it cannot be made, or another run is in there.
    """
    workdir = _absolute(path)
    if not processes.is_main_process():
        yield
        return
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another run"
            raise WorkdirError(f"workdir {workdir} is in use by {owner}") from None
        except OSError as error:  # a file system without locks
            reason = error.strerror or error
            logging.warning("cannot lock %s (%s): do not start two runs in it", workdir, reason)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _absolute(path: str) -> pathlib.Path:
    return pathlib.Path(path).expanduser().absolute()


def abandon(path: pathlib.Path) -> None:
    """Undo `open_workdir` after a mistake, unless a run began in the folder."""
    entries = (*path.glob("*"), *path.glob("*/*"))
    began = any(entry.name in ("metrics.jsonl", "checkpoints") for entry in entries)
    if not began and processes.is_main_process():
        for name in ("config.json", COMMAND, NORMALIZATION, LOCK):
            (path / name).unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()


def _made_no_step(workdir: pathlib.Path) -> bool:
    """Return whether a run in a folder ended before its first step."""
    metrics = workdir / "metrics.jsonl"
    return (
        str(workdir) not in console.aliases  # a bucket's checkpoints are not here
        and metrics.exists()
        and not (workdir / "result.json").exists()
        and not any(workdir.glob("*/checkpoints"))  # a finished part, such as the plain run
        and all(saved.name.startswith("step_00000000") for saved in workdir.glob("checkpoints/*"))
        and all(line["step"] == 0 for line in _parsed(metrics))
    )


def _start_over(workdir: pathlib.Path, reason: str) -> None:
    if not processes.is_main_process():
        return
    logging.warning("%s; it made no step: starting over", reason)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    for name in ("metrics.jsonl", INIT_RECORD, NORMALIZATION):
        (workdir / name).unlink(missing_ok=True)


def _check_same(workdir: pathlib.Path, before: dict, now: dict, extend: bool) -> None:
    """Raise WorkdirError unless two flat configs say the same, where that matters."""
    if (task := before.get("task")) != now["task"]:
        raise WorkdirError(
            f"workdir {workdir} holds a run of config.task={task}: "
            f"give {now['task']} a folder of its own"
        )
    measured = before.get("data.normalization") == now.get("data.normalization") == "measured"
    free = FREE | set(MEASURED if measured else ())  # the recorded statistics are used
    differ = {}
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        unknown_then = name not in before and (new is False or ADDED.get(name) == new)
        if old == new or name.startswith(("runtime.", "health.")) or name in free or unknown_then:
            continue
        if name == "epochs" and extend and isinstance(old, int) and old < (new or 0):
            logging.warning(
                "extending from %d to %d epochs: the learning rate's cosine changes with it",
                old,
                new,
            )
            continue
        differ[name] = f"{name} was {old!r}, is {new!r}"
    if differ:
        hint = " (--extend allows more epochs)" if "epochs" in differ else ""
        listed = "; ".join(differ.values())
        raise WorkdirError(f"workdir {workdir} holds a run of another config: {listed}{hint}")


class Metrics:
    """Appends scalars to metrics.jsonl, a JSON object per line, and to loggers.

    A resumed run drops a torn last line, and the lines of steps that it will do again. What it
    measures again at the checkpoint's own step (the clusters of the epoch that begins there) is the
    same and is not written twice. Only the first process writes.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        loggers: Sequence[str],
        resume_step: int,
        config: ConfigDict | None = None,
    ):
        """Open the file and start the loggers.

        Args:
            workdir: of the run.
            loggers: names as in `hexa_jax.storage.loggers.PACKAGES`.
            resume_step: step that the run goes on from; 0 at its beginning.
            config: for loggers that show settings.

        Raises:
            LoggerError: a logger is not known or not installed.
        """
        self.path = workdir / "metrics.jsonl"
        self._file = None
        if not processes.is_main_process():
            return
        kept = [line for line in _parsed(self.path) if line["step"] <= resume_step]
        self._known = {frozenset(line) for line in kept if line["step"] == resume_step}
        self._resume_step = resume_step
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)
        settings = flatten(config.to_dict()) if config is not None else {}
        self._loggers = Loggers(loggers, workdir, settings, resume_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write scalars of one step; arrays of one element count as scalars."""
        numbers = {name: float(np.asarray(value)) for name, value in values.items()}
        if self._file is None:
            return
        if step == self._resume_step and {"step", *numbers} in self._known:
            return
        self._file.write(json.dumps({"step": step} | numbers) + "\n")
        self._loggers.write(step, numbers)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
            self._loggers.close()


def _parsed(path: pathlib.Path) -> list[dict]:
    """Return the lines of a metrics file without torn ones; none where there is no file."""
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                logging.warning("%s: dropped a torn line", path)
    return [line for line in lines if isinstance(line, dict) and "step" in line]
