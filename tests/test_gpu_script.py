"""benchmarks/gpu.sh: what it would run, its mistakes, that a failing part does not stop the rest; in miniature, everything."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from command_line import REPOSITORY

from benchmarks import compare


def script(*words, timeout=60):
    command = [REPOSITORY / "benchmarks" / "gpu.sh", f"--python={sys.executable}", *words]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)


def printed(*words):
    done = script("--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_steps_of_the_paper_and_all_heads_of_imagenet():
    *steps, kmeans = printed("--out=/x y")
    assert all(
        words[0] == "timeout" and int(words[1]) <= 900 and words[2] == sys.executable for words in [*steps, kmeans]
    )
    cases = [word.removeprefix("--cases=") for words in steps for word in words if word.startswith("--cases=")]
    assert cases == ["moco_resnet50", "moco_resnet18", "deepcluster_8crop"] and set(cases) <= compare.CASES.keys()
    assert all({"--peer", "--rows=/x y/step.json"} <= set(words) for words in steps)
    assert {"--points=1281167", "--clusters=3000", "--heads=3"} <= set(kmeans)


def test_the_claim_and_the_reference():
    claim, reference = printed(
        "--parts=claim,reference", "--data=folder:/cifar/train", "--test=folder:/cifar/test", "--epochs=90"
    )
    assert claim[3:6] == ["-m", "hexa_jax.experiments", "claim"]
    assert {"--preset=cifar10", "--methods=moco,deepcluster", "--seeds=0,1,2", "--config.epochs=90"} <= set(claim)
    for words in (claim, reference):
        assert {"--config.data.source=folder:/cifar/train", "--config.data.eval_source=folder:/cifar/test"} <= set(
            words
        )
    assert "--config=configs/cifar10_moco_v2.py" in reference and not any("epochs" in word for word in reference)


@pytest.mark.parametrize(
    "word, message", [("--part=step", "unknown argument --part=step"), ("--parts=all", "unknown part all")]
)
def test_mistakes_are_one_line(word, message):
    done = script(word)
    assert done.returncode == 2 and done.stderr == f"gpu.sh: {message}; see --help\n" and not done.stdout


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $1 in *step.py) exit 3;; esac\necho ran $1\n")
    python.chmod(0o755)
    done = script("--tiny", f"--python={python}", f"--out={tmp_path}")
    assert done.returncode == 1 and "ran benchmarks/kmeans.py" in done.stdout
    assert done.stdout.splitlines()[-1] == "failed: step tiny (exit code 3)"


@pytest.mark.slow  # eight steps of two libraries, a grid of six runs, and one more run
def test_everything_in_miniature(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    done = script("--tiny", "--parts=step,kmeans,claim,reference", f"--out={tmp_path}", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "step.json").read_text())
    assert len(rows) == 8 and all(row["ratio"] > 0 for row in rows)
    (row,) = json.loads((tmp_path / "kmeans.json").read_text())
    assert row["heads"] == 3 and row["hexa_jax"]["seconds"] > 0
    assert "| moco | std+adv | 2 |" in (tmp_path / "claim" / "claim.md").read_text()
    assert json.loads((tmp_path / "reference" / "result.json").read_text())["knn_accuracy"] >= 0
