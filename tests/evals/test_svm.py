"""VOC protocols by hand: average precision, the rows of low-shot training, the cost, and what difficult images count as."""

import json
import types
import warnings
from itertools import combinations

import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from hexa_jax.core.errors import ConfigError
from hexa_jax.data.voc import ABSENT, DIFFICULT, PRESENT
from hexa_jax.evals.average_precision import average_precision
from hexa_jax.evals.tasks import svm as module
from hexa_jax.evals.tasks.svm import POWERS, choose_cost, class_ap, low_shot_rows, unit_rows

PROTOCOLS = ("pcl", "goyal")


def ap(hits, scores=None):
    """AP of positives and negatives in falling order of score."""
    hits = np.array(hits, bool)
    return average_precision(hits, np.arange(len(hits), 0, -1.0) if scores is None else np.array(scores, float))


# ---- Average precision -------------------------------------------------------------------------------------------------


def test_precision_times_the_step_in_recall():
    assert ap([1, 0, 1]) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)  # recall 1/2 at precision 1, then 1 at 2/3
    assert ap([0, 0, 0, 1]) == pytest.approx(1 / 4)
    assert ap([1, 1, 0, 0]) == ap([1]) == ap([1, 1]) == 1


def test_precision_is_made_monotone():
    # Precision 0, 1/2, 2/3, 2/4, 3/5 becomes 2/3, 2/3, 2/3, 3/5, 3/5; recall rises by 1/3 at the second, third and fifth.
    assert ap([0, 1, 1, 0, 1]) == pytest.approx(1 / 3 * 2 / 3 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 5)
    # As it is, it would be less: scikit-learn's AP does not do it.
    assert average_precision_score([0, 1, 1, 0, 1], [5, 4, 3, 2, 1]) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)


def test_scores_give_the_order():
    assert ap([1, 0, 1], [-0.5, 7, 3]) == pytest.approx(2 / 3)  # 0, 1/2, 2/3, made 2/3, 2/3, 2/3


def test_equal_scores_count_in_the_order_given():
    assert ap([1, 0], [3, 3]) == 1 and ap([0, 1], [3, 3]) == 1 / 2
    # Many, of three values: Python's own sort keeps the order of equals.
    rng = np.random.default_rng(0)
    hits, scores = rng.random(500) < 0.3, rng.integers(0, 3, 500)
    order = sorted(range(500), key=lambda row: -scores[row])
    assert ap(hits, scores) == ap(hits[order])


def test_nothing_to_find_is_not_a_number():
    assert np.isnan(ap([0, 0, 0])) and np.isnan(ap([]))


def test_is_the_area_of_the_benchmark():
    """The lines of svm_helper.py: precision and recall with both ends, and the points where recall changes."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        hits, scores = rng.random(30) < 0.3, rng.normal(size=30)
        order = np.argsort(scores)[::-1]
        recall = np.concatenate([[0], np.cumsum(hits[order]) / hits.sum(), [1]])
        precision = np.concatenate([[0], np.cumsum(hits[order]) / np.arange(1, 31), [0]])
        for i in range(len(precision) - 1, 0, -1):
            precision[i - 1] = max(precision[i - 1], precision[i])
        (i,) = np.where(recall[1:] != recall[:-1])
        assert average_precision(hits, scores) == pytest.approx(np.sum((recall[i + 1] - recall[i]) * precision[i + 1]))


# ---- Rows of low-shot training -----------------------------------------------------------------------------------------


def rows(matrix, k, protocol, seed=0):
    return [found.tolist() for found in low_shot_rows(matrix, k, protocol, np.random.default_rng(seed))]


SMALL = np.array([[1, -1], [0, 1], [-1, -1], [1, -1], [1, 0], [-1, 1], [1, 1]], np.int8)  # 0, 3, 4, 6 and 1, 5, 6


def test_pcl_is_the_union_over_classes_with_the_same_rows_for_all():
    drawn = [rows(SMALL, 1, "pcl", seed) for seed in range(200)]
    assert all(first == second for first, second in drawn)
    # One of the four positives of the first class and one of the three of the second; row 6 may be both.
    expected = {tuple(sorted({a, b})) for a in (0, 3, 4, 6) for b in (1, 5, 6)}
    assert {tuple(first) for first, _ in drawn} == expected and (6,) in expected
    pairs = {tuple(sorted({*a, *b})) for a in combinations((0, 3, 4, 6), 2) for b in combinations((1, 5, 6), 2)}
    assert {tuple(rows(SMALL, 2, "pcl", seed)[0]) for seed in range(500)} == pairs


def test_pcl_takes_all_where_there_are_fewer():
    assert rows(SMALL, 4, "pcl") == rows(SMALL, 99, "pcl") == [[0, 1, 3, 4, 5, 6]] * 2
    (first, second) = rows(SMALL, 3, "pcl")  # all of 1, 5, 6, and three of 0, 3, 4, 6
    assert first == second and set(first) > {1, 5, 6} and len(set(first) & {0, 3, 4, 6}) >= 3


def wide(negatives=50):
    """Class 0: positives 0 to 3, difficult 4 and 5, the rest absent. Class 1: the same from the other end."""
    column = np.array([PRESENT] * 4 + [DIFFICULT] * 2 + [ABSENT] * negatives, np.int8)
    return np.stack([column, column[::-1]], axis=1)


@pytest.mark.parametrize("k", [1, 2])
def test_goyal_has_nineteen_negatives_for_each_positive(k):
    drawn = [rows(wide(), k, "goyal", seed) for seed in range(100)]
    for first, second in drawn:
        assert first == sorted(set(first)) and second == sorted(set(second))
        assert len(first) == len(second) == 20 * k
        assert sum(row < 4 for row in first) == k and sum(row >= 52 for row in second) == k
        assert not {4, 5} & set(first) and not {50, 51} & set(second)  # difficult
    assert {row for first, _ in drawn for row in first} == set(range(56)) - {4, 5}
    assert {row for _, second in drawn for row in second} == set(range(56)) - {50, 51}
    assert len({tuple(row for row in first if row < 4) for first, _ in drawn}) == [4, 6][k - 1]  # 4 choose k


def test_goyal_takes_all_where_there_are_fewer():
    positives_run_out = rows(wide(200), 9, "goyal")[0]
    assert [row for row in positives_run_out if row < 6] == [0, 1, 2, 3] and len(positives_run_out) == 4 + 19 * 9
    assert rows(wide(50), 3, "goyal")[0][3:] == list(range(6, 56))  # 50 negatives are fewer than 57


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_draws_differ_and_come_again(protocol):
    matrix = np.where(np.random.default_rng(1).random((300, 4)) < 0.3, PRESENT, ABSENT)
    first, again, other = (rows(matrix, 4, protocol, seed) for seed in (0, 0, 1))
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    rng = np.random.default_rng(0)
    following = [low_shot_rows(matrix, 4, protocol, rng)[0].tolist() for _ in range(2)]
    assert following[0] == first[0] and following[1] != first[0]


# ---- The SVM of a class ------------------------------------------------------------------------------------------------


def test_rows_of_unit_length():
    got = unit_rows(np.array([[3, 4], [0, 0], [0, -2e-5]], np.float32))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, [[3 / 5.00001, 4 / 5.00001], [0, 0], [0, -2 / 3]], rtol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_difficult_images_are_negatives_in_training(protocol):
    """The positive is at 0, the absent one at -1, and five difficult ones at 1: as negatives they turn the slope round."""
    train = np.array([[0.0], [-1.0]] + [[1.0]] * 5)
    test, wanted = np.array([[3.0], [-3.0]]), np.array([ABSENT, PRESENT])
    labels = np.array([PRESENT, ABSENT] + [DIFFICULT] * 5)
    assert class_ap(train, labels, test, wanted, 1.0, protocol) == 1
    assert class_ap(train[:2], labels[:2], test, wanted, 1.0, protocol) == 1 / 2  # without them


def test_difficult_images_in_the_test():
    """Scores fall along the test images, so that AP is that of their order."""
    train, labels = np.array([[1.0], [-1.0]]), np.array([PRESENT, ABSENT])
    test, wanted = np.array([[4.0], [3.0], [2.0], [1.0]]), np.array([DIFFICULT, PRESENT, ABSENT, PRESENT])
    # Negative: precision 0, 1/2, 1/3, 2/4, made 1/2 everywhere.
    assert class_ap(train, labels, test, wanted, 1.0, "pcl") == pytest.approx(1 / 2)
    # Left out: present, absent, present.
    assert class_ap(train, labels, test, wanted, 1.0, "goyal") == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_sign_alone_is_not_a_number(protocol):
    x, both, neither = np.array([[1.0], [-1.0]]), np.array([PRESENT, ABSENT]), np.array([DIFFICULT, ABSENT])
    assert np.isnan(class_ap(x, neither, x, both, 1.0, protocol))
    assert np.isnan(class_ap(x, np.array([PRESENT] * 2), x, both, 1.0, protocol))
    assert np.isnan(class_ap(x, both, x, neither, 1.0, protocol))
    assert class_ap(x, both, x, both, 1.0, protocol) == 1


SCALES = np.geomspace(0.1, 3, 8)
DIRECTION = np.random.default_rng(99).normal(size=8) / SCALES


def noisy(num=90, seed=0):
    """Features of unit length that tell the labels with doubt; features of small scale count as much, so costs matter."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, 8)) * SCALES
    score = x @ DIRECTION + 2 * rng.normal(size=num)
    return unit_rows(x), np.where(score > 3, PRESENT, np.where(score > 2, DIFFICULT, ABSENT))


def fitted(x, signs, cost, weight=2):
    """The published settings, spelled out."""
    classifier = LinearSVC(
        penalty="l2", loss="squared_hinge", C=cost, class_weight={1: weight, -1: 1}, intercept_scaling=1.0, tol=1e-4,
        dual=True, max_iter=2000, random_state=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(x, signs)


@pytest.mark.parametrize("cost", [0.01, 1.0])
def test_settings_of_the_svm(cost):
    (x, labels), (test, wanted) = noisy(), noisy(400, seed=1)
    signs, positive = np.where(labels == PRESENT, 1, -1), wanted == PRESENT
    got = class_ap(x, labels, test, wanted, cost, "pcl")
    assert got == average_precision(positive, fitted(x, signs, cost).decision_function(test))
    for other in (fitted(x, signs, cost, weight=1), fitted(x, signs, 10 * cost)):
        assert got != average_precision(positive, other.decision_function(test))


COSTS = (1e-4, 0.001, 0.01, 0.1, 1.0, 10.0)


def mean_ap(x, signs, cost, folds=3):
    """Mean of scikit-learn's average precision over stratified folds in order."""
    found = []
    for train, held in StratifiedKFold(folds).split(x, signs):
        scores = fitted(x[train], signs[train], cost).decision_function(x[held])
        found.append(average_precision_score(signs[held] == 1, scores))
    return np.mean(found)


def test_cost_by_cross_validation():
    chosen, as_positives = [], []
    for seed in range(6):
        x, labels = noisy(seed=seed)
        expected = [mean_ap(x, np.where(labels == PRESENT, 1, -1), cost) for cost in COSTS]
        assert choose_cost(x, labels, COSTS) == COSTS[int(np.argmax(expected))]
        chosen.append(int(np.argmax(expected)))
        as_positives.append(int(np.argmax([mean_ap(x, np.where(labels == ABSENT, -1, 1), cost) for cost in COSTS])))
    assert len(set(chosen)) > 2 and chosen != as_positives  # a constant, or difficult ones as positives, would fail


def test_the_first_of_equal_costs():
    x, labels = np.linspace(-1, 1, 30)[:, None], np.repeat([ABSENT, PRESENT], 15)
    assert [mean_ap(x, labels, cost) for cost in (10.0, 1.0)] == [1, 1]
    assert choose_cost(x, labels, (10.0, 1.0)) == 10.0 and choose_cost(x, labels, (1.0, 10.0)) == 1.0


def test_cost_with_few_positives():
    """Two give two folds; a single one cannot be split, and the first cost is taken."""
    best = []
    for seed in range(8):
        x, labels = noisy(40, seed=seed)
        few = np.where(np.arange(40) < 2, PRESENT, np.where(labels == PRESENT, DIFFICULT, labels))
        expected = [mean_ap(x, np.where(few == PRESENT, 1, -1), cost, folds=2) for cost in COSTS]
        best.append(COSTS[int(np.argmax(expected))])
        assert choose_cost(x, few, COSTS) == best[-1]
        few[1] = ABSENT
        assert choose_cost(x, few, COSTS[::-1]) == COSTS[-1] and choose_cost(x, few, COSTS) == COSTS[0]
    assert set(best) - {COSTS[0]}


# ---- The tasks, on features that are given -----------------------------------------------------------------------------


def settings(protocol, **more):
    config = {"protocol": protocol, "costs": (0.003, 0.5), "seed": 0, "data": {"source": "a", "eval_source": "b"}}
    return ConfigDict(config | more)


@pytest.fixture
def given(monkeypatch):
    """What `_Data` computes: three classes that share features."""
    (x, _), (test, _) = noisy(120), noisy(300, seed=1)
    weights = np.random.default_rng(2).normal(size=(8, 3))

    def labels(features, seed):
        scores = features @ weights + 0.4 * np.random.default_rng(seed).normal(size=(len(features), 3))
        return np.where(scores > 0.9, PRESENT, np.where(scores > 0.7, DIFFICULT, ABSENT))

    data = types.SimpleNamespace(
        names=["cat", "dog", "train"], step=7, train=x, test=test, labels=labels(x, 3), wanted=labels(test, 4)
    )
    monkeypatch.setattr(module, "_Data", lambda config, workdir: data)
    return data


def test_svm_picks_pcl_cost_on_the_test_images(given, tmp_path):
    result = module.svm(settings("pcl"), tmp_path)
    table = [
        [100 * class_ap(given.train, given.labels[:, c], given.test, given.wanted[:, c], cost, "pcl") for c in range(3)]
        for cost in (0.003, 0.5)
    ]
    means = np.mean(table, axis=1)
    assert (result["map_cost0.003"], result["map_cost0.5"]) == pytest.approx(means) and means[0] != means[1]
    assert result["map"] == pytest.approx(max(means)) and result["pretraining_step"] == 7
    assert [result[f"ap_{name}"] for name in given.names] == pytest.approx(table[np.argmax(means)])
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_svm_picks_goyal_cost_per_class_on_the_training_images(given, tmp_path):
    result = module.svm(settings("goyal"), tmp_path)
    aps = []
    for c, name in enumerate(given.names):
        labels, wanted = given.labels[:, c], given.wanted[:, c]
        cost = choose_cost(given.train, labels, sorted({0.003, 0.5, *POWERS}))
        assert result[f"cost_{name}"] == cost
        aps.append(100 * class_ap(given.train, labels, given.test, wanted, cost, "goyal"))
        assert result[f"ap_{name}"] == pytest.approx(aps[-1])
    assert result["map"] == pytest.approx(np.mean(aps))
    assert len({result[f"cost_{name}"] for name in given.names}) > 1


def test_powers_are_those_of_the_benchmark():
    assert len(POWERS) == 16 and POWERS[0] == 1 / 16 and POWERS[-1] == 1 / 2**19


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_low_shot_is_mean_and_deviation_over_draws(given, tmp_path, monkeypatch, protocol):
    maps = {(2, 0.5): (0.2, 0.4, 0.9), (8, 0.5): (0.5, 0.5, 0.8)}
    other = 0.99, 0.1, 0.1  # a better draw, but a worse mean

    def low_shot_map(data, config, k, draw, cost):
        return maps.get((k, cost), other)[draw]

    monkeypatch.setattr(module, "_low_shot_map", low_shot_map)
    result = module.lowshot(settings(protocol, shots=(2, 8), draws=3), tmp_path)
    # k = 2: mean 0.5 and variance (0.09 + 0.01 + 0.16) / 2; k = 8: mean 0.6 and variance (0.01 + 0.01 + 0.04) / 2.
    assert (result["map_k2"], result["std_k2"]) == pytest.approx((50, 100 * 0.13**0.5))
    assert (result["map_k8"], result["std_k8"]) == pytest.approx((60, 100 * 0.03**0.5))
    assert result["cost_k2"] == result["cost_k8"] == 0.5
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_low_shot_draws(given):
    """pcl draws anew for each cost, goyal has one list per run; both do for each k, run and seed."""

    def seeds(protocol):
        found = []

        def remember(matrix, k, protocol, rng):
            found.append(rng.integers(2**60))
            return [np.arange(60)] * 3

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "low_shot_rows", remember)
            for seed, k, draw, cost in [(0, 2, 0, 0.5), (0, 2, 0, 0.1), (0, 4, 0, 0.5), (0, 2, 1, 0.5), (1, 2, 0, 0.5)]:
                module._low_shot_map(given, settings(protocol, seed=seed), k, draw, cost)
        return found

    assert len(set(seeds("pcl"))) == 5
    first, other_cost, *rest = seeds("goyal")
    assert first == other_cost and len({first, *rest}) == 4


def test_low_shot_improves_with_shots(given, tmp_path):
    result = module.lowshot(settings("pcl", shots=(1, 16), draws=3, costs=(0.5,)), tmp_path)
    assert 0 < result["map_k1"] < result["map_k16"] <= 100
    # All positives of every class, whatever the draw; images that show none of the classes are never there.
    everything = module.lowshot(settings("pcl", shots=(120,), draws=2, costs=(0.5,)), tmp_path)
    shown = (given.labels == PRESENT).any(axis=1)
    aps = [
        class_ap(given.train[shown], given.labels[shown, c], given.test, given.wanted[:, c], 0.5, "pcl")
        for c in range(3)
    ]
    assert 0 < shown.sum() < 120
    assert everything["std_k120"] == 0 and everything["map_k120"] == pytest.approx(100 * np.mean(aps))


def test_a_second_start_computes_what_is_missing(given, tmp_path, monkeypatch):
    (tmp_path / "once").mkdir()
    expected = module.svm(settings("pcl"), tmp_path / "once")
    calls = []

    def counted(train, train_labels, *rest):
        column = int(np.flatnonzero((given.labels == train_labels[:, None]).all(axis=0))[0])
        if column == 2 and len(calls) < 5:
            raise KeyboardInterrupt
        calls.append(column)
        return class_ap(train, train_labels, *rest)

    (tmp_path / "again").mkdir()
    monkeypatch.setattr(module, "class_ap", counted)
    with pytest.raises(KeyboardInterrupt):
        module.svm(settings("pcl"), tmp_path / "again")
    calls += ["second start"]
    assert module.svm(settings("pcl"), tmp_path / "again") == expected
    assert calls == [0, 0, 1, 1, "second start", 2, 2]  # two costs a class
    given.step = 8  # other weights: everything anew
    module.svm(settings("pcl"), tmp_path / "again")
    assert calls[7:] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("task", [module.svm, module.lowshot])
def test_mistakes_in_the_config(tmp_path, task):
    cases = {
        "config.protocol='voc' is not known: use one of pcl, goyal": settings("voc"),
        "config.costs is empty": settings("pcl", costs=()),
        "data.source and data.eval_source are needed": settings("pcl", data={"source": "", "eval_source": "b"}),
    }
    for message, config in cases.items():
        with pytest.raises(ConfigError) as caught:
            task(config, tmp_path)
        assert message in str(caught.value) and "\n" not in str(caught.value)
