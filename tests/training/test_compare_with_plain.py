"""A run beside the same one without hard views: one command, one report, stopped and resumed in either half."""

import json

import pytest
from small import small_config

from hexa_jax.core.errors import ConfigError
from hexa_jax.core.preemption import Terminated
from hexa_jax.report.page import table
from hexa_jax.storage.workdir import flatten
from hexa_jax.training import loop

STEPS = 6  # of each of the two runs: 3 epochs of 2


@pytest.fixture(scope="module")
def config():
    return small_config(
        compare_with_plain=True,
        precision="float32",
        scheme="std+adv",
        **{
            "data.source": "shapes:train",
            "data.eval_source": "shapes:test",
            "knn.every_epochs": 1,
            "knn.neighbours": 5,
            "knn.resize": 8,
            "knn.crop": 8,
            "linear.at_end": True,
            "runtime.num_devices": 1,
            "runtime.log_every": 1,
        },
    )


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The workdir of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.pretrain(config, workdir)
    return workdir


def test_one_run_leaves_both_results_and_one_report(config, whole, capsys):
    results, plain = read(whole, "result.json"), read(whole / "plain", "result.json")
    for name in ("knn_accuracy", "linear_accuracy", "nmi"):
        assert results[f"plain_{name}"] == plain[name]
    assert {"pixels_knn_accuracy", "random_knn_accuracy", "knn_accuracy", "nmi"} <= results.keys()
    assert results["step"] == plain["step"] == STEPS
    # The same weights before the first step.
    assert results["random_knn_accuracy"] == plain["random_knn_accuracy"]
    assert (whole / "report" / "index.html").exists() and not (whole / "plain" / "report").exists()
    (shown,) = [line for line in table(results).splitlines() if line.startswith("plain ")]
    assert shown.split()[1:] == [f"{plain[name]:.1f}" for name in ("knn_accuracy", "linear_accuracy")]


def test_the_plain_run_differs_in_its_views_alone(config, whole):
    here, plain = flatten(config.to_dict()), flatten(read(whole / "plain", "config.json"))
    assert {name for name in here if here[name] != plain[name]} == {"scheme", "compare_with_plain", "knn.pixels"}
    lines = [json.loads(line) for line in (whole / "plain" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == STEPS and all(line["loss"] == line["loss_clean"] for line in losses)


def test_stopped_in_either_half_it_goes_on_to_the_same_results(config, whole, tmp_path, monkeypatch):
    class Guard:
        """Asks a run to stop after some steps; the first pass asks, too."""

        left = 0

        def reached(self):
            Guard.left -= 1
            return Guard.left == 0

        def close(self):
            pass

    monkeypatch.setattr("hexa_jax.training.run.PreemptionGuard", Guard)
    first_pass = 2
    Guard.left = first_pass + 3
    with pytest.raises(Terminated, match=r"step 3 .*plain"):
        loop.pretrain(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    Guard.left = STEPS - 3 + first_pass + 1
    with pytest.raises(Terminated, match="step 1 "):
        loop.pretrain(config, tmp_path)
    # The plain run has ended: it is not made again.
    before = (tmp_path / "plain" / "metrics.jsonl").stat().st_mtime_ns
    Guard.left = -1
    loop.pretrain(config, tmp_path)
    assert (tmp_path / "plain" / "metrics.jsonl").stat().st_mtime_ns == before
    for folder in ("", "plain"):
        assert read(tmp_path / folder, "result.json") == read(whole / folder, "result.json")


def test_a_plain_run_has_nothing_to_be_compared_with(config, tmp_path):
    with pytest.raises(ConfigError, match="no hard views"):
        loop.pretrain(small_config(compare_with_plain=True, scheme="std"), tmp_path)
    assert not any(tmp_path.iterdir())
