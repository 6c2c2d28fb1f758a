"""The judge of the soak test finds each kind of leak in made-up samples; and its figures are those of real processes."""

import os
import subprocess
import sys

import pytest
from command_line import environment

from benchmarks import soak

ROOT = soak.ROOT


def samples(count=40, **slopes):
    """One a minute, an epoch each; `slopes` are what grows a sample."""
    flat = {"memory": 1000.0, "descriptors": 100, "threads": 40, "compiled": 13}
    return [
        {"seconds": 60.0 * i, "epoch": i} | {name: value + i * slopes.get(name, 0) for name, value in flat.items()}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "slopes, wrong",
    [
        ({}, ""),
        ({"memory": 1.0, "descriptors": 0.05, "threads": 0.05}, ""),  # within the bounds
        ({"memory": -9, "descriptors": -1}, ""),
        ({"memory": 4}, "memory grew from 1028.0 to 1140.0 MB"),
        ({"descriptors": 0.2}, "descriptors grew"),
        ({"threads": 1}, "threads grew"),
        ({"compiled": 1 / 36}, "1.0 compilations after epoch 3"),
    ],
    ids=str,
)
def test_each_leak_is_found_and_nothing_else(slopes, wrong):
    table, found = soak.judge(samples(**slopes), growth=0.05)
    assert [line[: len(wrong)] for line in found] == ([wrong] if wrong else [])
    for name, per_hour in (("memory", 60), ("descriptors", 60)):
        (row,) = [line for line in table.splitlines() if line.startswith(name)]
        assert float(row.split()[-1]) == pytest.approx(per_hour * slopes.get(name, 0), abs=0.01)


@pytest.mark.parametrize("leak, wrong", [(0.0, []), (0.15, ["threads grew from"])])
def test_saves_in_flight_hold_threads_that_are_no_leak(leak, wrong):
    many = samples(80, threads=leak)
    for i, sample in enumerate(many):  # at first two samples of five meet a save, at the end three
        sample["threads"] += 10 * (i % 5 < (2 if i < 40 else 3))
    assert [line[:17] for line in soak.judge(many, growth=0.05)[1]] == wrong


def test_the_warm_up_does_not_count():
    start = [sample | {"epoch": 0, "memory": 1.0, "compiled": i} for i, sample in enumerate(samples(13))]
    assert soak.judge(start + samples(), growth=0.05)[1] == []
    assert "too few" in soak.judge(start, growth=0.05)[1][0]


def test_usage_is_that_of_the_whole_tree():
    opened = (
        "files = [open('/dev/null') for _ in range(50)]; data = bytearray(b'x') * 50_000_000; print('up', flush=True)"
    )
    child = f"{opened}; input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout.readline() == b"up\n"
    processes = soak.tree(process.pid)
    used = soak.usage(processes[1])
    process.communicate(b"\n")
    assert len(processes) == 2 and processes[0] == process.pid
    assert used["memory"] > 50 and used["descriptors"] >= 53 and used["threads"] >= 1
    assert soak.usage(process.pid) == {"memory": 0, "descriptors": 0, "threads": 0}


def test_progress_is_read_as_it_is_printed(tmp_path):
    output, errors = tmp_path / "output", tmp_path / "errors"
    output.write_text("step 4/8  epoch 1.00/2\n")
    errors.write_text("WARNING: Finished XLA compilation of jit(add) in 0.1 sec\nWARNING: other\n")
    progress = soak.Progress(output, errors)
    progress.read()
    assert (progress.epoch, progress.compiled) == (0, 1)
    with output.open("a") as file:
        file.write("epoch 2: changed_cluster 0.1, nmi 0.2\nepoch 1: kNN accuracy 8.6 %\n")
    progress.read()
    assert (progress.epoch, progress.compiled) == (1, 1)


@pytest.mark.slow  # a run of minutes
def test_a_miniature_soak(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "soak.py", f"--out={tmp_path / 'out'}"]
    words = ["--minutes=3", "--every=1", "--growth=0.3", "--config.linear.at_end=False"]
    env = {**os.environ, **environment()}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "compilations before, 0 after" in done.stdout and (tmp_path / "out" / "soak.png").stat().st_size > 10_000
    again = subprocess.run([*command, *words], capture_output=True, text=True, env=env, timeout=600)
    assert again.returncode == 2 and "is not empty" in again.stderr
