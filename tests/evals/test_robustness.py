"""Robustness: attacks against a closed form, the vote that is attacked, and the whole evaluation from the command line."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import check_refused, evaluation_words, finished, image_folder, result
from command_line import run as run_process

from hexa_jax import main
from hexa_jax.evals.corruptions import CORRUPTIONS, STRENGTHS
from hexa_jax.evals.knn import knn_predict, vote_logits
from hexa_jax.evals.linear import fit_linear
from hexa_jax.evals.tasks import robustness
from hexa_jax.evals.tasks.readouts import knn_readout, linear_readout
from hexa_jax.evals.tasks.robustness import attacked, judge_predictions


def random_images(count, seed=0, low=0.2, high=0.8):
    """float64 [count, 4, 4, 3], away from black and white: no attack here is cut off at the range of pixels."""
    return np.random.default_rng(seed).uniform(low, high, (count, 4, 4, 3))


# ---- The attack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0, 8.0])
def test_attack_on_a_linear_classifier_has_a_closed_form(epsilon, x64):
    """Two classes: the margin y (w x + b) shrinks by epsilon times the sum of |w|, and nothing can shrink it more."""
    images = random_images(300)
    noisy = images.reshape(300, -1)[:, :5].sum(axis=1) + np.random.default_rng(1).normal(0, 0.05, 300)
    labels = (noisy > 2.5).astype(np.int32)
    classifier = fit_linear(images[:200].reshape(200, -1), labels[:200], regularization=0.01)
    w = (classifier.kernel[:, 1] - classifier.kernel[:, 0]) / classifier.scale
    b = classifier.bias[1] - classifier.bias[0] - classifier.mean @ w
    test, sign = images[200:], 2 * labels[200:] - 1
    margins = sign * (test.reshape(100, -1) @ w + b)
    radius = epsilon / 255 * np.abs(w).sum()

    readout = linear_readout(classifier, jnp.float64)
    targets = readout.targets(labels[200:])
    objective = jax.jit(lambda point: readout.losses(readout.arrays, point.reshape(100, -1), targets))
    end = np.asarray(attacked(objective, jnp.asarray(test), epsilon=epsilon, steps=10))
    left = sign * (end.reshape(100, -1) @ w + b)
    np.testing.assert_allclose(left, margins - radius, rtol=0, atol=1e-12)

    predictions = {"clean": classifier.predict(test.reshape(100, -1))}
    predictions[f"linf{epsilon:g}"] = classifier.predict(end.reshape(100, -1))
    found = judge_predictions(predictions, labels[200:], (epsilon,), ())
    assert found[f"linf{epsilon:g}"] == pytest.approx(100 * np.mean(margins > radius), abs=1e-9)
    assert found["clean"] > 85
    if epsilon == 0:
        np.testing.assert_array_equal(end, test)
    else:
        assert 0 < np.mean(margins > radius) < np.mean(margins > 0)  # the closed form says something here


def test_a_random_start_stays_in_the_ball_and_is_a_function_of_its_keys(x64):
    images = jnp.asarray(random_images(6))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=48))
    objective = jax.jit(lambda point: jnp.sin(30 * point.reshape(len(point), -1) @ weights))

    def keys():
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(3), np.arange(6))

    settings = {"epsilon": 4.0, "steps": 3}
    end = attacked(objective, images, keys=keys(), **settings)
    assert float(jnp.max(jnp.abs(end - images))) <= 4 / 255 + 1e-12
    plain = attacked(objective, images, **settings)
    assert (end != plain).any()
    np.testing.assert_array_equal(end, attacked(objective, images, keys=keys(), **settings))
    np.testing.assert_array_equal(end[:2], attacked(objective, images[:2], keys=keys()[:2], **settings))


def test_an_attack_never_raises_an_accuracy():
    labels = np.array([0, 0, 0, 1, 1, 1])
    predictions = {
        "clean": np.array([0, 0, 1, 1, 1, 1]),
        "linf2": np.array([0, 0, 0, 0, 1, 1]),  # rights one that was wrong
        "linf1": np.array([1, 0, 1, 1, 1, 1]),
        "linf4": np.array([0, 1, 0, 1, 1, 1]),  # and gives up two that a weaker attack had won
    }
    found = judge_predictions(predictions, labels, (4.0, 1.0, 2.0), ())
    shares = {name: round(value * 6 / 100) for name, value in found.items()}
    assert shares == {"clean": 5, "linf1": 4, "linf2": 3, "linf4": 2}


def test_corruptions_are_averaged_over_strengths_and_names():
    labels = np.zeros(4, int)
    predictions = {"clean": labels}
    for strength in STRENGTHS:
        predictions[f"contrast_{strength}"] = np.array([0, 0, 0, 1])
        predictions[f"pixelate_{strength}"] = np.array([0] * (4 - (strength > 2)) + [1] * (strength > 2))
    found = judge_predictions(predictions, labels, (), ("contrast", "pixelate"))
    assert found["contrast"] == 75 and found["pixelate"] == 85 and found["corruption"] == 80
    assert found["pixelate_2"] == 100 and found["pixelate_3"] == 75


# ---- The read-outs -----------------------------------------------------------------------------------------------------


def bank_and_queries():
    rng = np.random.default_rng(4)
    bank, queries = (rng.normal(size=(count, 6)).astype(np.float32) for count in (60, 15))
    return bank, rng.integers(0, 4, 60), queries


@pytest.mark.parametrize("neighbours", [0, 1, 7, 60, 100])
def test_the_votes_are_those_of_the_prediction(neighbours):
    bank, labels, queries = bank_and_queries()
    logits = vote_logits(jnp.asarray(bank), jnp.asarray(labels), jnp.asarray(queries), classes=4, neighbours=neighbours)
    wanted = knn_predict(bank, labels, queries, neighbours=neighbours or 60)
    np.testing.assert_array_equal(np.argmax(logits, axis=1), wanted)
    x, q = (rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1)[:, None] for rows in (bank, queries))
    similarity = q @ x.T
    votes = np.zeros((15, 4))
    for query, row in np.ndindex(15, 60):
        if not neighbours or similarity[query, row] >= np.sort(similarity[query])[-min(neighbours, 60)]:
            votes[query, labels[row]] += np.exp(similarity[query, row] / 0.07)
    got = np.asarray(jax.nn.softmax(logits, axis=1))
    np.testing.assert_allclose(got, votes / votes.sum(axis=1, keepdims=True), atol=2e-5)


def test_a_unanimous_vote_can_be_attacked():
    """All nearest neighbours agree, so that their own vote is flat; the loss still leads out of their class."""
    rng = np.random.default_rng(5)
    labels = np.arange(80) % 2
    bank = rng.normal(0, 0.01, (80, 8)) + np.where(labels, 1.0, -1.0)[:, None] * np.eye(8)[0] + 2 * np.eye(8)[1]
    bank = bank.astype(np.float32)
    query = jnp.asarray(bank[:2])
    readout = knn_readout(bank, labels, neighbours=10)
    targets = readout.targets(labels[:2])
    flat = jax.grad(
        lambda point: jnp.sum(
            vote_logits(jnp.asarray(bank), jnp.asarray(labels), point, classes=2, neighbours=10)[jnp.arange(2), targets]
            - jax.nn.logsumexp(
                vote_logits(jnp.asarray(bank), jnp.asarray(labels), point, classes=2, neighbours=10), axis=1
            )
        )
    )(query)
    assert float(jnp.max(jnp.abs(flat))) < 1e-5
    slope = jax.grad(lambda point: jnp.sum(readout.losses(readout.arrays, point, targets)))(query)
    across = np.asarray(slope[:, 0]) * np.where(labels[:2], -1, 1)
    assert (across > 1e-3).all()  # toward the other class
    moved = query + 2 * np.sign(slope) * (np.arange(8) == 0)
    assert (readout.predict(np.asarray(query)) == labels[:2]).all()
    assert (readout.predict(np.asarray(moved)) != labels[:2]).all()


def test_losses_are_cross_entropies_and_unknown_classes_have_none():
    bank, labels, queries = bank_and_queries()
    labels = np.array([2, 3, 5, 9])[labels]
    wanted = np.array([2, 9, 4, 10, 0, *[5] * 10])
    classifier = fit_linear(bank, labels, regularization=0.1)
    logits = (queries - classifier.mean) / classifier.scale @ classifier.kernel + classifier.bias
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for readout in (linear_readout(classifier), knn_readout(bank, labels, neighbours=7)):
        targets = readout.targets(wanted)
        np.testing.assert_array_equal(targets, [0, 3, -1, -1, -1, *[2] * 10])

        def losses(point, readout=readout, targets=targets):
            return readout.losses(readout.arrays, point, targets)

        value, slope = losses(jnp.asarray(queries)), jax.grad(lambda point: jnp.sum(losses(point)))(queries)
        assert np.isfinite(slope).all() and (np.asarray(slope)[2:5] == 0).all() and (np.asarray(value)[2:5] == 0).all()
        assert (np.asarray(slope)[5:] != 0).any()
    known = targets >= 0
    value = linear_readout(classifier).losses(linear_readout(classifier).arrays, jnp.asarray(queries), targets)
    np.testing.assert_allclose(np.asarray(value)[known], -np.log(shares[known, targets[known]]), rtol=1e-4, atol=1e-5)


# ---- From the command line ---------------------------------------------------------------------------------------------

SETTINGS = {
    "data.source": "shapes:train",
    "data.eval_source": "shapes:test",
    "data.resize": 8,
    "data.crop": 8,
    "runtime.num_devices": 1,
    "runtime.batch_size": 16,
    "test_images": 20,  # a whole batch and a part of one
    "neighbours": 5,
    "attack.epsilons": "(0.0,2.0,8.0)",
    "attack.steps": 3,
    "corruptions": '("shot_noise","pixelate")',
}


def words(workdir, checkpoint, **settings):
    return evaluation_words("robustness.py:family=cifar", workdir, checkpoint=checkpoint, **SETTINGS | settings)


def evaluate(workdir, checkpoint, **settings):
    return main.main(["hexa", *words(workdir, checkpoint, **settings)])


@pytest.fixture(scope="module")
def checkpoint():
    return finished("moco")[0]


@pytest.fixture(scope="module")
def judged(checkpoint, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("robustness") / "run"
    ended = run_process(words(workdir, checkpoint))
    assert ended.code == 0, ended.stderr
    return workdir, ended.stdout


def test_the_table_has_both_networks_and_no_attack_helps(judged):
    workdir, output = judged
    values = result(workdir)
    assert values["test_images"] == 20 and values["train_images"] == 70
    for readout in ("knn", "linear"):
        for end in ("", "_random"):
            accuracies = [values[f"{readout}_{name}{end}"] for name in ("clean", "linf0", "linf2", "linf8")]
            assert accuracies[0] == accuracies[1] >= accuracies[2] >= accuracies[3]
            for name in ("shot_noise", "pixelate"):
                strengths = [values[f"{readout}_{name}_{strength}{end}"] for strength in STRENGTHS]
                assert values[f"{readout}_{name}{end}"] == pytest.approx(np.mean(strengths))
            means = [values[f"{readout}_{name}{end}"] for name in ("shot_noise", "pixelate")]
            assert values[f"{readout}_corruption{end}"] == pytest.approx(np.mean(means))
    assert any(values[f"{r}_linf8{e}"] < values[f"{r}_clean{e}"] for r in ("knn", "linear") for e in ("", "_random"))
    table = (workdir / "robustness.md").read_text()
    assert table in output
    cells = " | ".join(f"{values[f'{r}_linf8{e}']:.1f}" for r in ("knn", "linear") for e in ("", "_random"))
    assert f"| attack, 8 of 255 | {cells} |" in table
    assert "kNN, pre-trained | kNN, random | linear, pre-trained | linear, random" in table
    for name in ("robustness.png", "corruptions.png"):
        assert cv2.imread(str(workdir / "report" / name)).std() > 10


def test_clean_images_give_what_the_knn_evaluation_gives(judged, checkpoint, tmp_path):
    settings = SETTINGS | {"neighbours": "(5,)", "temperatures": "(0.07,)"}
    settings = {k: v for k, v in settings.items() if k.startswith(("data", "runtime", "neigh", "temp"))}
    assert main.main(["hexa", *evaluation_words("knn.py", tmp_path / "knn", checkpoint=checkpoint, **settings)]) == 0
    everything = evaluate(
        tmp_path / "run", checkpoint, **{"test_images": 0, "attack.epsilons": "()", "corruptions": "()"}
    )
    assert everything == 0
    assert result(tmp_path / "run")["knn_clean"] == pytest.approx(result(tmp_path / "knn")["knn_accuracy"])
    assert result(tmp_path / "run")["test_images"] == result(tmp_path / "knn")["test_images"] > 20


def test_a_second_start_does_only_what_is_left(judged, checkpoint, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    settings = {"with_random": False}
    assert evaluate(workdir, checkpoint, **settings) == 0
    expected = result(workdir)
    assert expected == {name: value for name, value in result(judged[0]).items() if not name.endswith("_random")}
    part = workdir / "pre-trained" / "test_images_000016.json"
    saved = json.loads(part.read_text())
    del saved["values"]["linf8"], saved["values"]["pixelate_5"]
    part.write_text(json.dumps(saved))
    (workdir / "result.json").unlink()
    batches = []
    pixels = robustness._Batch.pixels.func
    counted = property(lambda batch: batches.append(int(batch.positions[0])) or pixels(batch))
    monkeypatch.setattr(robustness._Batch, "pixels", counted)
    assert evaluate(workdir, checkpoint, **settings) == 0
    assert result(workdir) == expected
    assert set(batches) == {16}


def test_several_devices_give_the_same_classes(judged, checkpoint, tmp_path):
    workdir = tmp_path / "run"
    assert evaluate(workdir, checkpoint, **{"with_random": False, "runtime.num_devices": 4}) == 0
    assert result(workdir) == {k: v for k, v in result(judged[0]).items() if not k.endswith("_random")}


def test_images_that_cannot_be_read_do_not_count(checkpoint, tmp_path):
    paths = image_folder(tmp_path / "test", count=12)
    paths[3].write_bytes(b"\x89PNG\r\n\x1a\n broken")
    image_folder(tmp_path / "train", count=30)
    data = {f"data.{key}": f"folder:{tmp_path / name}" for key, name in (("source", "train"), ("eval_source", "test"))}
    settings = data | {"with_random": False, "corruptions": "()", "attack.epsilons": "(1.0,)", "test_images": 0}
    assert evaluate(tmp_path / "run", checkpoint, **settings) == 0
    assert result(tmp_path / "run")["test_images"] == 11
    assert (result(tmp_path / "run")["knn_clean"] * 11 / 100) % 1 == pytest.approx(0, abs=1e-6)


def test_random_weights_alone_and_a_random_start(tmp_path):
    network = {"random.backbone": "resnet10", "random.base_channels": 2, "random.stem": "cifar"}
    settings = network | {"attack.random_start": True, "attack.epsilons": "(4.0,)", "corruptions": "()"}
    data = {"data.source": "shapes:train", "data.eval_source": "shapes:test", "data.limit": 60}
    assert evaluate(tmp_path / "run", "random", **settings, **data) == 0
    values = result(tmp_path / "run")
    assert {"knn_clean", "knn_linf4"} <= values.keys() and not any(name.endswith("_random") for name in values)
    assert values["linear_linf4"] <= values["linear_clean"]


def test_mistakes_are_one_line(checkpoint, tmp_path, capsys):
    cases = {
        "config.corruptions='fog' is not known: use one of": {"corruptions": '("fog",)'},
        "corruptions has an entry twice": {"corruptions": '("contrast","contrast")'},
        "takes a tuple of texts, such as": {"corruptions": "(1,2)"},
        "attack.steps and attack.relative_step must be positive": {"attack.steps": 0},
        "must not be negative": {"attack.epsilons": "(-1.0,)"},
        "attack.epsilons has an entry twice": {"attack.epsilons": "(1.0,1.0)"},
        "neighbours, temperature and regularization must be positive": {"neighbours": 0},
        "config.family='svhn' is not known": {"family": "svhn"},
    }
    for number, (message, settings) in enumerate(cases.items()):
        check_refused(words(tmp_path / f"run{number}", checkpoint, **settings), message, capsys)
        assert not (tmp_path / f"run{number}").exists()


def test_the_config_names_every_corruption():
    from configs.eval import robustness as config

    assert config.get_config().corruptions == CORRUPTIONS
    assert config.get_config("family=cifar").family == "cifar"
    assert config.get_config().attack.epsilons == (1.0, 2.0, 4.0, 8.0)
