"""The SGD probe: its step against plain SGD, and the task on a pre-trained run: any number of devices, resumed, and mistakes."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import check_refused, evaluation_words, finished, result

from hexa_jax import main
from hexa_jax.evals.tasks.linear_sgd import ProbeState, probe_step


def test_step_is_plain_sgd_for_each_learning_rate(x64):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 5)), np.array([0, 1, 2, -1] * 3)
    rates, momentum, decay = np.array([0.5, 3.0]), 0.9, 0.01
    start = rng.normal(size=(5, 3))
    state = ProbeState(
        jnp.int32(0),
        *map(jnp.asarray, (np.stack([start] * 2), np.zeros((2, 3)), np.zeros((2, 5, 3)), np.zeros((2, 3)))),
    )
    for _ in range(3):
        state, losses = probe_step(state, features, labels, jnp.asarray(rates), momentum=momentum, weight_decay=decay)
    known = labels >= 0
    for number, rate in enumerate(rates):
        w, b, vw, vb = start.copy(), np.zeros(3), np.zeros((5, 3)), np.zeros(3)
        for _ in range(3):
            logits = features[known] @ w + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            loss = -np.log(p[np.arange(9), labels[known]]).mean()
            p[np.arange(9), labels[known]] -= 1
            vw = momentum * vw + features[known].T @ p / 9 + decay * w
            vb = momentum * vb + p.mean(0) + decay * b
            w, b = w - rate * vw, b - rate * vb
        np.testing.assert_allclose(state.kernel[number], w, rtol=1e-10)
        np.testing.assert_allclose(state.bias[number], b, rtol=1e-10, atol=1e-12)
        assert losses[number] == pytest.approx(loss)
    assert state.step == 3


def words(checkpoint, workdir, **settings):
    settings = {
        "data.eval_source": "shapes:test", "data.crop": 8, "data.resize": 8, "batch_size": 16, "runtime.num_devices": 1,
        "optimizer.learning_rates": "(0.3,3.0)",
    } | settings  # fmt: skip
    return ["hexa", *evaluation_words("linear_imagenet.py:epochs=2", workdir, checkpoint=checkpoint, **settings)]


@pytest.fixture(scope="module")
def run():
    return finished("moco")[0]


@pytest.fixture(scope="module")
def probe(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("probe") / "run"
    assert main.main(words(run, workdir)) == 0
    return workdir, result(workdir)


def test_probe_reports_each_learning_rate_and_epoch(probe):
    workdir, result = probe
    assert result["top1"] == result["top1_lr0.3"] and 0 <= result["top1"] <= result["top5"] <= 100
    assert result["pretraining_step"] == 24 and result["epochs"] == 2
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "top1" in line] == [1, 2]


def test_devices_and_an_interruption_change_nothing(run, probe, tmp_path):
    assert main.main(words(run, tmp_path / "four", **{"runtime.num_devices": 4})) == 0
    assert result(tmp_path / "four") == probe[1]
    # As after a kill in the second epoch: the checkpoint of the first is the newest.
    part = tmp_path / "part"
    shutil.copytree(probe[0], part)
    (part / "result.json").unlink()
    newest = max((part / "checkpoints").iterdir())
    shutil.rmtree(newest)
    assert main.main(words(run, part)) == 0
    assert result(part) == probe[1]
    assert newest.is_dir()


def test_mistakes_are_one_line(run, tmp_path, capsys):
    cases = {
        "is neither a file nor the workdir of a run": words(tmp_path / "nothing", tmp_path / "a"),
        "batch_size=160 is more than the 70 images": words(run, tmp_path / "b", batch_size=160),
        "no labels": words(run, tmp_path / "c", **{"data.source": f"folder:{flat(tmp_path)}"}),
    }
    for message, command in cases.items():
        check_refused(command[1:], message, capsys)


def flat(folder: pathlib.Path) -> pathlib.Path:
    from command_line import image_folder

    image_folder(folder / "flat", by_class=False, count=4)
    return folder / "flat"
