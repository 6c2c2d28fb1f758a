"""What a workdir's files say of a run: its settings, curves, results and circumstances."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
from typing import Any

from hexa_jax.core.console import with_aliases
from hexa_jax.storage.workdir import COMMAND, INIT_RECORD, WorkdirError, flatten

FACTS = "facts.json"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A pre-training run as its files tell it; what they do not hold is empty.

    Attributes:
        workdir: of the run.
        config: nested settings.
        lines: of metrics.jsonl, each with its step.
        results: of result.json, once the run has ended.
        command: `argv`, `recipe` and `changed` (key: [recipe's value, the run's]).
        facts: of `report/facts.json`, see `write_facts`.
        initial: of `init.json`: the weights that the run started from; empty for random ones.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    lines: list[dict[str, float]]
    results: dict[str, Any]
    command: dict[str, Any]
    facts: dict[str, Any]
    initial: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def address(self) -> str:
        """The workdir as its user knows it: the mirror of a bucket is shown as the bucket."""
        return with_aliases(str(self.workdir))

    @property
    def epochs(self) -> int:
        """That the run is to have."""
        return int(self.config.get("epochs", 0))

    @property
    def epoch(self) -> float:
        """That the run has reached."""
        return max((self.epoch_of(line) for line in self.lines), default=0.0)

    def epoch_of(self, line: dict[str, float]) -> float:
        """The epoch of a line of metrics, whole after its last step."""
        steps = self.facts.get("steps_per_epoch")
        return line["step"] / steps if steps else line.get("epoch", 0.0)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return (epoch, value) of a metric; of repeated epochs the last value counts."""
        return sorted(
            {self.epoch_of(line): line[name] for line in self.lines if name in line}.items()
        )

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        curve = self.curve(name)
        return curve[-1][1] if curve else None

    def names(self) -> list[str]:
        """Of all metrics, in alphabetical order."""
        return sorted({name for line in self.lines for name in line} - {"step", "epoch"})


def read_record(workdir: pathlib.Path, config: dict[str, Any] | None = None) -> RunRecord:
    """Read a workdir.

    Args:
        workdir: of a pre-training run.
        config: of the run, where it is known; by default that in `config.json`.

    Raises:
        WorkdirError: it is not that of a pre-training run, or has measured nothing yet.
    """
    config = config if config is not None else _json(workdir / "config.json")
    if not isinstance(config, dict) or config.get("task") != "pretrain":
        raise WorkdirError(f"{workdir} is not the workdir of a pre-training run")
    metrics = workdir / "metrics.jsonl"
    lines = []
    for text in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # torn: the run was killed while writing, or writes now
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return RunRecord(
        workdir=workdir,
        config=config,
        lines=lines,
        results=_json(workdir / "result.json") or {},
        command=_json(workdir / COMMAND) or {},
        facts=_json(workdir / "report" / FACTS) or {},
        initial=_json(workdir / INIT_RECORD) or {},
    )


def _json(path: pathlib.Path) -> Any:
    """The content of a JSON file; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_facts(folder: pathlib.Path, began: float, facts: dict[str, Any]) -> None:
    """Write `facts.json` in a report's folder, with the date, the time spent and the versions.

    Args:
        folder: the report's; facts of an earlier start of the run are in it.
        began: `time.time()` at which this start began.
        facts: of the run: `device`, `images`, `classes`, `class_names`, `test_images`,
            `parameters`, `steps_per_epoch`, `rank_limit`, `unreadable` (names of files); the page
            leaves out those that are None.
    """
    before = _json(folder / FACTS) or {}
    starts = before.get("seconds_by_start", {})
    starts[time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began))] = round(time.time() - began)
    found = {
        **facts,
        "seconds_by_start": starts,
        "host": platform.node(),
        "versions": versions(),
        "commit": commit(),
    }
    temporary = folder / f"{FACTS}.tmp"
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(temporary, folder / FACTS)


def versions() -> dict[str, str]:
    """Of Python and the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("hexa_jax", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this package's clone, with "+" where files differ from it; None for a wheel."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None

    def git(*words: str) -> str | None:
        try:
            ended = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return ended.stdout.strip() if ended.returncode == 0 else None

    number = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return number and number + ("+" if changed else "")


def changed_settings(record: RunRecord) -> dict[str, tuple[Any, Any]]:
    """{key: (recipe's value, the run's)} of what differs from the recipe, without `runtime`."""
    changed = record.command.get("changed", {})
    return {key: tuple(values) for key, values in changed.items() if not key.startswith("runtime.")}


def differing_settings(records: list[RunRecord]) -> dict[str, list[Any]]:
    """{key: value in each run} of the settings that are not the same in all runs."""
    flats = [flatten(record.config) for record in records]
    keys = sorted({key for flat in flats for key in flat})
    rows = {
        key: [flat.get(key) for flat in flats] for key in keys if not key.startswith("runtime.")
    }
    # A setting that an older run did not have stands for off.
    rows = {key: values for key, values in rows.items() if any(values)}
    return {key: values for key, values in rows.items() if any(v != values[0] for v in values)}
