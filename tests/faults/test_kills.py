"""Kill -9 at many moments: whatever a run was doing, the same command ends with the numbers of one that nobody disturbed."""

import time

import numpy as np
import pytest
from command_line import arguments, final_state, finish, lines, run_until, start

KILLS, STEPS = 20, 240
LONG = {"epochs": 60, "runtime.checkpoint_every": 1}  # each step has a checkpoint: many kills fall into a write
PATIENCE = 3000  # seconds: a machine may be busy


@pytest.mark.slow  # twenty starts
@pytest.mark.parametrize("kind", ["deepcluster", "moco"])
def test_killed_at_twenty_random_moments(tmp_path, kind):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(arguments(kind, whole, **LONG)), PATIENCE).code == 0
    rng, ended_at = np.random.default_rng(3), []
    for _ in range(KILLS):
        process = start(arguments(kind, killed, **LONG))
        for _ in range(rng.integers(1, 11)):
            run_until(process, f"/{STEPS}  epoch ")  # a step that this start made
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        ended_at.append(final_state(killed)[0] if any(killed.glob("checkpoints/*/MANIFEST.json")) else 0)
    assert ended_at == sorted(ended_at) and ended_at[-1] < STEPS, ended_at  # always forward, and still not done
    assert len(set(ended_at)) > KILLS // 2, ended_at  # most starts left a newer checkpoint behind
    print("killed with checkpoints of steps", ended_at)
    assert finish(start(arguments(kind, killed, **LONG)), PATIENCE).code == 0
    (step, state), (wanted_step, wanted) = final_state(killed), final_state(whole)
    assert step == wanted_step == STEPS
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(state[name], leaf, err_msg=name)
    losses = [[(line["step"], line["loss"]) for line in lines(folder) if "loss" in line] for folder in (whole, killed)]
    assert losses[0] == losses[1]
