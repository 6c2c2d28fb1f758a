"""Whether hard examples help, as a command: arms with their controls, screening apart from confirmation, resuming."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from command_line import environment

from hexa_jax.cli.command import parse_command
from hexa_jax.experiments import study_command, sweep
from hexa_jax.experiments.__main__ import main
from hexa_jax.experiments.study import PARTS, PRESETS, SEEDS, STAGES, Base, Study, longer_epochs
from hexa_jax.experiments.study_page import page
from hexa_jax.experiments.sweep import GridError
from hexa_jax.training.factory import make_trainer

WHOLE = [Study(part, "cifar10") for part in PARTS]


# ---- What is declared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("part", PARTS)
def test_every_run_is_a_command_that_can_train(part, preset, tmp_path):
    study = Study(part, preset)
    runs, _ = study.plan()
    for run in runs.values():
        entry = next(entry for entry in study.entries("screen", {run.name: run}))
        (stage,) = entry.cell.stages
        config = parse_command(["hexa", *stage.command(tmp_path, ())[3:]]).config
        size = PRESETS[preset].sizes[part]
        trainer = make_trainer(config, size.images, jax.devices()[:1])
        assert config.data.limit == size.images and config.data.eval_source and config.linear.at_end
        assert config.views.average and config.eval_statistics == "reestimated"
        assert trainer.spec.steps_per_epoch == size.images // config.batch_size
        if preset == "cifar10":
            assert config.model.stem == "small" and config.knn.test_limit == 0 and config.knn.neighbours == 200
            assert (config.optimizer.name, config.optimizer.final_learning_rate) == ("adam", 0)
            assert config.method != "moco" or config.bn_group_size == 32


def test_the_base_setting_takes_fifteen_hundred_steps(tmp_path):
    study = Study("clusters", "cifar10")
    entry = study.entries("screen", study.plan()[0])[0]
    config = parse_command(["hexa", *entry.cell.stages[0].command(tmp_path, ())[3:]]).config
    assert make_trainer(config, 12_800, jax.devices()[:1]).spec.total_steps == 1500


@pytest.mark.parametrize("study", WHOLE, ids=PARTS)
def test_equal_cells_are_trained_once_and_others_not_confused(study):
    runs, trials = study.plan()
    contents = [json.dumps([run.config, run.settings], sort_keys=True) for run in runs.values()]
    assert len(set(contents)) == len(contents)  # no two names for one run
    needed = {name for trial in trials for name in (trial.arm, trial.plain, trial.extra, trial.longer, trial.noise)}
    assert needed - {None} == set(runs)
    entries = study.entries("screen", runs)
    assert len({entry.cell.name for entry in entries}) == len(entries) == 3 * len(runs)
    # A name stands for one run, from whatever arms one asks for it.
    for name in study.arms:
        for run in study.plan([name])[0].values():
            assert runs[run.name] == run


def test_controls_differ_from_their_arm_in_what_they_control_alone():
    study = Study("dose", "cifar10")
    runs, trials = study.plan()
    assert len(trials) == 2 * 4 * 4
    for trial in trials:
        arm, plain, extra, longer = (runs[name] for name in (trial.arm, trial.plain, trial.extra, trial.longer))
        changed = {key for key in arm.settings if arm.settings[key] != plain.settings.get(key)}
        assert changed <= {"scheme", "views.epsilon", "views.step_size"} and arm.config == plain.config == extra.config
        assert extra.settings == {**plain.settings, "scheme": "std+extra"}
        assert longer.settings == plain.settings and longer.config != plain.config
        if trial.noise:
            assert runs[trial.noise].settings == {**arm.settings, "scheme": "std+noise"}
        assert (trial.noise is None) == ("adv" not in arm.settings["scheme"])


def test_noise_keeps_the_schedule_of_its_attack():
    runs, trials = Study("schedule", "cifar10").plan()
    for trial in trials:
        for field in ("start_epoch", "ramp_epochs"):
            attack, noise = runs[trial.arm].settings, runs[trial.noise].settings
            assert attack.get(f"views.adversarial.{field}") == noise.get(f"views.noise.{field}")
    ramped = next(trial for trial in trials if trial.name == "moco-adv1-ramped")
    assert ramped.noise == "moco-noise1-from1-ramp5" and runs[ramped.arm].settings["views.adversarial.ramp_epochs"] == 5


def test_equal_compute_by_hand():
    moco, clusters = Base("moco", "moco", {}, ()), Base("swav", "swav", {}, ())
    arms = {arm.name: arm for base in (*PARTS["dose"], *PARTS["schedule"]) for arm in base.arms}
    # MoCo: query 3, key 1; a cut-mixed view adds 3: 15 epochs cost 15 * 7 / 4 = 26.25.
    assert longer_epochs(moco, arms["cmx"], 15) == 27
    assert longer_epochs(clusters, arms["cmx"], 15) == 30  # two crops: 6, and 6 more
    assert longer_epochs(moco, arms["adv1"], 16) == 36  # 4, and 2 + 3 more
    assert longer_epochs(moco, arms["adv1-from1"], 17) == 37  # 17 plain epochs and 16 * 5 / 4 = 20


def test_no_seed_is_in_two_stages_and_pairs_are_whole():
    assert SEEDS == {"screen": (0, 1, 2), "confirm": (10, 11, 12, 13, 14, 15, 16, 17)}
    for preset in PRESETS.values():
        assert not set(preset.seeds["screen"]) & set(preset.seeds["confirm"])
    for stage in STAGES:
        study = Study("schedule", "cifar10")
        runs, _ = study.plan()
        seeds = [entry.factors["seed"] for entry in study.entries(stage, runs)]
        assert seeds == sorted(seeds) and seeds.count(seeds[0]) == len(runs)


# ---- The command, with runs that cost nothing ------------------------------------------------------------------------


class Trained:
    """Stands for the runs' processes: writes what a run would, by rule; counts and can stop as a scheduler does."""

    def __init__(self):
        self.names, self.stop_after, self.broken = [], None, ()

    def __call__(self, words, **options):
        settings = dict(word.split("=", 1) for word in words if word.startswith("--"))
        folder = pathlib.Path(settings["--workdir"])
        if self.stop_after is not None and len(self.names) >= self.stop_after:
            return subprocess.CompletedProcess(words, 143)
        if folder.name in self.broken:
            return subprocess.CompletedProcess(words, 2)
        self.names.append(folder.name)
        seed, scheme = int(settings["--config.seed"]), settings["--config.scheme"]
        rng = np.random.default_rng([seed, len(folder.name)])
        # Seeds differ by points, pairs by tenths; cut-mixed views gain two points, blended and longer ones nothing.
        value = 40 + 3 * np.sin(seed) + 0.2 * rng.normal() + (2 if scheme == "std+cmx" else 0)
        (folder / "result.json").write_text(
            json.dumps({"knn_accuracy": value, "linear_accuracy": value + 3, "step": 9, "epochs": 1, "other": 1})
        )
        return subprocess.CompletedProcess(words, 0)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """No run is trained and no data are read; the commit is always the same."""
    program = Trained()
    monkeypatch.setattr(sweep.subprocess, "run", program)
    monkeypatch.setattr(study_command, "commit", lambda: "abc1234")
    monkeypatch.setattr(study_command, "_check_data", lambda study: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    return program


def command(workdir, *words, part="small_data"):
    return main(["study", f"--workdir={workdir}", f"--part={part}", *words])


def refused(capsys, workdir, *words, **options):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert command(workdir, *words, **options) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


def test_screen_then_confirm(trained, tmp_path, capsys):
    assert command(tmp_path) == 0
    screen = json.loads((tmp_path / "study.json").read_text())["screen"]
    assert screen["seeds"] == [0, 1, 2] and screen["commit"] == "abc1234" and screen["metric"] == "knn_accuracy"
    assert list(screen["arms"]) == ["deepcluster-cmx", "deepcluster-mixup", "moco-cmx", "moco-mixup"]
    assert len(trained.names) == 3 * len(screen["runs"]) == 3 * 2 * 5
    text = (tmp_path / "screen.md").read_text()
    assert "30 of 30 cells" in text and "4 arms tried" in text and "verdict" not in text and "helps" not in text

    assert command(tmp_path, "--stage=confirm", "--arms=moco-cmx,moco-mixup") == 0
    assert len(trained.names) == 30 + 8 * 5
    text = (tmp_path / "confirm.md").read_text()
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| moco-")}
    assert rows["moco-cmx"].endswith(" helps; worth its cost |") and " 8 |" in rows["moco-cmx"]
    assert " not shown (half-width 0." in rows["moco-mixup"]
    assert "2 of 4 screened arms, which are the family" in text
    claimed = {(one["arm"], one["control"]): one for one in json.loads((tmp_path / "claim.json").read_text())}
    assert list(claimed) == [(arm, key) for arm in ("moco-cmx", "moco-mixup") for key in ("EE", "EP", "EC")]
    helps, equal = claimed["moco-cmx", "EE"], claimed["moco-mixup", "EE"]
    assert helps["low"] > 1 and 1.5 < helps["difference"] < 2.5 and helps["high"] < 3 and helps["p_holm"] < 0.001
    assert equal["low"] < 0 < equal["high"] and helps["seeds"] == list(range(10, 18)) and helps["commit"] == "abc1234"
    # MoCo: query 3 and key 1 a step, a second view 3: 7 for 4; epochs are rounded up, from 1050 to 1050.
    assert [claimed["moco-cmx", key]["passes_ratio"] for key in ("EE", "EP", "EC")] == [1.75, 1, 1]
    assert helps["control_run"] == "moco-std" and "--stage=confirm --arms=moco-cmx,moco-mixup" in helps["command"]
    for name in ("screen", "confirm"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000 and (tmp_path / f"{name}.svg").exists()


def test_a_stopped_night_leaves_whole_pairs_and_goes_on(trained, tmp_path):
    trained.stop_after = 13  # of ten runs a seed
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path)
    assert stopped.value.code == 143
    kept = sorted(path.stem for path in (tmp_path / "results").iterdir())
    assert len(kept) == 13 and sum(name.endswith("-seed0") for name in kept) == 10
    assert "13 of 30 cells" in (tmp_path / "screen.md").read_text()
    trained.stop_after = None
    assert command(tmp_path) == 0
    assert len(trained.names) == len(set(trained.names)) == 30


def test_the_small_files_alone_are_enough(trained, tmp_path):
    """As in a fresh clone that has study.json and results/ but none of the runs."""
    assert command(tmp_path / "a") == 0
    (tmp_path / "b").mkdir()
    for name in ("study.json", "results"):
        (tmp_path / "a" / name).rename(tmp_path / "b" / name)
    assert command(tmp_path / "b") == 0
    assert len(trained.names) == 30
    assert (tmp_path / "b" / "screen.md").read_text() == (tmp_path / "a" / "screen.md").read_text()
    size = sum(path.stat().st_size for path in (tmp_path / "b" / "results").iterdir())
    assert size < 30 * 200


def test_a_result_that_was_not_kept_before_a_kill_is_kept_by_the_next_start(trained, tmp_path):
    assert command(tmp_path) == 0
    lost = tmp_path / "results" / "moco-cmx-seed1.json"
    content = lost.read_text()
    lost.unlink()
    assert command(tmp_path) == 0
    assert lost.read_text() == content and len(trained.names) == 30


def test_a_failed_run_leaves_the_others_and_is_tried_again(trained, tmp_path, capsys):
    trained.broken = ("moco-cmx-seed2",)
    assert command(tmp_path) == 1
    assert "failed: moco-cmx-seed2: exit code 2" in capsys.readouterr().out
    assert "29 of 30 cells" in (tmp_path / "screen.md").read_text()
    trained.broken = ()
    assert command(tmp_path) == 0 and "30 of 30 cells" in (tmp_path / "screen.md").read_text()


def test_no_verdict_before_all_seeds_are_in(trained, tmp_path):
    assert command(tmp_path) == 0
    trained.stop_after = 30 + 11
    with pytest.raises(SystemExit):
        command(tmp_path, "--stage=confirm", "--arms=moco-cmx")
    text = (tmp_path / "confirm.md").read_text()
    assert "11 of 32 cells" in text and "helps" not in text and "p (Holm)" not in text


def test_a_changed_declaration_is_refused(trained, tmp_path, capsys, monkeypatch):
    assert command(tmp_path, "--arms=moco-cmx") == 0
    where = f"hexa_jax.experiments: {tmp_path / 'study.json'}, screen"
    line = refused(capsys, tmp_path, "--arms=moco-mixup")
    assert line == f"{where} declares the arms moco-cmx, now they are moco-mixup: use another --workdir"
    line = refused(capsys, tmp_path, "--arms=moco-cmx", "--data=arrays:a.npz,arrays:b.npz")
    assert line.startswith(f'{where} declares data ["tfds:cifar10:train"') and "arrays:a.npz" in line
    assert 'declares part "small_data", now it is "schedule"' in refused(capsys, tmp_path, part="schedule")
    monkeypatch.setattr(study_command, "commit", lambda: "def5678")
    line = refused(capsys, tmp_path, "--arms=moco-cmx")
    assert line == f'{where} declares commit "abc1234", now it is "def5678": use another --workdir'
    assert len(trained.names) == 3 * 4


def test_a_changed_setting_is_refused(trained, tmp_path, capsys):
    assert command(tmp_path) == 0
    path = tmp_path / "study.json"
    declared = json.loads(path.read_text())
    declared["screen"]["runs"]["moco-cmx"]["settings"]["optimizer.learning_rate"] = 0.01
    path.write_text(json.dumps(declared))
    expected = "runs: moco-cmx: settings declares optimizer.learning_rate 0.01, now it is 0.001"
    assert expected in refused(capsys, tmp_path)
    # Nor may an arm be confirmed with other settings than it was screened with.
    line = refused(capsys, tmp_path, "--stage=confirm", "--arms=moco-cmx")
    assert "screen: moco-cmx: settings declares optimizer.learning_rate 0.01" in line
    path.write_text("{")
    assert f"{path} is not JSON" in refused(capsys, tmp_path)


def test_only_screened_arms_are_confirmed(trained, tmp_path, capsys):
    confirm = "--stage=confirm"
    assert "has no screening yet" in refused(capsys, tmp_path, confirm, "--arms=moco-cmx")
    assert command(tmp_path, "--arms=moco-cmx") == 0
    assert "arm 'moco-mixup' was not screened" in refused(capsys, tmp_path, confirm, "--arms=moco-mixup")
    (tmp_path / "results" / "moco-extra-seed2.json").unlink()
    line = refused(capsys, tmp_path, confirm, "--arms=moco-cmx")
    assert "arm 'moco-cmx' is not screened yet: moco-extra-seed2 is not finished" in line
    assert len(trained.names) == 3 * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stage=confirm",), "--stage=confirm needs --arms"),
        (("--arms=moco-adv",), "unknown arm 'moco-adv': small_data has moco-cmx, moco-mixup, deepcluster-cmx"),
        (("--arms=",), "unknown arm ''"),
        (("--arms=moco-cmx,moco-cmx",), "names an arm twice"),
        (("--seeds=3",), "unrecognized arguments: --seeds=3"),
        (("--config.epochs=3",), "unrecognized arguments"),
        (("--stage=look",), "invalid choice: 'look'"),
        (("--data=arrays:a.npz",), "must be two sources"),
        (("--data=arrays:/nowhere.npz,arrays:/nowhere.npz",), "/nowhere.npz"),
        (("--data=shapes:train,shapes:tests",), "tests"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, capsys):
    assert message in refused(capsys, tmp_path / "new", *words)
    assert not (tmp_path / "new").exists()


def test_too_few_images_are_one_line(tmp_path, capsys):
    arrays = {"images": np.zeros((20, 32, 32, 3), np.uint8), "labels": np.arange(20) % 10}
    np.savez(tmp_path / "few.npz", **arrays)
    source = f"arrays:{tmp_path / 'few.npz'}"
    line = refused(capsys, tmp_path / "new", f"--data={source},{source}")
    assert line == f"hexa_jax.experiments: {source} has 20 images, small_data needs 2560"


def test_a_page_without_results_says_so():
    study = Study("schedule", "cifar10")
    runs, trials = study.plan()
    text = page(study.declaration("confirm", runs, trials, "abc"), {}, "confirm", 7)
    assert "0 of " in text and "| moco-adv1 | 0 | - | - | - | - | - | - | - |" in text
    with pytest.raises(GridError, match="unknown arm"):
        study.plan(["moco-cmx"])


# ---- The command, with runs ------------------------------------------------------------------------------------------


def start(workdir, *words):
    command = [sys.executable, "-m", "hexa_jax.experiments", "study", f"--workdir={workdir}", "--preset=tiny"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([*command, "--part=small_data", *words], env=environment(), **options)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_a_stage_is_killed_and_goes_on(tmp_path):
    first = start(tmp_path)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("results/*.json")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("results/*.json")}
    assert "4 cells, 1 of them finished before" in finish(start(tmp_path))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("results/*.json")}
    assert {name: result["epochs"] for name, result in results.items()} == {
        "moco-std-seed0": 2,
        "moco-extra-seed0": 2,
        "moco-std-4epochs-seed0": 4,
        "moco-cmx-seed0": 2,
    }
    assert all(0 < result["knn_accuracy"] <= 100 for result in results.values())
    whole = json.loads((tmp_path / "cells" / "moco-cmx-seed0" / "result.json").read_text())
    assert not any(name.startswith("pixels_") for name in whole)  # the same for all: not measured again by each
    assert "| moco-cmx | 1 |" in (tmp_path / "screen.md").read_text()


@pytest.mark.slow  # the logic of a confirmation is above; here its runs are real ones
def test_a_confirmation_with_real_runs(tmp_path):
    finish(start(tmp_path))
    output = finish(start(tmp_path, "--stage=confirm", "--arms=moco-cmx"))
    assert "8 cells, 0 of them finished before" in output
    text = (tmp_path / "confirm.md").read_text()
    assert "8 of 8 cells; seeds 10, 11" in text and "verdict" in text
