"""Linear SVMs on features of Pascal VOC 2007: config.task = "svm" and "lowshot".

Two published protocols differ in what they train on, how they choose the cost, and what they do
with difficult examples:

    pcl     (the paper's) cost: the best of the list on the test images; difficult counts as absent, in training and test
    goyal   cost: per class by 3-fold cross-validation on the training images; difficult counts as absent in the folds and is
            left out of the test (facebookresearch/fair_self_supervision_benchmark)

Both: LIBLINEAR with squared hinge, L2 and class weights 2 : 1 on features of unit length; AP is the
area under the monotone precision-recall curve; mAP the mean over classes.

Legend: N images, F features, C classes, k positives per class.
"""

import functools
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import DataError
from hexa_jax.data.voc import ABSENT, DIFFICULT, PRESENT, open_voc
from hexa_jax.evals.average_precision import average_precision
from hexa_jax.evals.tasks.labelled import Extractor, open_backbone
from hexa_jax.report.pictures import error_bars
from hexa_jax.storage.workdir import Finished, write_json

PROTOCOLS = ("pcl", "goyal")
POWERS = tuple(0.5**exponent for exponent in range(4, 20))  # goyal's costs besides the listed ones
NEGATIVES = 19  # goyal's low-shot: so many negatives per positive


def unit_rows(features: np.ndarray) -> np.ndarray:
    """x / (|x| + 1e-5), float64."""
    features = np.asarray(features, np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def _svm(cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        intercept_scaling=1.0,
        tol=1e-4,
        dual=True,
        max_iter=2000,
        random_state=0,
    )


def _fit(features: np.ndarray, signs: np.ndarray, cost: float) -> LinearSVC | None:
    if len(np.unique(signs)) < 2:
        return None  # LIBLINEAR needs both
    with warnings.catch_warnings():
        # the budget of iterations is the protocol's
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _svm(cost).fit(features, signs)


def class_ap(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    cost: float,
    protocol: str,
) -> float:
    """AP of one class.

    Args:
        train: float [N, F], rows that the classifier may see.
        train_labels: [N] PRESENT, DIFFICULT or ABSENT.
        test: float [Q, F].
        test_labels: [Q], the same.
        cost: C of the SVM.
        protocol: "pcl" or "goyal".

    Returns:
        AP, 0 to 1; NaN where the class has no positive in the test, or only one sign in training.
    """
    classifier = _fit(train, np.where(train_labels == PRESENT, 1, -1), cost)
    if classifier is None:
        return float("nan")
    scores = classifier.decision_function(test)
    kept = np.full(len(test), True) if protocol == "pcl" else test_labels != DIFFICULT
    return average_precision((test_labels == PRESENT)[kept], scores[kept])


def choose_cost(features: np.ndarray, labels: np.ndarray, costs: Sequence[float]) -> float:
    """Choose the cost with the best mean average precision over 3 folds (goyal)."""
    signs = np.where(labels == PRESENT, 1, -1)
    folds = min(3, int(np.sum(signs == 1)), int(np.sum(signs == -1)))
    if folds < 2:
        return costs[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = [
            np.mean(
                cross_val_score(_svm(cost), features, signs, cv=folds, scoring="average_precision")
            )
            for cost in costs
        ]
    return costs[int(np.argmax(scores))]


def low_shot_rows(
    matrix: np.ndarray, k: int, protocol: str, rng: np.random.Generator
) -> list[np.ndarray]:
    """Training rows of each class for k positives.

    pcl: the same rows for every class, the union over classes of k random positives, with all their
        labels.
    goyal: for each class k random positives and 19 k random negatives; difficult images are
        neither.

    Args:
        matrix: int [N, C] of PRESENT, DIFFICULT, ABSENT.
        k: positives per class; all of them where there are fewer.
        protocol: "pcl" or "goyal".
        rng: draws the rows.

    Returns:
        C arrays of row numbers, ascending.
    """

    def draw(rows: np.ndarray, count: int) -> np.ndarray:
        return rng.choice(rows, min(count, len(rows)), replace=False)

    positives = [draw(np.flatnonzero(column == PRESENT), k) for column in matrix.T]
    if protocol == "pcl":
        return [np.unique(np.concatenate(positives))] * matrix.shape[1]
    negatives = [draw(np.flatnonzero(column == ABSENT), NEGATIVES * k) for column in matrix.T]
    return [np.sort(np.concatenate(pair)) for pair in zip(positives, negatives, strict=True)]


def _check(config: ConfigDict) -> None:
    if config.protocol not in PROTOCOLS:
        raise ConfigError(
            f"config.protocol={config.protocol!r} is not known: use one of {', '.join(PROTOCOLS)}"
        )
    if not config.costs:
        raise ConfigError("config.costs is empty")
    if not config.data.source or not config.data.eval_source:
        raise ConfigError(
            "data.source and data.eval_source are needed, such as voc:VOCDEVKIT:trainval and "
            "voc:VOCDEVKIT:test"
        )


class _Data:
    """Features and labels of both splits."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        backbone = open_backbone(config)
        where = config.runtime.data_dir or None, config.runtime.data_cache
        train, test = (
            open_voc(spec, *where) for spec in (config.data.source, config.data.eval_source)
        )
        if train.class_names != test.class_names:
            raise DataError(
                "training and held-out images have other classes: are they of the same data set?"
            )
        extractor = Extractor(config, backbone, workdir / "features")
        both = [
            extractor(source, what)
            for source, what in ((train, "training features"), (test, "held-out features"))
        ]
        self.names = train.class_names
        self.step = backbone.step
        self.train, self.test = (unit_rows(features.values[features.known]) for features in both)
        self.labels, self.wanted = (
            source.matrix[features.known]
            for source, features in zip((train, test), both, strict=True)
        )


def svm(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """mAP on all training images; returns what `result.json` holds."""
    _check(config)
    data = _Data(config, workdir)
    finished = Finished(workdir / "classes.json", data.step)
    table, chosen = {}, {}
    clock = StepTimer(1, len(data.names))

    def one_class(number: int) -> dict[str, Any]:
        labels, wanted = data.labels[:, number], data.wanted[:, number]
        costs = tuple(config.costs)
        if config.protocol == "goyal":
            costs = (choose_cost(data.train, labels, tuple(sorted({*costs, *POWERS}))),)
        ap = [
            class_ap(data.train, labels, data.test, wanted, cost, config.protocol) for cost in costs
        ]
        return {"costs": costs, "ap": ap}

    for number, name in enumerate(data.names):
        found = finished.get(name, functools.partial(one_class, number))
        table[name] = found["ap"]
        if config.protocol == "goyal":
            chosen[f"cost_{name}"] = found["costs"][0]
        log(
            f"{name:14}AP {100 * np.nanmax([*table[name], 0]):6.2f} %   ETA "
            f"{clock.read(number + 1)[1]}"
        )
    ap = np.array(list(table.values()))  # [C, costs]
    means = np.nanmean(ap, axis=0)
    best = int(np.argmax(means))
    results: dict[str, Any] = {
        "map": 100 * float(means[best]),
        "pretraining_step": data.step,
        **chosen,
    }
    results |= {
        f"ap_{name}": 100 * float(value)
        for name, value in zip(data.names, ap[:, best], strict=True)
        if value == value
    }
    if config.protocol == "pcl":
        results |= {
            f"map_cost{cost:g}": 100 * float(mean)
            for cost, mean in zip(config.costs, means, strict=True)
        }
    write_json(workdir / "result.json", results)
    log(f"mAP {results['map']:.2f} %")
    return results


def lowshot(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Compute mAP with k positives per class; return what `result.json` holds."""
    _check(config)
    if not config.shots or config.draws < 1:
        raise ConfigError("config.shots must not be empty, and config.draws positive")
    data = _Data(config, workdir)
    costs = (
        tuple(config.costs) if config.protocol == "pcl" else tuple(sorted({*config.costs, *POWERS}))
    )
    results: dict[str, Any] = {"pretraining_step": data.step}
    means, deviations = [], []
    clock = StepTimer(1, len(config.shots))
    finished = Finished(workdir / "shots.json", data.step)

    def draws(k: int) -> list[list[float]]:
        return [
            [_low_shot_map(data, config, k, draw, cost) for cost in costs]
            for draw in range(config.draws)
        ]

    for done, k in enumerate(config.shots, 1):
        table = np.array(finished.get(f"k{k}", functools.partial(draws, k)))
        # both protocols pick the cost with the best mean on the test images
        best = int(np.argmax(table.mean(axis=0)))
        values = 100 * table[:, best]
        means.append(float(values.mean()))
        deviations.append(float(values.std(ddof=1)) if config.draws > 1 else 0.0)
        results |= {f"map_k{k}": means[-1], f"std_k{k}": deviations[-1], f"cost_k{k}": costs[best]}
        log(f"k = {k:<4}mAP {means[-1]:6.2f} ± {deviations[-1]:.2f} %   ETA {clock.read(done)[1]}")
    report = workdir / "report"
    report.mkdir(exist_ok=True)
    error_bars(
        config.shots,
        {config.protocol: (means, deviations)},
        "labelled images per class",
        "mAP in %",
        report / "lowshot.png",
    )
    write_json(workdir / "result.json", results)
    return results


def _low_shot_map(data: _Data, config: ConfigDict, k: int, draw: int, cost: float) -> float:
    # pcl draws anew for every cost and run, goyal has one list per run.
    entropy = [config.seed, k, draw]
    if config.protocol == "pcl":
        entropy.append(int(np.float64(cost).view(np.uint64) % 2**32))
    rows = low_shot_rows(data.labels, k, config.protocol, np.random.default_rng(entropy))
    aps = [
        class_ap(
            data.train[chosen],
            data.labels[chosen, number],
            data.test,
            data.wanted[:, number],
            cost,
            config.protocol,
        )
        for number, chosen in enumerate(rows)
    ]
    return float(np.nanmean(aps))
