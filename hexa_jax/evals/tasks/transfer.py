"""config.task = "transfer": frozen features on other data sets, all labels and few.

Features of a data set are computed once and kept, as is each read-out's result: a second start does
what is left.
"""

import functools
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import DataError, Source
from hexa_jax.evals.backbone import Backbone
from hexa_jax.evals.knn import accuracy
from hexa_jax.evals.linear import fit_linear
from hexa_jax.evals.tasks.labelled import Extractor, open_backbone, open_both, usable
from hexa_jax.evals.tasks.networks import networks, suffixed
from hexa_jax.parallel import processes
from hexa_jax.report.pictures import error_bars
from hexa_jax.storage.workdir import Finished, write_json


class Target(NamedTuple):
    """A data set to transfer to: its name, and the sources of its training and test images."""

    name: str
    train: str
    test: str


def parse_targets(texts: Sequence[str]) -> list[Target]:
    """Targets of `NAME=TRAIN,TEST` each.

    Raises:
        ConfigError: none, one of another form, or two of the same name.
    """
    targets = []
    for text in texts:
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)=([^,]+),([^,]+)", text)
        if match is None:
            raise ConfigError(
                f"config.targets has {text!r}: it takes NAME=TRAIN,TEST, such as "
                "cifar10=tfds:cifar10:train,tfds:cifar10:test"
            )
        targets.append(Target(match[1], match[2].strip(), match[3].strip()))
    names = [target.name for target in targets]
    if not names:
        raise ConfigError("config.targets is empty")
    if len(set(names)) < len(names):
        raise ConfigError(f"config.targets has {max(names, key=names.count)} twice")
    return targets


class Readout(NamedTuple):
    """How many labels a classifier may see.

    Attributes:
        key: in result.json.
        title: in the table.
        percent: of each class's images; 0: `shots` counts.
        shots: images per class.
    """

    key: str
    title: str
    percent: float = 0.0
    shots: int = 0

    @property
    def drawn(self) -> bool:
        """Whether it sees a part of the images."""
        return self.percent < 100

    def count(self, size: int) -> int:
        """Return how many images of a class of `size` to take: at least one, at most all."""
        # Rounding up, but not because 0.07 * 100 is a little more than 7.
        wanted = math.ceil(size * self.percent / 100 - 1e-9) if self.percent else self.shots
        return min(max(wanted, 1), size)


def readouts(config: ConfigDict) -> list[Readout]:
    """In the order of the table: all labels, shares, few images."""
    every = [Readout("linear", "all labels", percent=100.0)]
    every += [
        Readout(f"{p:g}pct", f"{p:g} % of the labels", percent=float(p)) for p in config.percents
    ]
    return every + [Readout(f"k{k}", f"{k} per class", shots=k) for k in config.shots]


def draw_rows(labels: np.ndarray, readout: Readout, seed: int, draw: int) -> np.ndarray:
    """Rows of the training images that a classifier sees, the same number or share of each class.

    Each class is shuffled by a generator of its own, and its first images are taken: a larger
    number of images holds the smaller one of the same draw, and what is drawn of a class does not
    depend on the others.

    Args:
        labels: int [N].
        readout: how many.
        seed: of the evaluation.
        draw: number of the draw.

    Returns:
        int64 rows, ascending.
    """
    rows = []
    for number in np.unique(labels):
        own = np.flatnonzero(labels == number)
        order = np.random.default_rng((seed, draw, int(number))).permutation(len(own))
        rows.append(own[order[: readout.count(len(own))]])
    return np.sort(np.concatenate(rows))


def transfer(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Judge the checkpoint and random weights; return what `result.json` holds.

    Numbers are top-1 accuracies in per cent: `NAME_linear` (all labels), `NAME_1pct` and `NAME_k4`
    (means over the draws, with the standard deviations `NAME_1pct_std` and `NAME_k4_std`); those of
    random weights end in `_random`.

    Raises:
        ConfigError: settings that cannot work.
        DataError: a data set without labels, with fewer than two classes, or with others in its
            test set.
    """
    targets = parse_targets(config.targets)
    _check(config)
    backbone = open_backbone(config)
    # what is missing is told before hours of work
    sources = [_open(config, backbone, target) for target in targets]
    found: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for name, settings in networks(config).items():
        judged = backbone if settings is config else open_backbone(settings)
        found[name] = {}
        for target, pair in zip(targets, sources, strict=True):
            judge = _Judge(_of(settings, target), judged, *pair, workdir / name / target.name)
            counts |= {
                f"{target.name}_train_images": len(judge.train),
                f"{target.name}_test_images": len(judge.test),
            }
            found[name] |= {
                f"{target.name}_{key}": value
                for key, value in judge.accuracies(name, target.name).items()
            }
    results = {"pretraining_step": backbone.step, **counts, **suffixed(found)}
    report = workdir / "report"
    report.mkdir(exist_ok=True)
    for target in targets:
        _picture(config, found, target, report / f"{target.name}.png")
    write_json(workdir / "result.json", results)
    text = _markdown(config, found, targets, counts)
    if processes.is_main_process():
        (workdir / "transfer.md").write_text(text)
    log(text)
    return results


def _check(config: ConfigDict) -> None:
    if config.data.list:
        raise ConfigError(
            "data.list names images of one data set, config.targets several: give folders of their "
            "own"
        )
    if config.draws < 1 or config.iterations < 1 or config.regularization <= 0:
        raise ConfigError("draws, iterations and regularization must be positive")
    if min(config.shots, default=1) < 1:
        raise ConfigError(f"config.shots={tuple(config.shots)} must be positive")
    if not all(0 < percent < 100 for percent in config.percents):
        raise ConfigError(f"config.percents={tuple(config.percents)} must be above 0 and below 100")
    keys = [readout.key for readout in readouts(config)]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"config.percents or config.shots has {max(keys, key=keys.count)} twice")


def _of(config: ConfigDict, target: Target) -> ConfigDict:
    """The evaluation's config with the data of one target."""
    own = config.copy_and_resolve_references()
    own.data.source, own.data.eval_source = target.train, target.test
    return own


def _open(config: ConfigDict, backbone: Backbone, target: Target) -> tuple[Source, Source]:
    try:
        return open_both(_of(config, target), backbone)
    except DataError as error:
        raise DataError(f"{target.name}: {error}") from None


class _Judge:
    """One network's features of one data set, and what classifiers make of them.

    Attributes:
        train: float [N, F] features of training images that count.
        test: float [Q, F].
    """

    def __init__(
        self,
        config: ConfigDict,
        backbone: Backbone,
        train: Source,
        test: Source,
        folder: pathlib.Path,
    ):
        self.config, self.folder, self.step = config, folder, backbone.step
        folder.mkdir(parents=True, exist_ok=True)
        extractor = Extractor(config, backbone, folder / "features")
        name = folder.name
        self.train, self.labels = usable(extractor(train, f"{name} training features"))
        self.test, self.wanted = usable(extractor(test, f"{name} test features"))
        if len(np.unique(self.labels)) < 2 or not len(self.wanted):
            raise DataError(
                f"{name}: training images of two classes and one test image are needed at least"
            )

    def accuracies(self, network: str, target: str) -> dict[str, float]:
        """In per cent: `linear`, and mean and standard deviation over the draws of the others."""
        found: dict[str, float] = {}
        finished = Finished(
            self.folder / "readouts.json", [self.step, len(self.train), len(self.test)]
        )
        every = readouts(self.config)
        clock = StepTimer(1, len(every))
        for done, readout in enumerate(every, 1):
            draws = self.config.draws if readout.drawn else 1
            values = [
                finished.get(
                    f"{readout.key} draw {draw}", functools.partial(self._accuracy, readout, draw)
                )
                for draw in range(draws)
            ]
            found[readout.key] = float(np.mean(values))
            text = ""
            if readout.drawn:
                found[f"{readout.key}_std"] = float(np.std(values, ddof=1)) if draws > 1 else 0.0
                text = f" ± {found[f'{readout.key}_std']:.2f}"
            left = clock.read(done)[1]
            log(
                f"{network}, {target}, {readout.title}: {found[readout.key]:.2f}{text} %   ETA "
                f"{left}"
            )
        return found

    def _accuracy(self, readout: Readout, draw: int) -> float:
        rows = np.arange(len(self.train))
        if readout.drawn:
            rows = draw_rows(self.labels, readout, self.config.seed, draw)
        classifier = fit_linear(
            self.train[rows],
            self.labels[rows],
            regularization=self.config.regularization,
            iterations=self.config.iterations,
            statistics_of=self.train,
        )
        return accuracy(classifier.predict(self.test), self.wanted)


def _picture(
    config: ConfigDict, found: dict[str, dict[str, float]], target: Target, path: pathlib.Path
) -> None:
    if not config.shots:
        return
    shots = sorted(config.shots)
    series = {
        network: (
            [values[f"{target.name}_k{k}"] for k in shots],
            [values[f"{target.name}_k{k}_std"] for k in shots],
        )
        for network, values in found.items()
    }
    error_bars(shots, series, f"{target.name}: labelled images per class", "accuracy in %", path)


def _markdown(
    config: ConfigDict,
    found: dict[str, dict[str, float]],
    targets: list[Target],
    counts: dict[str, int],
) -> str:
    titles = " | ".join(
        f"{network} weights" if network == "random" else network for network in found
    )
    lines = [f"| accuracy (%) | read-out | {titles} |", "|---" * (2 + len(found)) + "|"]
    for target in targets:
        for readout in readouts(config):
            cells = []
            for values in found.values():
                key = f"{target.name}_{readout.key}"
                cells.append(
                    f"{values[key]:.1f}"
                    + (f" ± {values[f'{key}_std']:.1f}" if readout.drawn else "")
                )
            lines.append(f"| {target.name} | {readout.title} | {' | '.join(cells)} |")
    sizes = (
        f"{t.name} {counts[f'{t.name}_train_images']} and {counts[f'{t.name}_test_images']}"
        for t in targets
    )
    lines += ["", f"Training and test images: {', '.join(sizes)}."]
    lines.append(f"±: the standard deviation over {config.draws} draws of the labelled images.")
    return "\n".join(lines) + "\n"
