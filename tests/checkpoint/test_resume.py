"""Stopping at any moment and starting again gives the uninterrupted run, bit for bit."""

import random
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from command_line import (
    EPOCHS,
    STEPS,
    arguments,
    begin,
    final_state,
    finish,
    finished,
    lines,
    run,
    run_until,
    start,
)
from same_run import check_same_run
from small import SmallRun, largest_difference, small_config

from hexa_jax import main
from hexa_jax.checkpoint.checkpointer import MANIFEST, Checkpoints


@pytest.fixture(scope="module", autouse=True)
def background():
    begin("deepcluster", "moco")


def checkpoints(workdir):
    """Folders of the complete checkpoints, oldest first."""
    return sorted(path.parent for path in (workdir / "checkpoints").glob(f"*/{MANIFEST}"))


@pytest.mark.parametrize("kind", ["deepcluster", pytest.param("moco", marks=pytest.mark.slow)])
def test_killed_then_terminated_then_finished(kind, tmp_path):
    expected, _ = finished(kind)
    words = arguments(kind, tmp_path / "run")

    process = start(words)  # kill -9 at a random moment; the save of step 6 has waited for that of step 3
    moment = random.randrange(7, 14)
    run_until(process, f"step {moment}/{STEPS} ")
    process.kill()
    assert finish(process).code == -signal.SIGKILL, f"killed after step {moment}"
    assert checkpoints(tmp_path / "run") and not (tmp_path / "run" / "result.json").exists()

    process = start(words)  # SIGTERM in the middle of an epoch, where no checkpoint is due
    run_until(process, "resuming at step")
    run_until(process, f"step 14/{STEPS} ")
    process.terminate()
    stopped = finish(process)
    assert stopped.code == 143, stopped.stderr
    *warnings, line = stopped.stderr.splitlines()
    assert all("skipping a checkpoint" in warning for warning in warnings)  # one that the kill cut in half
    saved = int(re.search(r"SIGTERM: saved step (\d+) in .*; the same command resumes it", line)[1])
    assert 14 <= saved < STEPS and checkpoints(tmp_path / "run")[-1].name == f"step_{saved:08}"

    ended = run(words)
    assert ended.code == 0 and not ended.stderr, ended.stderr
    assert f"resuming at step {saved} from" in ended.stdout
    check_same_run(tmp_path / "run", expected)


def test_truncated_newest_checkpoint_is_skipped(tmp_path):
    expected, _ = finished("deepcluster")
    shutil.copytree(expected, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    previous, newest = checkpoints(tmp_path / "run")[-2:]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    ended = run(arguments("deepcluster", tmp_path / "run"))
    assert ended.code == 0, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "skipping a checkpoint that is not intact" in line and str(newest) in line
    assert f"resuming at step {int(previous.name.split('_')[1])} from" in ended.stdout
    check_same_run(tmp_path / "run", expected)


def test_starting_a_finished_run_again_changes_nothing(tmp_path):
    expected, _ = finished("moco")
    shutil.copytree(expected, tmp_path / "run")
    ended = run(arguments("moco", tmp_path / "run", **{"runtime.log_every": 3, "runtime.prefetch": 2}))  # may differ
    assert ended.code == 0 and not ended.stderr, ended.stderr
    assert [path.name for path in checkpoints(tmp_path / "run")] == [path.name for path in checkpoints(expected)]
    check_same_run(tmp_path / "run", expected)


@pytest.mark.slow
def test_more_epochs_need_extend(tmp_path, capsys):
    expected, _ = finished("moco")
    shutil.copytree(expected, tmp_path / "run")
    words = arguments("moco", tmp_path / "run", epochs=EPOCHS + 1)
    before = (tmp_path / "run" / "config.json").read_text()
    assert main.main(["hexa", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"epochs was {EPOCHS}, is {EPOCHS + 1} (--extend allows more epochs)")
    assert (tmp_path / "run" / "config.json").read_text() == before

    ended = run([*words, "--extend"])
    assert ended.code == 0, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert f"extending from {EPOCHS} to {EPOCHS + 1} epochs: the learning rate's cosine changes" in line
    assert f"resuming at step {STEPS}" in ended.stdout
    assert final_state(tmp_path / "run")[0] == STEPS + 4
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, STEPS + 5))

    assert main.main(["hexa", *arguments("moco", tmp_path / "run"), "--extend"]) == 2  # fewer are not more
    assert f"epochs was {EPOCHS + 1}, is {EPOCHS}" in capsys.readouterr().err


def test_diverging_run_stops_and_keeps_what_was_good(tmp_path):
    overrides = {
        "optimizer.learning_rate": 1e15,
        "views.adversarial.weight": 0.0,
        "views.cutmix.weight": 0.0,
        "epochs": 1,
        "knn.every_epochs": 0,
        "runtime.checkpoint_every": 1,
    }
    ended = run(arguments("moco", tmp_path / "run", **overrides))
    assert ended.code == 1
    (line,) = ended.stderr.splitlines()
    found = re.search(r"the loss is (\S+) .* at step (\d); the last good checkpoint is step (\d) in ", line)
    assert found and int(found[3]) == int(found[2]) - 1, line
    assert "try a lower optimizer.learning_rate" in line
    step, state = final_state(tmp_path / "run")
    assert step == int(found[3]) and all(np.isfinite(value).all() for value in state.values())
    assert not (tmp_path / "run" / "result.json").exists()


def test_swav_goes_on_with_its_queue(tmp_path, x64):
    """The queue is in use from the third step on: what is saved must hold it, and the step that tells when it is full."""
    straight, stopped = (SmallRun(small_config("swav", scheme="std+adv")) for _ in range(2))
    expected = straight.train(4)
    with jax.set_mesh(stopped.trainer.mesh):
        stopped.train(3)
        saved = Checkpoints(tmp_path)
        saved.save(3, stopped.state)
        stopped.state = stopped.steps.init(0)
        _, stopped.state, _ = saved.restore_latest(stopped.trainer.state_shapes())
        batches = stopped.batches(start=stopped.steps_per_epoch + 3)
        state, _ = stopped.steps.train(stopped.state, next(batches), None)
    assert expected.method.step == 4 and np.abs(expected.method.queue).min() > 0
    for name, value in zip(expected._fields, expected, strict=True):
        assert largest_difference(value, jax.device_get(getattr(state, name))) == 0, name
