"""Command line: `python -m hexa_jax.experiments study --workdir=DIR --part=NAME ...`.

Do hard examples help? Each arm is compared, seed by seed, with plain training at equal epochs, with
a second clean view (equal passes), with more steps (equal compute) and, where it attacks, with
noise of the same size.

--workdir    of one part; starting again goes on where the last start stopped
--part       dose        four strengths of augmentation; cut-mixed, blended and attacked views;
                         MoCo and DeepCluster
             clusters    cut-mixed views for DeepCluster and SwAV with 100 clusters
             small_data  2,560 images for 600 epochs
             schedule    attacks from the beginning, from epoch 1, ramped, adaptive, paired with
                         their own crop
             largest     50,000 images for 60 epochs
--stage      screen (seeds 0 to 2, the default), then confirm (seeds 10 to 17) for the arms that
             --arms names
--arms       comma-separated BASE-ARM; by default all are screened. Confirmed arms are the family
             of Holm's adjustment
--data       training and held-out source, comma-separated: arrays:TRAIN.npz,arrays:TEST.npz; by
             default tfds:cifar10
--preset     cifar10 (the default) or tiny (a few steps on drawn shapes, to try the command)

DIR has study.json, which declares a stage before its first run and may not change afterwards;
results/ with a small file per finished run; STAGE.md, STAGE.png and STAGE.svg with the comparisons;
claim.json with those of a finished confirmation; cells/ with the runs themselves. study.json and
results/ are all that a page needs: keep them under version control. A finished run is not trained
again where only they are left.

Exit codes: 0 everything is there, 1 a run failed (the rest was done), 2 a mistake or a changed
declaration, 143 stopped by SIGTERM.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from hexa_jax.core.arguments import Parser
from hexa_jax.core.console import log
from hexa_jax.data.source import DataError
from hexa_jax.data.sources import make_source
from hexa_jax.experiments.claims import claims
from hexa_jax.experiments.study import METRIC, PARTS, PRESETS, SECONDARY, STAGES, Study
from hexa_jax.experiments.study_page import complete, draw, page
from hexa_jax.experiments.sweep import ROOT, Cell, GridError, run_grid
from hexa_jax.storage.gcs import RemoteError, is_remote
from hexa_jax.storage.workdir import write_json

KEPT = (METRIC, SECONDARY, "step", "epochs")  # of a run's result


def main(argv: list[str]) -> int:
    """Run a stage of a study; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    parser = Parser("hexa_jax.experiments study", GridError)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--part", choices=sorted(PARTS), required=True)
    parser.add_argument("--stage", choices=STAGES, default="screen")
    parser.add_argument("--arms")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cifar10")
    parser.add_argument("--data")
    try:
        words = parser.parse_args(argv)
        if is_remote(words.workdir):
            raise GridError(f"--workdir={words.workdir}: a study needs a local folder")
        workdir = pathlib.Path(words.workdir).expanduser().absolute()
        study = Study(words.part, words.preset, _data(words.data))
        if words.stage == "confirm" and words.arms is None:
            raise GridError(
                "--stage=confirm needs --arms, the screened arms to confirm: they are one family "
                "of tests"
            )
        return _run(
            study, words.stage, None if words.arms is None else words.arms.split(","), workdir
        )
    except (GridError, DataError, RemoteError) as error:
        print(f"hexa_jax.experiments: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"hexa_jax.experiments: {error.filename or 'output'}: {error.strerror or error}",
            file=sys.stderr,
        )
        return 2


def _data(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    sources = text.split(",")
    if len(sources) != 2 or not all(sources):
        raise GridError(
            f"--data={text!r} must be two sources: --data=arrays:TRAIN.npz,arrays:TEST.npz"
        )
    return sources[0], sources[1]


def _run(study: Study, stage: str, chosen: list[str] | None, workdir: pathlib.Path) -> int:
    runs, trials = study.plan(chosen)
    declaration = study.declaration(stage, runs, trials, commit())
    declared = _read(workdir / "study.json")
    if stage == "confirm":
        _check_screened(declaration, declared.get("screen"), workdir)
    if stage in declared:
        _check_same(declaration, declared[stage], f"{workdir / 'study.json'}, {stage}")
    else:
        for other, before in declared.items():
            same = {key: declaration[key] for key in ("part", "preset", "data")}
            _check_same(
                same, {key: before[key] for key in same}, f"{workdir / 'study.json'}, {other}"
            )
        _check_data(study)
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "study.json", {**declared, stage: declaration})
    screened = len(declared.get("screen", declaration)["arms"])
    entries = study.entries(stage, runs)
    cells = {entry.cell.name: entry.cell for entry in entries}
    for cell in cells.values():
        _reconcile(workdir, cell)
    results = {name: _read(_result(workdir, name)) for name in cells}

    def write_page() -> str:
        text = page(declaration, results, stage, screened)
        (workdir / f"{stage}.md").write_text(text)
        return text

    def ended(cell: Cell, values: Mapping[str, float]) -> None:
        results[cell.name] = _keep(workdir, cell, values)
        write_page()

    # Cells that differ in their seed alone are one program: compiled once for all of them.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "compiled"))
    outcomes = run_grid(entries, workdir, ended=ended)
    log(write_page())
    paths = draw(declaration, results, stage, workdir)
    if stage == "confirm" and complete(declaration, results):
        words = ["python", "-m", "hexa_jax.experiments", "study", f"--part={study.part}"]
        words += [
            f"--preset={study.preset}",
            f"--stage={stage}",
            f"--arms={','.join(chosen or ())}",
        ]
        words += [f"--data={','.join(declaration['data'])}"]
        paths.append(workdir / "claim.json")
        write_json(paths[-1], claims(study, declaration, results, words))
    for path in paths:
        log(str(path))
    failed = [outcome for outcome in outcomes if outcome.failure]
    for outcome in failed:
        log(f"failed: {outcome.entry.cell.name}: {outcome.failure}")
    return 1 if failed else 0


# ---- The declaration -----------------------------------------------------------------------------


def commit() -> str:
    """Return the last commit that touched what runs compute, with a digest of changes on top.

    "unknown" outside of a clone.

    Commits of results or documentation leave it as it is.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words, "--", "hexa_jax", "configs"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        last, changes = git("log", "-1", "--format=%h"), git("diff", "HEAD")
        # Which changes they are, so that a run does not go on with others.
        return (
            last + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:7]}" if changes else "")
        ) or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _check_same(now: Mapping[str, Any], before: Mapping[str, Any], where: str) -> None:
    """Raises GridError, one line, at the first difference."""
    for key in dict.fromkeys([*now, *before]):  # what is told first: part, preset, data, ..., runs
        if now.get(key) == before.get(key):
            continue
        if key == "arms" and now[key].keys() != before.get(key, {}).keys():
            arms = (", ".join(sorted(names)) for names in (before.get(key, {}), now[key]))
            raise GridError(
                "{} declares the arms {}, now they are {}: use another --workdir".format(
                    where, *arms
                )
            )
        if isinstance(now.get(key), dict) and isinstance(before.get(key), dict):
            _check_same(now[key], before[key], f"{where}: {key}")
        raise GridError(
            f"{where} declares {key} {_short(before.get(key))}, now it is {_short(now.get(key))}: "
            "use another --workdir"
        )


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_screened(
    declaration: Mapping[str, Any], screen: Mapping[str, Any] | None, workdir: pathlib.Path
) -> None:
    """Check that an arm to confirm was screened to its end with these settings in this folder.

    Raises:
        GridError: it was not.
    """
    if screen is None:
        raise GridError(f"{workdir} has no screening yet: run it without --stage=confirm")
    for name, trial in declaration["arms"].items():
        if name not in screen["arms"]:
            raise GridError(f"arm {name!r} was not screened: {', '.join(screen['arms'])} were")
        needed = [run for key, run in trial.items() if key != "name" and run]
        for run in needed:
            now, before = declaration["runs"][run], screen["runs"].get(run, {})
            _check_same(now, before, f"{workdir / 'study.json'}, screen: {run}")
        missing = [
            f"{run}-seed{seed}"
            for run in needed
            for seed in screen["seeds"]
            if not _result(workdir, f"{run}-seed{seed}").exists()
        ]
        if missing:
            raise GridError(f"arm {name!r} is not screened yet: {missing[0]} is not finished")


def _check_data(study: Study) -> None:
    """Raises DataError or GridError where the first run would find no data, or too few."""
    preset, images = PRESETS[study.preset], PRESETS[study.preset].sizes[study.part].images
    train, test = study.data or preset.data
    if len(make_source(train)) < images:
        raise GridError(
            f"{train} has {len(make_source(train))} images, {study.part} needs {images}"
        )
    make_source(test)


# ---- Finished cells ------------------------------------------------------------------------------


def _result(workdir: pathlib.Path, name: str) -> pathlib.Path:
    return workdir / "results" / f"{name}.json"


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise GridError(f"{path} is not JSON: move it away, or restore it") from None


def _keep(workdir: pathlib.Path, cell: Cell, values: Mapping[str, float]) -> dict[str, float]:
    kept = {name: values[name] for name in KEPT if name in values}
    path = _result(workdir, cell.name)
    path.parent.mkdir(exist_ok=True)
    write_json(path, kept)
    return kept


def _reconcile(workdir: pathlib.Path, cell: Cell) -> None:
    """Make a cell's folder and its small file agree.

    Either may be missing, after a kill or in a fresh clone.
    """
    own, small = workdir / "cells" / cell.name / "result.json", _result(workdir, cell.name)
    if own.exists() and not small.exists():
        _keep(workdir, cell, _read(own))
    elif small.exists() and not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        write_json(own, _read(small))
