"""What feeds a run breaks: its worker processes, its record files. It goes on with the same numbers, or stops in one line."""

import os
import signal
import subprocess

import numpy as np
import pytest
from command_line import arguments, final_state, finish, finished, run_until, start


def workers_of(process):
    """Numbers of the processes that decode."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    named = {int(child): open(f"/proc/{child}/cmdline").read() for child in children}  # noqa: SIM115
    return [child for child, command in named.items() if "spawn_main" in command]


def test_a_killed_worker_is_replaced_and_nothing_changes(tmp_path):
    process = start(arguments("moco", tmp_path, **{"runtime.workers": 1, "runtime.prefetch": 1}))
    run_until(process, "step 6/")
    (worker,) = workers_of(process)
    os.kill(worker, signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0, ended.stderr
    assert "terminated unexpectedly" in ended.stderr and "Starting workers again" in ended.stderr
    (step, state), (wanted_step, wanted) = final_state(tmp_path), final_state(finished("moco")[0])
    assert step == wanted_step
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(state[name], leaf, err_msg=name)


@pytest.mark.slow  # four times the start of a worker
def test_workers_that_keep_dying_stop_the_run(tmp_path):
    process = start(arguments("moco", tmp_path, **{"runtime.workers": 1, "runtime.prefetch": 1, "epochs": 400}))
    for step in (4, 40, 80, 120):  # far enough apart for new ones to be there
        run_until(process, f"step {step}/")
        (worker,) = workers_of(process)
        os.kill(worker, signal.SIGKILL)
    ended = finish(process)
    line = ended.stderr.strip().splitlines()
    (message,) = [text for text in line if text.startswith("hexa_jax: ")]
    assert ended.code == 1 and "the same command resumes" in message and "Traceback" not in ended.stderr
    assert final_state(tmp_path)[0] >= 12
