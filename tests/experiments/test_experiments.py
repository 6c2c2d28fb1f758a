"""The paper's experiments as commands: what their grids train, that cells run once, and what the tables say."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from command_line import REPOSITORY, environment, finished, image_folder

from configs import common as pretraining
from configs.eval import common as evaluation
from hexa_jax.cli.command import parse_command
from hexa_jax.experiments import figures, tables
from hexa_jax.experiments.presets import GRIDS, METHODS, PRESETS
from hexa_jax.experiments.sweep import SHARED_RUNTIME, Cell, Entry, Outcome, Stage, gather, run_grid
from hexa_jax.methods import METHODS as METHOD_CLASSES
from hexa_jax.training.factory import make_schedule

SMALL = ("--config.data.shapes_count=64", "--config.linear.at_end=False", "--config.knn.every_epochs=0")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("figure", GRIDS)
def test_every_command_of_every_grid_is_understood(preset, figure, tmp_path):
    methods = tuple(PRESETS[preset].configs)
    assert set(METHODS[figure]) <= set(methods)
    entries = GRIDS[figure](preset, methods, [0])
    for cell in {entry.cell.name: entry.cell for entry in entries}.values():
        for stage in cell.stages:
            command = parse_command(["hexa", *stage.command(tmp_path, ())[3:]])
            assert command.config.seed == 0
            if stage.checkpoint is not None:
                assert command.config.checkpoint == str(tmp_path)
            else:
                make_schedule(command.config, 10)  # raises where a run is shorter than its warm-up


@pytest.mark.parametrize(
    ("preset", "count"), [("imagenet", len(METHOD_CLASSES) + 1), ("tiny", len(METHOD_CLASSES) + 1), ("cifar10", 8)]
)
def test_presets_have_every_method_and_simsiam(preset, count):
    methods = PRESETS[preset].configs
    assert len(methods) == count and methods.keys() - {"simsiam"} == METHOD_CLASSES.keys()


def test_probes_run_as_the_pre_training_is_told_to(tmp_path, monkeypatch):
    assert set(pretraining.get_config().runtime) & set(evaluation.get_config("linear").runtime) == SHARED_RUNTIME
    commands = []

    def child(words, **_):
        commands.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", child)
    shared, own = "--config.runtime.num_devices=1", ["--config.runtime.microbatches=2", "--config.data.limit=9"]
    run_grid(GRIDS["fig4"]("imagenet", ("deepcluster",), [0])[:1], tmp_path, [shared, *own])
    train, probe = commands
    assert train[-3:] == [shared, *own] and probe[-1] == shared and not set(own) & set(probe)


def test_grids_are_those_of_the_paper():
    fig2 = GRIDS["fig2"]("imagenet", ("moco", "deepcluster"), [0, 1, 2])
    assert len(fig2) == 2 * 6 * 3 and len({entry.cell.name for entry in fig2}) == 36
    moco, deepcluster = fig2[0].cell.stages, fig2[18].cell.stages
    assert "epochs=20" in moco[0].config and moco[0].settings["moco.momentum"] == 0.99
    assert "epochs=5" in deepcluster[0].config and deepcluster[0].settings["data.crop_size"] == (160, 96)
    assert moco[1].config == "eval/linear_imagenet.py:family=moco,epochs=1"
    fig4 = GRIDS["fig4"]("imagenet", ("deepcluster",), [0])
    cells = {(entry.factors["epsilon"], entry.factors["eta"]): entry.cell.name for entry in fig4}
    assert cells[1, 1] == cells[1, 3] == cells[3, 1] != cells[3, 3]  # one linf step moves by the smaller of the two
    assert "epochs=40" in fig4[0].cell.stages[0].config and "epochs=100" in fig4[0].cell.stages[1].config
    fig5 = GRIDS["fig5"]("imagenet", ("deepcluster",), [0])
    betas = [entry.factors["beta"] for entry in fig5]
    assert betas == ["plain"] + [
        f"Beta({a}, {b})" for a, b in zip((1, *[5] * 7), (1, 0.1, 0.5, 1, 2, 3, 4, 5), strict=True)
    ]


def test_the_claim_has_two_plain_runs_of_moco_one_of_the_others():
    entries = GRIDS["claim"]("cifar10", ("moco", "deepcluster"), [0, 1, 2])
    runs = {(entry.factors["method"], entry.factors["run"]): entry.cell.stages[0].settings for entry in entries}
    assert len(entries) == 15 and len({entry.cell.name for entry in entries}) == 15
    plain, published, hexa = (runs["moco", run] for run in ("plain", "plain, key momentum 0.999", "std+adv"))
    assert plain["scheme"] == published["scheme"] == "std" and hexa["scheme"] == "std+adv"
    assert (plain["moco.momentum"], published["moco.momentum"], hexa["moco.momentum"]) == (0.99, 0.999, 0.99)
    assert [run for method, run in runs if method == "deepcluster"] == ["plain", "std+adv"]
    assert all("epochs=200" in entry.cell.stages[0].config for entry in entries)


def outcome(scheme, seed, **values):
    cell = Cell(f"{scheme}-{seed}", ())
    return Outcome(Entry({"method": "moco", "scheme": scheme, "seed": seed}, cell), None, values, "")


def test_table_has_means_deviations_and_paired_differences():
    plain, hexa = [30.0, 34.0, 32.0], [33.0, 36.0, 36.0]
    outcomes = [outcome("std", seed, knn_accuracy=value) for seed, value in enumerate(plain)]
    outcomes += [outcome("std+adv", seed, knn_accuracy=value) for seed, value in enumerate(hexa)]
    outcomes.append(outcome("all", 7, knn_accuracy=40.0))  # no plain run with this seed
    rows = tables.summarise(outcomes, "knn_accuracy")
    assert rows["moco", "std"].mean == pytest.approx(32) and rows["moco", "std"].std == pytest.approx(
        np.std(plain, ddof=1)
    )
    interval = scipy.stats.ttest_rel(hexa, plain).confidence_interval(0.95)
    assert (
        tables.difference(rows["moco", "std+adv"], rows["moco", "std"])
        == f"+3.0 [{interval.low:+.1f}, {interval.high:+.1f}]"
    )
    text = tables.markdown(outcomes, dict.fromkeys(rows, ("moco", "std")))
    assert "| moco | std | 3 | 32.0 ± 2.0 |  |" in text
    assert "| moco | all | 1 | 40.0 | - |" in text


def experiment(workdir, *words):
    command = [sys.executable, "-m", "hexa_jax.experiments", *words, f"--workdir={workdir}", "--preset=tiny"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)


def test_a_grid_runs_once_and_goes_on_after_a_failure(tmp_path):
    words = ("fig4", "--methods=moco", *SMALL)
    # A cell that cannot run: its folder already holds another run's config.
    broken = tmp_path / "cells" / "moco-moves3-seed0"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text(json.dumps({"method": "simclr"}))
    done = tmp_path / "cells" / "moco-moves1-seed0"  # a finished cell, which is not run again
    done.mkdir()
    (done / "result.json").write_text(json.dumps({"knn_accuracy": 12.5}))
    first = experiment(tmp_path, *words)
    assert first.returncode == 1, first.stderr
    assert "cell moco-moves3-seed0 failed: exit code 2: hexa_jax: " in first.stdout
    (broken / "config.json").unlink()
    stamp = (tmp_path / "cells" / "moco-std-seed0" / "result.json").stat().st_mtime_ns
    second = experiment(tmp_path, *words)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "3 cells, 2 of them finished before" in second.stdout
    assert (tmp_path / "cells" / "moco-std-seed0" / "result.json").stat().st_mtime_ns == stamp
    with (tmp_path / "fig4.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epsilon"], row["eta"]) for row in rows] == [
        ("-", "-"),
        ("1", "1"),
        ("1", "3"),
        ("3", "1"),
        ("3", "3"),
    ]
    assert rows[1]["knn_accuracy"] == rows[2]["knn_accuracy"] == rows[3]["knn_accuracy"] == "12.5"
    assert float(rows[0]["knn_accuracy"]) > 0 and float(rows[4]["knn_accuracy"]) > 0
    assert "| moco | 3 | 3 | 1 |" in (tmp_path / "fig4.md").read_text()
    assert (tmp_path / "fig4.png").stat().st_size > 5000 and (tmp_path / "fig4.svg").exists()

    other = experiment(tmp_path, "fig4", "--methods=moco")
    assert other.returncode == 2 and "use another --workdir" in other.stderr


# Runs a command whose children are not started: each tells instead whether the parent has opened a device by then.
PARENT = """
import subprocess, sys
from jax._src import xla_bridge
from hexa_jax import main
from hexa_jax.experiments import __main__ as experiments

def child(words, **options):
    print("child started, device opened:", xla_bridge.backends_are_initialized(), flush=True)
    return subprocess.CompletedProcess(words, 3)

subprocess.run = child
program, *words = sys.argv[1:]
sys.exit({"experiments": experiments.main, "main": main.main}[program](words))
"""


def parent(program, *words):
    command = [sys.executable, "-c", PARENT, program, *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)


def test_an_experiment_leaves_the_accelerator_to_its_cells(tmp_path):
    done = parent("experiments", "fig4", "--methods=moco", f"--workdir={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("child started, device opened: False") == 3
    assert "device opened: True" not in done.stdout


def test_the_table_of_evaluations_leaves_the_accelerator_to_them(tmp_path):
    data = {"source": "shapes:train", "eval_source": "shapes:test"}
    words = [f"--config.data.cifar10.{name}={value}" for name, value in data.items()]
    config = f"--config={REPOSITORY}/configs/eval/all.py"
    run, _ = finished("moco")
    done = parent("main", "hexa", config, f"--config.checkpoint={run}", f"--workdir={tmp_path}", *words)
    assert done.returncode == 2 and "linear_cifar-cifar10-pre-trained: exit code 3" in done.stderr
    assert done.stdout.count("child started, device opened: False") == 6
    assert "device opened: True" not in done.stdout


def test_a_grid_that_has_not_ended_shows_what_it_has(tmp_path):
    entries = [Entry({"seed": seed}, Cell(f"cell{seed}", (Stage("tiny.py", {}),))) for seed in (0, 1)]
    (tmp_path / "cells" / "cell0").mkdir(parents=True)
    (tmp_path / "cells" / "cell0" / "result.json").write_text('{"knn_accuracy": 50.0}')
    tables.write_csv(gather(entries, tmp_path), tmp_path / "grid.csv")
    assert (tmp_path / "grid.csv").read_text().split() == [
        "seed,cell,knn_accuracy,failure",
        "0,cell0,50.0,",
        "1,cell1,,",
    ]


def test_a_grid_below_raw_pixels_says_so(tmp_path):
    def outcomes(best):
        values = {"knn_accuracy": best, "pixels_knn_accuracy": 14.5, "random_knn_accuracy": 10.0}
        return [
            Outcome(Entry({"method": "moco", "scheme": scheme, "seed": 0}, Cell(scheme, ())), tmp_path, values, "")
            for scheme in ("std", "std+adv")
        ]

    assert "No row's kNN is above that of raw pixels (14.5)" in tables.markdown(outcomes(10.0))
    assert "raw pixels (" not in tables.markdown(outcomes(20.0))
    png, svg = figures.fig2(outcomes(15.0), tmp_path)
    assert png.exists() and all(text in svg.read_text() for text in ("raw pixels", "axis cut"))


def test_cells_work_in_the_folder_of_the_user(tmp_path, monkeypatch):
    """Relative paths mean what they mean on the command line, and a `configs` that lies there is none of ours."""
    image_folder(tmp_path / "mine" / "images", count=12)
    (tmp_path / "mine" / "configs").mkdir()
    (tmp_path / "mine" / "configs" / "__init__.py").write_text("raise RuntimeError('of the user')")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    settings = {"data.source": "folder:images", "leave_one_out": True, "neighbours": "(1,)", "data.crop": 8}
    settings |= {"data.resize": 8, "random.backbone": "resnet10", "random.base_channels": 2}
    stage = Stage("eval/knn.py", settings | {"runtime.num_devices": 1}, checkpoint="random")
    (outcome,) = run_grid([Entry({"seed": 0}, Cell("cell", (stage,)))], tmp_path / "run")
    assert not outcome.failure and outcome.values["train_images"] == 12


@pytest.mark.slow
def test_gallery_shows_what_the_attack_does(tmp_path):
    done = experiment(tmp_path, "fig1", "--methods=swav", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("fig1_swav.png", "fig1_swav.svg", "fig1_swav_space.png", "fig1_swav_space.svg"):
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fig9",), "invalid choice: 'fig9'"),
        (("fig2", "--seeds=one"), "--seeds takes whole numbers"),
        (("fig2", "--methods=mocco"), "unknown method 'mocco'"),
        (("fig2", "--epochs=3"), "unknown argument '--epochs=3'"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, capsys):
    from hexa_jax.experiments.__main__ import main

    assert main([*words, f"--workdir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow  # what test_a_grid_runs_once_and_goes_on_after_a_failure does, with the figure of this grid
def test_the_claim_in_miniature(tmp_path):
    words = ("claim", "--methods=moco", "--seeds=0,1", "--config.data.shapes_count=64", "--config.knn.every_epochs=0")
    done = experiment(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "claim.md").read_text()
    for run in ("plain", "plain, key momentum 0.999", "std+adv"):
        assert f"| moco | {run} | 2 |" in table
    assert "kNN - plain" in table and (tmp_path / "claim.png").stat().st_size > 5000
