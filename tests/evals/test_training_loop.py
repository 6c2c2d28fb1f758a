"""The loop of evaluations that train, on a sum: when it logs, evaluates and saves, and how it stops and goes on."""

import dataclasses
import os
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import lines
from ml_collections import ConfigDict

from configs.eval import knn as any_evaluation
from hexa_jax import main
from hexa_jax.checkpoint.checkpointer import Checkpoints
from hexa_jax.core.preemption import Diverged, PreemptionGuard, Terminated
from hexa_jax.evals.tasks.training_loop import TrainingLoop

TOTAL, STEPS_PER_EPOCH = 8, 3  # two epochs, and two steps of a third


class Sum(NamedTuple):
    step: jax.Array
    value: jax.Array


class Stop:
    """Asks to stop after a number of steps of this start."""

    def __init__(self, after=None):
        self.left = after

    def reached(self):
        self.left = self.left and self.left - 1
        return self.left == 0


def add(state, batch):
    return Sum(state.step + 1, state.value + batch), {"loss": state.value, "added": batch}


def make(folder, evaluated, step=add, silent=(), log_every=2):
    """Batch number n, from 1, is n; `evaluated` gets (sum, epoch) of each evaluation; those in `silent` say nothing."""

    def evaluate(state, epoch):
        evaluated.append((int(state.value), epoch))
        return {} if epoch in silent else {"sum": float(state.value)}

    return TrainingLoop(
        config=ConfigDict({"batch_size": 4, "runtime": {"loggers": (), "log_every": log_every}}),
        folder=folder,
        total=TOTAL,
        steps_per_epoch=STEPS_PER_EPOCH,
        step=jax.jit(step),
        batches=lambda start: iter(jnp.float32(number) for number in range(start + 1, TOTAL + 1)),
        evaluate=evaluate,
        advice="try another sum",
    )


def initial():
    return jax.device_put(Sum(jnp.int32(0), jnp.float32(0)), jax.devices()[0])


def without_speed(folder):
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines(folder)]


SUMS = [(6, 1.0), (21, 2.0), (36, 8 / 3)]


def test_evaluates_after_each_epoch_and_at_the_end(tmp_path, capsys):
    evaluated = []
    state, history = make(tmp_path, evaluated, silent=(1.0,)).run(initial(), Stop())
    assert (int(state.step), int(state.value)) == (8, 36) and evaluated == SUMS
    assert history == [{"sum": 21.0}, {"sum": 36.0}]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [6, 8]  # the newest two
    logged = [(line["step"], line["loss"]) for line in without_speed(tmp_path) if "loss" in line]
    assert logged == [(2, 1), (3, 3), (4, 6), (6, 15), (8, 28)]
    tested = [line for line in without_speed(tmp_path) if "sum" in line]
    assert tested == [{"step": 6, "epoch": 2, "sum": 21}, {"step": 8, "epoch": pytest.approx(8 / 3), "sum": 36}]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["2/8", "3/8", "4/8", "6/8", "8/8"]
    assert "epoch 1.33  loss 6.0000  " in said[2] and "added" in lines(tmp_path)[0]


@pytest.mark.parametrize("after", [1, 3, 4, 7])
def test_stops_after_any_step_and_goes_on(tmp_path, after):
    evaluated, whole = [], []
    with pytest.raises(Terminated, match=rf"SIGTERM: saved step {after} in {tmp_path}/part; the same command resumes"):
        make(tmp_path / "part", evaluated).run(initial(), Stop(after))
    assert Checkpoints(tmp_path / "part" / "checkpoints").steps()[-1] == after
    state, history = make(tmp_path / "part", evaluated).run(initial(), Stop())
    expected, wanted = make(tmp_path / "whole", whole).run(initial(), Stop())
    assert state == expected and history == wanted and evaluated == whole == SUMS
    assert without_speed(tmp_path / "part") == without_speed(tmp_path / "whole")


def test_a_wish_to_stop_at_the_end_changes_nothing(tmp_path):
    state, history = make(tmp_path, []).run(initial(), Stop(TOTAL))
    assert int(state.step) == TOTAL and len(history) == 3


def test_a_finished_run_does_nothing(tmp_path):
    make(tmp_path, []).run(initial(), Stop())
    before, evaluated = lines(tmp_path), []
    state, history = make(tmp_path, evaluated).run(initial(), Stop())
    assert int(state.value) == 36 and not evaluated and history[-1] == {"sum": 36.0} and lines(tmp_path) == before


def test_checkpoints_without_a_history_can_be_resumed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(6, Sum(jnp.int32(6), jnp.float32(21)))
    checkpoints.close()
    state, history = make(tmp_path, []).run(initial(), Stop())
    assert int(state.value) == 36 and history == [{"sum": 36.0}]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tmp_path, broken):
    def step(state, batch):
        after, scalars = add(state, batch)
        return after, scalars | {"loss": jnp.where(batch == 5, broken, scalars["loss"])}

    with pytest.raises(Diverged, match=rf"the loss is {broken} at step 5; try another sum"):
        make(tmp_path, [], step, log_every=1).run(initial(), Stop())
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("of", ["loss", "state"])
def test_a_broken_run_that_is_told_to_stop_saves_nothing(tmp_path, value, of):
    def step(state, batch):
        after, scalars = add(state, batch)
        broken = jnp.where(batch == 5, value, 0.0)
        if of == "loss":
            return after, scalars | {"loss": scalars["loss"] + broken}
        return after._replace(value=after.value + broken), scalars

    with pytest.raises(Diverged, match=r"step 5; try another sum"):
        make(tmp_path, [], step, log_every=100).run(initial(), Stop(5))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]
    _, history = make(tmp_path, [], add).run(initial(), Stop())  # the good checkpoint goes on
    assert history[-1] == {"sum": 36.0}


@pytest.mark.parametrize("broken, code", [(5, 1), (None, 143)])
def test_a_broken_run_ends_as_diverged_in_spite_of_a_signal(tmp_path, monkeypatch, capsys, broken, code):
    """SIGTERM arrives in step 5, whose loss is NaN or not."""

    def step(state, batch):
        after, scalars = add(state, batch)
        return after, scalars | {"loss": jnp.where(batch == broken, jnp.nan, scalars["loss"])} if broken else scalars

    def batches(start):
        for number in range(start + 1, TOTAL + 1):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield jnp.float32(number)

    def task(config, workdir):
        stop = PreemptionGuard()
        try:
            dataclasses.replace(make(workdir, [], step, log_every=100), batches=batches).run(initial(), stop)
        finally:
            stop.close()

    monkeypatch.setitem(main.TASKS, "knn", task)
    assert main.main(["hexa", f"--config={any_evaluation.__file__}", f"--workdir={tmp_path}"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hexa_jax: the loss is nan at step 5" if broken else "hexa_jax: SIGTERM: saved step 5")
    assert Checkpoints(tmp_path / "checkpoints").steps() == ([3] if broken else [3, 5])


def test_what_a_task_does_not_call_sound_may_diverge(tmp_path):
    class Two(NamedTuple):
        step: jax.Array
        first: jax.Array
        second: jax.Array

    def step(state, batch):
        return Two(state.step + 1, state.first + batch, state.second * jnp.inf), {"loss": state.first}

    loop = dataclasses.replace(make(tmp_path, [], step), sound=lambda state: state.first)
    loop = dataclasses.replace(loop, evaluate=lambda state, epoch: {})
    state = Two(jnp.int32(0), jnp.float32(0), jnp.float32(1))
    state, _ = loop.run(jax.device_put(state, jax.devices()[0]), Stop())
    assert int(state.first) == 36 and Checkpoints(tmp_path / "checkpoints").steps() == [6, 8]
