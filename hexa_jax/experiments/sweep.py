"""A grid of runs: each cell is a process of its own, and resumes.

Finished cells are skipped; failed ones are reported and left for next time.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hexa_jax.core import recipes
from hexa_jax.core.console import log
from hexa_jax.storage.gcs import is_remote

ROOT = pathlib.Path(__file__).resolve().parents[2]  # where this package is
# Settings `runtime.*` that pre-training and evaluations share.
SHARED_RUNTIME = frozenset(
    (
        "num_devices",
        "workers",
        "threads",
        "prefetch",
        "data_dir",
        "data_cache",
        "log_every",
        "loggers",
    )
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a cell.

    Attributes:
        config: file of a recipe, with its arguments.
        settings: overrides by dotted key.
        folder: workdir, relative to the cell's.
        checkpoint: folder of an earlier stage whose weights this one uses, relative to the cell's,
            or what is not a relative path (an absolute one, a URL, or "random"); None: it uses
            none.
    """

    config: str
    settings: Mapping[str, Any]
    folder: str = "."
    checkpoint: str | None = None

    def command(self, cell: pathlib.Path, extra: Sequence[str]) -> list[str]:
        """Words of the command; `extra` come last and win."""
        words = [f"--config={recipes.FOLDER / self.config}", f"--workdir={cell / self.folder}"]
        words += [f"--config.{name}={value}" for name, value in self.settings.items()]
        if self.checkpoint is not None:
            given = self.checkpoint == "random" or is_remote(self.checkpoint)
            words.append(
                f"--config.checkpoint={self.checkpoint if given else cell / self.checkpoint}"
            )
        return [sys.executable, "-m", "hexa_jax.main", *words, *extra]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is trained: a name, also its folder, and its stages; the first is pre-training."""

    name: str
    stages: tuple[Stage, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the result: its factors (method, seed, ...) and the cell that has its numbers."""

    factors: Mapping[str, Any]
    cell: Cell


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An entry with its numbers; `failure` is one line, empty when all stages ended well."""

    entry: Entry
    folder: pathlib.Path
    values: Mapping[str, float]
    failure: str


class GridError(ValueError):
    """A grid that cannot run in this folder; the message is one line."""


def run_grid(
    entries: Sequence[Entry],
    workdir: pathlib.Path,
    extra: Sequence[str] = (),
    ended: Callable[[Cell, Mapping[str, float]], None] | None = None,
) -> list[Outcome]:
    """Run what is not finished yet, then gather everything.

    Args:
        entries: rows of the result.
        workdir: of the experiment; cells are folders in its `cells/`.
        extra: words for every pre-training command, such as `--config.data.limit=5000`; those of
            `SHARED_RUNTIME` for the stages after it, too.
        ended: called with each cell that this call ran to a good end, and its numbers, before the
            next one starts.

    Raises:
        GridError: the folder holds the same cells with other overrides.
    """
    _check_same(workdir, list(extra))
    cells = {entry.cell.name: entry.cell for entry in entries}
    waiting = [cell for cell in cells.values() if not _finished(workdir, cell)]
    log(f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished before")
    failures, start = {}, time.monotonic()
    for number, cell in enumerate(waiting):
        left = (
            ""
            if not number
            else f", about {_minutes((time.monotonic() - start) / number * (len(waiting) - number))} left"
        )
        log(f"cell {number + 1} of {len(waiting)}: {cell.name}{left}")
        failures[cell.name] = _run(workdir, cell, extra)
        if failures[cell.name]:
            log(f"cell {cell.name} failed: {failures[cell.name]}")
        elif ended:
            ended(cell, _values(workdir / "cells" / cell.name, cell))
    return gather(entries, workdir, failures)


def gather(
    entries: Sequence[Entry], workdir: pathlib.Path, failures: Mapping[str, str] | None = None
) -> list[Outcome]:
    """Return each entry with the numbers that its cell has so far, whether it ended or not.

    Args:
        entries: rows of the result.
        workdir: of the experiment.
        failures: by the cell's name, what went wrong in one line.
    """
    outcomes = []
    for entry in entries:
        folder, failure = workdir / "cells" / entry.cell.name, (failures or {}).get(entry.cell.name)
        outcomes.append(Outcome(entry, folder, _values(folder, entry.cell), failure or ""))
    return outcomes


def _run(workdir: pathlib.Path, cell: Cell, extra: Sequence[str]) -> str:
    """Run a cell's stages that have no result yet; return what went wrong in one line."""
    folder = workdir / "cells" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    for position, stage in enumerate(cell.stages):
        if (folder / stage.folder / "result.json").exists():
            continue
        with (folder / "log.txt").open("ab") as log:
            words = stage.command(folder, extra if position == 0 else _for_evaluations(extra))
            code = subprocess.run(
                words, stdout=log, stderr=subprocess.STDOUT, env=_environment(), check=False
            ).returncode
        if code == 143:
            # the scheduler stops this process, too: cells go on from their checkpoints
            raise SystemExit(143)
        if code:
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
            return f"exit code {code}: {lines[-1] if lines else 'no output'}"
    return ""


def _for_evaluations(extra: Sequence[str]) -> list[str]:
    """Those of the words for pre-training that say how to run, and that evaluations know, too."""
    return [
        word
        for word in extra
        if word.partition("=")[0].removeprefix("--config.runtime.") in SHARED_RUNTIME
    ]


def _environment() -> dict[str, str]:
    """Return a cell's environment.

    It finds this very package and its configs from whatever folder the user works in.

    PYTHONSAFEPATH keeps that folder itself, which may well have modules of the same names, out of
    Python's search path.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _finished(workdir: pathlib.Path, cell: Cell) -> bool:
    return all(
        (workdir / "cells" / cell.name / stage.folder / "result.json").exists()
        for stage in cell.stages
    )


def _values(folder: pathlib.Path, cell: Cell) -> dict[str, float]:
    """The numbers of all stages; those of a later stage get its folder's name in front."""
    values: dict[str, float] = {}
    for stage in cell.stages:
        path = folder / stage.folder / "result.json"
        if path.exists():
            prefix = "" if stage.folder == "." else f"{stage.folder}_"
            values |= {prefix + name: value for name, value in json.loads(path.read_text()).items()}
    return values


def _check_same(workdir: pathlib.Path, extra: list[str]) -> None:
    """Results under one name must come from one set of overrides."""
    saved = workdir / "experiment.json"
    if saved.exists():
        before = json.loads(saved.read_text())["overrides"]
        if before != extra:
            raise GridError(
                f"{workdir} holds cells with the overrides {' '.join(before) or '(none)'}, not "
                f"{' '.join(extra) or '(none)'}: use another --workdir"
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps({"overrides": extra}) + "\n")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} s"
