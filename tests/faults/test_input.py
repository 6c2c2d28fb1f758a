"""What feeds a run breaks: its worker processes, its record files. It goes on with the same numbers, or stops in one line."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import arguments, environment, final_state, finish, finished, image_folder, run_until, start

from hexa_jax.data.decode import BadImage, decode
from hexa_jax.data.sources import DataError, make_source


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A folder of images packed as ArrayRecord: (data_dir, its one file, how many there are)."""
    root = tmp_path_factory.mktemp("records")
    image_folder(root / "photos", count=40)
    command = [sys.executable, "-W", "ignore", "-m", "hexa_jax.prepare", f"folder:{root}/photos", "--name=photos"]
    env = environment() | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, f"--data_dir={root}/data"], check=True, capture_output=True, env=env, timeout=300)
    (file,) = (root / "data").rglob("*.array_record*")
    return root / "data", file, 40


def damaged(records, folder, change):
    """A copy of the data set whose record file `change` has rewritten."""
    data_dir, file, _ = records
    shutil.copytree(data_dir, folder)
    copy = folder / file.relative_to(data_dir)
    copy.write_bytes(change(bytearray(copy.read_bytes())))
    return str(folder)


def flipped(data):
    used = np.flatnonzero(np.frombuffer(bytes(data), np.uint8))  # the rest is padding
    data[used[len(used) // 2]] ^= 0xFF
    return data


@pytest.mark.parametrize(
    "change", [flipped, lambda data: data[: len(data) // 2], lambda data: b""], ids=["flipped", "truncated", "empty"]
)
def test_a_damaged_record_file_is_told(records, tmp_path, change):
    """Each example is read, or told by its number; or the file as a whole is refused in one line."""
    data_dir = damaged(records, tmp_path / "data", change)
    missed = 0
    try:
        source = make_source("tfds:photos", data_dir=data_dir)
        assert len(source) == 40
        for index in range(40):
            try:
                decode(source[index]["image"], source.name(index))
            except BadImage as error:
                missed += 1
                assert f"tfds:photos:train, index {index}" in str(error) and "\n" not in str(error)
    except DataError as error:
        missed += 1
        assert "tfds:photos" in str(error) and "\n" not in str(error)
    assert missed  # a flipped byte is noticed: records have checksums


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


SERVE = """
import time
from hexa_jax.data.pipeline import host_iterator
elements = host_iterator(list(range(1000)), 0, workers=1, threads=1, buffer=1)
print("first:", next(elements), flush=True)
time.sleep(600)
"""


def test_a_worker_ends_with_the_run_that_was_killed():
    """What it would hold otherwise, for ever and at each restart: its memory, and the batches that it had ready."""
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True, env=environment())
    run_until(process, "first: 0")
    (worker,) = workers_of(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while (
        pathlib.Path(f"/proc/{worker}/statm").exists() and pathlib.Path(f"/proc/{worker}/statm").read_text()[:2] != "0 "
    ):
        assert time.monotonic() < deadline, f"worker {worker} is still there"
        time.sleep(0.1)


END = """
import numpy as np
from hexa_jax.data.pipeline import host_iterator
steps = [np.zeros(1000)] * 6
print("all:", sum(1 for _ in host_iterator(steps, 0, workers=2, threads=1, buffer=4)))
some = host_iterator(steps, 0, workers=2, threads=1, buffer=4)
next(some)
some.close()
"""


def test_workers_leave_no_shared_memory_behind():
    """Neither where all is read, nor where a run stops early; Python would warn of what is leaked."""
    ended = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, env=environment(), timeout=300)
    assert ended.returncode == 0 and ended.stdout == "all: 6\n"
    assert "resource_tracker" not in ended.stderr


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
