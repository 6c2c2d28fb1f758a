"""The script for a GPU machine: what it would run, word by word; its mistakes; and that parts fail one by one."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from command_line import REPOSITORY, environment

MORE = "reference claim"
PARTS = f"moco_resnet50 moco_resnet18 deepcluster_8crop kmeans {MORE}"
SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"


def script(*words, timeout=60, **variables):
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | variables
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=timeout, env=env)


def printed(*words, **variables):
    """Commands as lists of words, after their time limit."""
    done = script("--dry-run", *words, **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(line[:2] == ["timeout", "--kill-after=30"] for line in lines)
    return [line[2:] for line in lines]


def test_the_cases_then_kmeans():
    *steps, kmeans = printed()
    assert [line[0] for line in (*steps, kmeans)] == ["1800"] * 4
    assert [line[1:5] for line in steps] == [
        [".venv/bin/python", "benchmarks/step.py", "--peer", f"--cases={case}"]
        for case in ("moco_resnet50", "moco_resnet18", "deepcluster_8crop")
    ]
    assert all({"--variants=plain,auxiliary,main,cutmix", "--rows=runs/gpu/step.json"} <= set(line) for line in steps)
    assert kmeans[1:3] == [".venv/bin/python", "benchmarks/kmeans.py"]
    sizes = {"--points=1281167", "--dim=128", "--heads=3", "--clusters=3000", "--iterations=10"}
    assert sizes | {"--rows=runs/gpu/kmeans.json"} <= set(kmeans)


def test_options():
    words = ["--only=kmeans,moco_resnet18", "--limit=60", "--", "--variants=plain", "--peer-python=/a b/python"]
    kmeans, step = printed(*words, OUT="/a folder", HEXA_PYTHON="python3")
    assert kmeans[:3] == ["60", "python3", "benchmarks/kmeans.py"] and kmeans[-1] == "--rows=/a folder/kmeans.json"
    assert step[:3] == ["60", "python3", "benchmarks/step.py"] and "--cases=moco_resnet18" in step
    assert step[-3:] == ["--rows=/a folder/step.json", "--variants=plain", "--peer-python=/a b/python"]
    assert [line[4] for line in printed("--tiny")[:-1]] == ["--cases=tiny_moco", "--cases=tiny_8crop"]


def test_the_claim_and_the_reference():
    words = [
        "--only=reference,claim",
        "--data=folder:/a b/train",
        "--test=folder:/a b/test",
        "--epochs=90",
        "--limit=90000",
    ]
    reference, claim = printed(*words)
    assert claim[:5] == ["90000", ".venv/bin/python", "-m", "hexa_jax.experiments", "claim"]
    assert {"--preset=cifar10", "--methods=moco,deepcluster", "--seeds=0,1,2", "--config.epochs=90"} <= set(claim)
    assert "--config=configs/cifar10_moco_v2.py" in reference and not any("epochs" in word for word in reference)
    for line in (reference, claim):
        assert {"--config.data.source=folder:/a b/train", "--config.data.eval_source=folder:/a b/test"} <= set(line)
    assert not any("data." in word for line in printed("--only=reference,claim") for word in line)


@pytest.mark.slow  # a grid of six runs, and one more run
def test_the_claim_and_the_reference_in_miniature(tmp_path):
    words = ["--tiny", "--only=reference,claim"]
    done = script(*words, timeout=1500, **environment(), HEXA_PYTHON=sys.executable, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| moco | std+adv | 2 |" in (tmp_path / "claim" / "claim.md").read_text()
    assert json.loads((tmp_path / "reference" / "result.json").read_text())["knn_accuracy"] >= 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--quick"], "gpu.sh: unknown argument --quick; see --help"),
        (["--limit=soon"], "gpu.sh: --limit=soon is no number of seconds"),
        (["--limit=0"], "gpu.sh: --limit=0 is no number of seconds"),
        (["--only=resnet"], f"gpu.sh: --only=resnet is not known: use {PARTS}"),
        (["--tiny", "--only=moco_resnet50"], f"gpu.sh: --only=moco_resnet50 is not known: use tiny_moco tiny_8crop kmeans {MORE}"),
    ],
)  # fmt: skip
def test_mistakes(words, message):
    done = script(*words)
    assert done.returncode == 2 and done.stderr.splitlines() == [message] and not done.stdout


def test_help_is_the_head_of_the_script():
    done = script("--help")
    assert done.returncode == 0 and "--dry-run" in done.stdout and "set -euo" not in done.stdout
    assert os.access(SCRIPT, os.X_OK)


def test_every_part_has_its_turn(tmp_path):
    """A python that fails in one part, is too slow in another, and writes down what it was asked."""
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho \"$*\" >> {tmp_path}/log\n"
        'case "$*" in *resnet18*) exit 5;; *8crop*) sleep 30 & wait;; esac\n'
    )  # fmt: skip
    python.chmod(0o755)
    done = script("--limit=1", HEXA_PYTHON=str(python), OUT=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "gpu.sh: failed: moco_resnet18 (exit code 5)",
        "gpu.sh: failed: deepcluster_8crop (not done within 1 s)",
    ]
    assert len((tmp_path / "log").read_text().splitlines()) == 4
    assert "== kmeans ==" in done.stdout.splitlines()


@pytest.mark.slow  # eight pairs of programs
def test_in_miniature(tmp_path):
    pytest.importorskip("torch", reason="compares with PyTorch")
    done = script("--tiny", timeout=900, OUT=str(tmp_path), HEXA_PYTHON=sys.executable, **environment())
    assert done.returncode == 0, done.stderr
    steps, (kmeans,) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("step", "kmeans"))
    variants = [
        "plain", "adversarial, auxiliary", "adversarial, main, shared", "adversarial (auxiliary) + cut-mixed"
    ]  # fmt: skip
    cases = [(row["case"], row["variant"]) for row in steps]
    assert cases == [(case, variant) for case in ("tiny_moco", "tiny_8crop") for variant in variants]
    assert all(row["ratio"] > 0 and row["torch"]["seconds"] > 0 for row in steps)
    assert kmeans["heads"] == 3 and kmeans["ours"]["seconds"] > 0 and 0 < kmeans["ours"]["objective"] < 1
