"""Transfer to several data sets: draws, the classifier, and the whole evaluation from the command line."""

import itertools
import json

import cv2
import numpy as np
import pytest
from command_line import check_refused, evaluation_words, finished, image_folder, result
from command_line import run as run_process
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from configs.eval import transfer as protocol
from hexa_jax import main
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.linear import fit_linear
from hexa_jax.evals.stored_features import StoredFeatures, join
from hexa_jax.evals.tasks import transfer
from hexa_jax.evals.tasks.transfer import Readout, Target, draw_rows, parse_targets

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [40, 25, 3]))


# ---- Targets and draws -------------------------------------------------------------------------------------------------


def test_targets_are_parsed():
    texts = protocol.get_config().targets
    assert parse_targets(texts) == [
        Target("cifar10", "tfds:cifar10:train", "tfds:cifar10:test"),
        Target("cifar100", "tfds:cifar100:train", "tfds:cifar100:test"),
    ]
    assert parse_targets(["a=folder:/x=y/train, folder:b"]) == [Target("a", "folder:/x=y/train", "folder:b")]


@pytest.mark.parametrize("wrong", [[], ["tfds:cifar10"], ["a=b"], ["../a=b,c"], ["a=b,c,d"], ["a=b,c", "a=d,e"]])
def test_other_targets_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"config\.targets"):
        parse_targets(wrong)


def test_draws_are_nested_and_of_every_class():
    shots = [draw_rows(LABELS, Readout("", "", shots=k), seed=1, draw=2) for k in (1, 2, 4, 8)]
    for k, rows in zip((1, 2, 4, 8), shots, strict=True):
        np.testing.assert_array_equal(np.bincount(LABELS[rows]), [k, k, 0, 0, min(k, 3)])
        assert len(set(rows)) == len(rows) and (np.diff(rows) > 0).all()
    for small, large in itertools.pairwise(shots):
        assert set(small) < set(large)
    tenth = draw_rows(LABELS, Readout("", "", percent=10.0), seed=1, draw=2)
    np.testing.assert_array_equal(np.bincount(LABELS[tenth]), [4, 3, 0, 0, 1])  # at least one of each
    assert set(shots[0]) < set(tenth)


def test_draws_are_functions_of_seed_and_number():
    readout = Readout("", "", shots=5)
    first = draw_rows(LABELS, readout, seed=1, draw=0)
    np.testing.assert_array_equal(first, draw_rows(LABELS, readout, seed=1, draw=0))
    others = [draw_rows(LABELS, readout, seed=seed, draw=draw) for seed, draw in ((1, 1), (2, 0))]
    assert all(set(first) != set(other) for other in others)
    alone = LABELS == 1  # what is drawn of a class does not depend on the others
    own = np.flatnonzero(alone)[draw_rows(LABELS[alone], readout, seed=1, draw=0)]
    np.testing.assert_array_equal(own, first[LABELS[first] == 1])


@pytest.mark.parametrize(
    ("percent", "size", "count"), [(1, 100, 1), (7, 100, 7), (1, 101, 2), (10, 5, 1), (10, 5000, 500)]
)
def test_shares_are_rounded_up(percent, size, count):
    assert Readout("", "", percent=percent).count(size) == count


# ---- The classifier ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_logits_are_scikit_learns(classes):
    """Also with two classes, of which scikit-learn keeps one column; and with the statistics of other features."""
    rng = np.random.default_rng(3)
    x, other = rng.normal(3, 2, (50, 4)), rng.normal(1, 5, (90, 4))
    labels = np.array([4, 6, 9])[np.arange(50) % classes]
    x[:, 0] += labels
    for statistics in (None, other):
        classifier = fit_linear(x, labels, regularization=0.01, statistics_of=statistics)
        scaler = StandardScaler().fit(x if statistics is None else statistics)
        wanted = LogisticRegression(C=1 / 0.5, max_iter=200).fit(scaler.transform(x), labels)
        queries = scaler.transform(other)
        logits = queries @ classifier.kernel + classifier.bias
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(shares, wanted.predict_proba(queries), atol=1e-9)
        np.testing.assert_array_equal(classifier.predict(other), wanted.predict(queries))


# ---- From the command line ---------------------------------------------------------------------------------------------

SETTINGS = {
    "data.resize": 8,
    "data.crop": 8,
    "runtime.num_devices": 1,
    "runtime.batch_size": 32,
    "percents": "(10.0,)",
    "shots": "(1,4)",
    "draws": 3,
}


def words(workdir, checkpoint, **settings):
    return evaluation_words("transfer.py", workdir, checkpoint=checkpoint, **SETTINGS | settings)


def evaluate(workdir, checkpoint, **settings):
    return main.main(["hexa", *words(workdir, checkpoint, **settings)])


@pytest.fixture(scope="module")
def checkpoint():
    return finished("moco")[0]


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    for name, count in (("train", 40), ("test", 20)):
        image_folder(root / name, count=count)
    return f'("shapes=shapes:train,shapes:test", "own=folder:{root}/train,folder:{root}/test")'


@pytest.fixture(scope="module")
def judged(checkpoint, targets, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("transfer") / "run"
    ended = run_process(words(workdir, checkpoint, targets=targets))
    assert ended.code == 0, ended.stderr
    return workdir, ended.stdout


def stored(workdir, network, target, split):
    folder = workdir / network / target / "features" / f"{target}_{split}_features"
    return join(StoredFeatures(folder, json.loads((folder / "about.json").read_text())).load())


def test_every_number_is_that_of_the_stored_features(judged):
    workdir, _ = judged
    values = result(workdir)
    assert (values["own_train_images"], values["own_test_images"]) == (40, 20)
    for target in ("shapes", "own"):
        for network, end in (("pre-trained", ""), ("random", "_random")):
            train, test = (stored(workdir, network, target, split) for split in ("training", "test"))

            def accuracy(rows, train=train, test=test):
                x, labels = train.values[rows].astype(np.float64), train.labels[rows]
                scaler = StandardScaler().fit(train.values)
                fitted = LogisticRegression(C=1e4 / len(x), max_iter=200)
                fitted.fit(scaler.transform(x), labels)
                return 100 * np.mean(fitted.predict(scaler.transform(test.values.astype(np.float64))) == test.labels)

            assert values[f"{target}_linear{end}"] == pytest.approx(accuracy(slice(None)), abs=100 / len(test.labels))
            for key, readout in {"k4": Readout("", "", shots=4), "10pct": Readout("", "", percent=10.0)}.items():
                draws = [accuracy(draw_rows(train.labels, readout, 0, draw)) for draw in range(3)]
                assert values[f"{target}_{key}{end}"] == pytest.approx(np.mean(draws), abs=100 / len(test.labels))
                tolerance = 100 / len(test.labels)
                assert values[f"{target}_{key}_std{end}"] == pytest.approx(np.std(draws, ddof=1), abs=tolerance)


def test_the_table_has_a_row_per_target_and_readout(judged):
    workdir, output = judged
    values, table = result(workdir), (workdir / "transfer.md").read_text()
    assert table in output
    rows = [line for line in table.splitlines() if line.startswith(("| shapes", "| own"))]
    assert len(rows) == 2 * 4
    assert f"| own | all labels | {values['own_linear']:.1f} | {values['own_linear_random']:.1f} |" in rows
    cells = [f"{values[f'own_k4{end}']:.1f} ± {values[f'own_k4_std{end}']:.1f}" for end in ("", "_random")]
    assert f"| own | 4 per class | {cells[0]} | {cells[1]} |" in rows
    for name in ("shapes", "own"):
        assert cv2.imread(str(workdir / "report" / f"{name}.png")).std() > 10


def test_a_second_start_does_only_what_is_left(judged, checkpoint, targets, tmp_path, monkeypatch):
    workdir, settings = tmp_path / "run", {"targets": targets, "with_random": False}
    assert evaluate(workdir, checkpoint, **settings) == 0
    expected = result(workdir)
    assert expected == {name: value for name, value in result(judged[0]).items() if not name.endswith("_random")}
    part = workdir / "pre-trained" / "own" / "readouts.json"
    saved = json.loads(part.read_text())
    del saved["values"]["k4 draw 1"]
    part.write_text(json.dumps(saved))
    (workdir / "result.json").unlink()
    fitted, fit = [], transfer.fit_linear
    monkeypatch.setattr(transfer, "fit_linear", lambda *a, **k: fitted.append(len(a[0])) or fit(*a, **k))
    monkeypatch.setattr("hexa_jax.evals.features.EvalImages.image", lambda *_: pytest.fail("an image was read again"))
    assert evaluate(workdir, checkpoint, **settings) == 0
    assert result(workdir) == expected
    assert fitted == [12]  # 4 of each of 3 classes


def test_mistakes_are_one_line(checkpoint, tmp_path, capsys):
    flat = tmp_path / "flat"
    image_folder(flat, by_class=False, count=3)
    cases = {
        "config.targets has 'tfds:cifar10': it takes NAME=TRAIN,TEST": {"targets": '("tfds:cifar10",)'},
        "takes a tuple of texts, such as": {"targets": "(1,)"},
        "config.targets is empty": {"targets": "()"},
        "mine: folder:": {"targets": f'("mine=folder:{flat},folder:{flat}",)'},
        "does not exist": {"targets": '("mine=folder:nowhere,folder:nowhere",)'},
        "config.shots=(0,) must be positive": {"shots": "(0,)"},
        "config.percents=(100.0,) must be above 0 and below 100": {"percents": "(100.0,)"},
        "config.percents or config.shots has k2 twice": {"shots": "(2,2)"},
        "draws, iterations and regularization must be positive": {"draws": 0},
        "data.list names images of one data set": {"data.list": "list.txt"},
    }
    for number, (message, settings) in enumerate(cases.items()):
        check_refused(words(tmp_path / f"run{number}", checkpoint, **settings), message, capsys)
        assert not (tmp_path / f"run{number}").exists()
