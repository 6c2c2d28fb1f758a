"""Faults while a run trains: slow data, numbers that are none, a clock that jumps, storage that fails for a while.

Each ends with the parameters of a run that nobody disturbed, bit for bit, or with one clear line from which the same command
goes on to them. All runs are in this process and share one compiled step.
"""

import contextlib
import errno
import io
import logging
import math
import os
import random
import re
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
from command_line import arguments, final_state, lines

from hexa_jax import main
from hexa_jax.checkpoint import checkpointer
from hexa_jax.checkpoint.checkpointer import Checkpoints
from hexa_jax.data.shapes import ShapesSource
from hexa_jax.training import loop, step_report
from hexa_jax.training import run as run_module
from hexa_jax.training.step import Trainer

STEPS, EVERY = 16, 2
SETTINGS = {
    "epochs": 4,
    "views.adversarial.weight": 0.0,
    "views.cutmix.weight": 0.0,
    "knn.every_epochs": 0,
    "runtime.checkpoint_every": EVERY,
}
PLANTED = -77  # a label, which no method reads: where a batch has it, gradients are NaN


class Train:
    """The compiled step; `before` holds what to do to (state, batch) when so many steps are done."""

    def __init__(self, function):
        self.function, self.before = function, {}

    def __call__(self, state, batch, data):
        change = self.before.get(int(state.step), lambda state, batch: (state, batch))
        return self.function(*change(state, batch), data)


@pytest.fixture(scope="module")
def programs():
    """Compiles once for all runs, with a place to plant NaN in the gradients; leaves out the evaluation at the end."""
    steps, gradients, build = [], Trainer._reduced_gradients, Trainer.compile

    def planted(self, params, inputs, rngs, data):
        result = gradients(self, params, inputs, rngs, data)
        wrong = jax.numpy.where(jax.numpy.any(inputs.batch.label == PLANTED), jax.numpy.nan, 0)
        return result._replace(params=jax.tree.map(lambda g: g + wrong.astype(g.dtype), result.params))

    def build_once(self):
        if not steps:
            built = build(self)
            steps.append(built._replace(train=Train(built.train)))
        return steps[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_reduced_gradients", planted)
        patch.setattr(Trainer, "compile", build_once)
        patch.setattr(run_module, "compile_to_fit", lambda config, trainer, source: (trainer, trainer.compile()))
        patch.setattr(run_module, "make_probe", lambda *_: None)
        patch.setattr(loop, "_finish", lambda run, *_: run.checkpoints.wait())
        yield steps


@pytest.fixture
def run(programs):
    """Runs the command in a workdir; returns exit code, stdout and the lines of stderr."""

    def call(workdir, before=(), **overrides):
        output, errors, handlers = io.StringIO(), io.StringIO(), logging.root.handlers[:]
        if programs:
            programs[0].train.before = dict(before)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = main.main(["hexa", *arguments("moco", workdir, **SETTINGS, **overrides)])
        finally:
            logging.root.handlers[:] = handlers
        return types.SimpleNamespace(code=code, stdout=output.getvalue(), stderr=errors.getvalue().splitlines())

    return call


@pytest.fixture(scope="module")
def undisturbed(programs, tmp_path_factory):
    """The workdir of a run that nobody disturbed; to be read or copied."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(["hexa", *arguments("moco", workdir, **SETTINGS)]) == 0
    return workdir


def check_same(workdir, undisturbed):
    """Parameters, statistics, optimiser and queue, bit for bit; each step's loss, once."""
    (step, state), (wanted_step, wanted) = final_state(workdir), final_state(undisturbed)
    assert step == wanted_step == STEPS and state.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(state[name], leaf, err_msg=name)
    losses = [
        [(line["step"], line["loss"]) for line in lines(folder) if "loss" in line] for folder in (workdir, undisturbed)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


# ---- input ----


def test_a_slow_source_changes_nothing_but_is_told(run, undisturbed, tmp_path, monkeypatch):
    read, rng, number = ShapesSource.__getitem__, random.Random(0), iter(range(10**6))

    def slowly(self, index):
        time.sleep(1.5 if next(number) == 150 else rng.choice((0, 0, 0.001, 0.004)))
        return read(self, index)

    monkeypatch.setattr(ShapesSource, "__getitem__", slowly)
    ended = run(tmp_path, **{"runtime.threads": 1, "runtime.prefetch": 1})
    assert ended.code == 0 and not ended.stderr
    check_same(tmp_path, undisturbed)
    waits = [line["input_wait"] for line in lines(tmp_path) if "input_wait" in line]
    assert all(0 <= share <= 1 for share in waits) and max(waits) > 0.5, waits
    told = [line for line in ended.stdout.splitlines() if "waited for input" in line]
    assert f"waited for input {max(waits):.0%} of the time" in "\n".join(told)
    assert len(told) == sum(share > step_report.STARVED for share in waits)


# ---- numbers ----


def spoil(tree):
    """The tree with a NaN in its first array of floats."""
    leaves, structure = jax.tree.flatten(tree)
    first = next(
        i for i, leaf in enumerate(leaves) if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) and leaf.ndim
    )
    leaves[first] = leaves[first].at[(0,) * leaves[first].ndim].set(jax.numpy.nan)
    return jax.tree.unflatten(structure, leaves)


SPOILED = {
    "gradients": lambda state, batch: (
        state,
        batch._replace(label=jax.device_put(np.full_like(batch.label, PLANTED), batch.label.sharding)),
    ),
    "parameters": lambda state, batch: (state._replace(params=spoil(state.params)), batch),
    "momentum": lambda state, batch: (state._replace(opt_state=spoil(state.opt_state)), batch),
}


@pytest.mark.parametrize("what", SPOILED)
def test_nan_in_a_step_stops_the_run_and_is_not_saved(what, run, undisturbed, tmp_path):
    ended = run(tmp_path, {7: SPOILED[what]})
    assert ended.code == 1
    (line,) = ended.stderr
    assert "at step 8; the last good checkpoint is step 6 in " in line and "nan" in line, line
    assert ("the loss is nan" in line) == (what == "parameters")  # the others are seen in the norms
    step, state = final_state(tmp_path)
    assert step == 6 and all(np.isfinite(leaf).all() for leaf in state.values())
    assert run(tmp_path).code == 0
    check_same(tmp_path, undisturbed)


def test_a_checkpoint_with_nan_is_named_and_never_trained_from(run, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    step, state = final_state(tmp_path)
    name = next(name for name in state if name.startswith("params/"))
    state[name] = np.full_like(state[name], np.nan)
    checkpoints.save_now(step, state, checkpoints.metadata(step))
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    ended = run(tmp_path)
    assert ended.code == 1
    (line,) = ended.stderr
    assert (
        f"step {STEPS} in {tmp_path}/checkpoints holds parameters that are not finite" in line and "remove it" in line
    )
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before
    shutil.rmtree(tmp_path / "checkpoints" / before[-1])
    ended = run(tmp_path)
    assert ended.code == 0 and f"resuming at step {STEPS - EVERY} from" in ended.stdout
    check_same(tmp_path, undisturbed)


# ---- clocks ----


def test_a_clock_that_jumps_changes_nothing(run, undisturbed, tmp_path, monkeypatch):
    """A day forward, stopped there, started again two days earlier, and back: numbers, order and progress are as ever."""
    ahead, clock, day = [0.0], time.time, 86400.0
    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))

    def jump(days, stop=False):
        def change(state, batch):
            ahead[0] += days * day
            if stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return state, batch

        return change

    stopped = run(tmp_path, {3: jump(1), 8: jump(0, stop=True)})
    (line,) = stopped.stderr
    assert stopped.code == 143 and "SIGTERM: saved step 9 in" in line
    ahead[0] -= 2 * day
    ended = run(tmp_path, {11: jump(1), 13: jump(-3)})
    assert ended.code == 0 and not ended.stderr and "resuming at step 9 from" in ended.stdout
    check_same(tmp_path, undisturbed)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [STEPS - EVERY, STEPS]
    speeds = [line["images_per_second"] for line in lines(tmp_path) if "loss" in line]
    assert all(0.1 < speed < 1e6 for speed in speeds), speeds
    left = re.findall(r"ETA (\d+):\d\d:\d\d", stopped.stdout + ended.stdout)
    assert len(left) == STEPS and set(left) == {"0"}, left


# ---- storage ----


def failing(monkeypatch, times):
    """Lets the disk fail at the first times[step] attempts to save a step."""
    write, left = checkpointer.write_manifest, dict(times)

    def write_or_fail(path, manifest):
        if left.get(manifest["step"], 0):
            left[manifest["step"]] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(path, manifest)

    monkeypatch.setattr(checkpointer, "write_manifest", write_or_fail)
    monkeypatch.setattr(checkpointer, "PAUSE", 0.01)


def test_storage_that_fails_for_a_while_is_outlived(run, undisturbed, tmp_path, monkeypatch):
    failing(monkeypatch, {4: math.inf, 8: math.inf, 10: math.inf, 12: math.inf, 16: 2})
    ended = run(tmp_path)
    assert ended.code == 0
    told = [
        int(re.search(r"WARNING: cannot save step (\d+) in .*: Input/output error; ", line)[1]) for line in ended.stderr
    ]
    assert told == [4, 8, 10, 12, 16, 16]
    check_same(tmp_path, undisturbed)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000014", "step_00000016_2"]  # and no litter


def test_storage_that_goes_on_failing_stops_the_run(run, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, dict.fromkeys(range(4, STEPS + 1), math.inf))
        ended = run(tmp_path)
    assert ended.code == 2
    *warnings, line = ended.stderr
    assert len(warnings) == checkpointer.PATIENCE and re.search(r"cannot save step 10 in .*: Input/output error$", line)
    assert final_state(tmp_path)[0] == 2 and os.listdir(tmp_path / "checkpoints") == ["step_00000002"]
    ended = run(tmp_path)
    assert ended.code == 0 and "resuming at step 2 from" in ended.stdout
    check_same(tmp_path, undisturbed)
