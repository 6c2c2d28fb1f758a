"""config.task = "tables": every evaluation that the data allow, in one table.

Beside the paper's numbers.

Each evaluation is a run of its own in a folder of the workdir: finished ones are skipped, stopped
ones go on.
"""

import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.backbone import RANDOM, check_checkpoint
from hexa_jax.evals.tasks.labelled import require_checkpoint
from hexa_jax.experiments.sweep import Cell, Entry, Outcome, Stage, run_grid
from hexa_jax.storage.gcs import path_of
from hexa_jax.storage.workdir import write_json


class Row(NamedTuple):
    """A line of the table: an evaluation, its result that the paper reports, and the paper's.

    Attributes:
        title: for the table.
        table: the paper's.
        needs: group of `config.data` that has to name training and held-out examples.
        config: file in configs/eval/, with arguments.
        metric: of its result.json, in per cent.
        paper: by row of the paper's table.
        settings: of the evaluation; `{source}` and `{eval_source}` are the group's. The group's own
            settings win.
    """

    title: str
    table: str
    needs: str
    config: str
    metric: str
    paper: dict[str, float]
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def evaluation(self) -> str:
        """Name of the config file."""
        return self.config.partition(".")[0]


_NETWORKS = ("HEXA_MoCo", "HEXA_DCluster", "HEXA_DCluster (8-crop)", "HEXA+_DCluster (8-crop)")


def _paper(*numbers: float) -> dict[str, float]:
    """The paper's numbers of these networks, in this order."""
    return dict(zip(_NETWORKS, numbers, strict=True))


# Robustness: 1,000 test images, classifiers fitted to 50,000 training images; those of all of
# ImageNet are fitted for hours on a CPU.
_ROBUSTNESS = {"with_random": False, "data.limit": 50_000}


def _transfer(name: str) -> dict[str, Any]:
    """Settings of a transfer row's evaluation of one data set."""
    targets = f'("{name}={{source}},{{eval_source}}",)'
    return {"targets": targets, "percents": (), "shots": (4,), "with_random": False}


# The paper's numbers (ResNet-50) after 200 epochs of pre-training on ImageNet.
ROWS = (
    Row("ImageNet, kNN (k = 20)", "-", "imagenet", "knn.py", "knn_accuracy", {}),
    Row("ImageNet, linear probe", "1", "imagenet", "linear_imagenet.py:family={family}", "top1",
        _paper(68.9, 68.1, 74.0, 73.4)),
    Row("VOC07, SVM (mAP)", "1", "voc", "svm_voc07.py", "map", _paper(85.0, 85.9, 88.1, 88.8)),
    Row("CIFAR-10, linear probe", "1", "cifar10", "linear_cifar.py", "accuracy", _paper(90.4, 90.7, 92.9, 91.9)),
    Row("CIFAR-100, linear probe", "1", "cifar100", "linear_cifar.py", "accuracy", _paper(71.5, 71.5, 76.6, 75.2)),
    Row("VOC07, low-shot, k = 2 (mAP)", "2", "voc", "lowshot_voc07.py", "map_k2", _paper(57.0, 55.7, 55.5, 56.9)),
    Row("VOC07, low-shot, k = 4 (mAP)", "2", "voc", "lowshot_voc07.py", "map_k4", _paper(68.5, 65.3, 66.2, 67.3)),
    Row("VOC07, low-shot, k = 8 (mAP)", "2", "voc", "lowshot_voc07.py", "map_k8", _paper(73.1, 74.1, 75.2, 76.4)),
    Row("VOC07, low-shot, k = 16 (mAP)", "2", "voc", "lowshot_voc07.py", "map_k16", _paper(78.0, 78.0, 79.5, 81.1)),
    Row("VOC07, low-shot, k = 32 (mAP)", "2", "voc", "lowshot_voc07.py", "map_k32", _paper(80.1, 81.2, 83.1, 84.0)),
    Row("ImageNet, 1 % of the labels", "3", "imagenet_1pct", "semi_imagenet.py:percent=1", "top1",
        _paper(39.4, 48.9, 54.1, 54.9)),
    Row("ImageNet, 10 % of the labels", "3", "imagenet_10pct", "semi_imagenet.py:percent=10", "top1",
        _paper(62.3, 64.9, 69.3, 69.4)),
    Row("ImageNet, all labels", "3", "imagenet_100pct", "semi_imagenet.py:percent=100", "top1",
        _paper(74.8, 73.9, 76.9, 77.2)),
    Row("CIFAR-10, fine-tuned", "5", "cifar10", "finetune_cifar.py", "top1", _paper(96.1, 97.2, 97.0, 96.9)),
    Row("CIFAR-100, fine-tuned", "5", "cifar100", "finetune_cifar.py", "top1", _paper(81.3, 84.4, 85.5, 84.9)),
    Row("CIFAR-10, logistic regression", "-", "cifar10", "transfer.py", "cifar10_linear", {}, _transfer("cifar10")),
    Row("CIFAR-10, 4 images per class", "-", "cifar10", "transfer.py", "cifar10_k4", {}, _transfer("cifar10")),
    Row("CIFAR-100, logistic regression", "-", "cifar100", "transfer.py", "cifar100_linear", {},
        _transfer("cifar100")),
    Row("CIFAR-100, 4 images per class", "-", "cifar100", "transfer.py", "cifar100_k4", {}, _transfer("cifar100")),
    Row("ImageNet, attack of 1 of 255, logistic regression", "-", "imagenet", "robustness.py:family={corruptions}",
        "linear_linf1", {}, _ROBUSTNESS),
    Row("ImageNet, common corruptions, logistic regression", "-", "imagenet", "robustness.py:family={corruptions}",
        "linear_corruption", {}, _ROBUSTNESS),
)  # fmt: skip


def tables(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Run what the data allow, for the checkpoint and for random weights; write `tables.md`.

    Raises:
        ConfigError: no data, or an evaluation failed (the others are done; the message names the
            first).
    """
    # A wrong path is told now, not by each evaluation. Nothing here may open a device: each
    # evaluation is a process of its own, and an accelerator has room for one.
    require_checkpoint(config)
    check_checkpoint(config.checkpoint)
    known = {row.evaluation for row in ROWS}
    left_out = set(filter(None, config.without.split(",")))
    if unknown := sorted(left_out - known):
        raise ConfigError(
            f"config.without has {unknown[0]!r}: it takes some of {','.join(sorted(known))}"
        )
    rows = [row for row in ROWS if config.data[row.needs].source and row.evaluation not in left_out]
    if not rows:
        raise ConfigError(
            "no data to evaluate on: give some of "
            f"{', '.join(f'data.{row.needs}.source' for row in ROWS)}"
        )
    weights = {"pre-trained": config.checkpoint}
    if config.with_random and config.checkpoint != RANDOM:
        weights["random"] = RANDOM
    entries = [
        entry_of_row(config, row, name, checkpoint)
        for row in rows
        for name, checkpoint in weights.items()
    ]
    outcomes = run_grid(entries, workdir)
    text = _markdown(rows, outcomes)
    (workdir / "tables.md").write_text(text)
    log(text)
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        raise ConfigError(f"{failed[0].entry.cell.name}: {failed[0].failure}")
    results = {f"{o.entry.cell.name}_{o.entry.factors['metric']}": _value(o) for o in outcomes}
    measured = {name: value for name, value in results.items() if value is not None}
    write_json(workdir / "result.json", measured)
    return measured


def entry_of_row(config: ConfigDict, row: Row, name: str, checkpoint: str) -> Entry:
    """Return a row's entry in the sweep: its evaluation of one network.

    Args:
        config: of the table.
        row: of ROWS.
        name: of the network, in the table.
        checkpoint: its weights.
    """
    data = config.data[row.needs]
    sources = {"source": data.source, "eval_source": data.eval_source}
    settings: dict[str, Any] = {f"data.{key}": source for key, source in sources.items()}
    for key, value in row.settings.items():
        settings[key] = value.format(**sources) if isinstance(value, str) else value
    settings |= {f"data.{key}": data[key] for key in ("resize", "crop", "limit") if data[key]}
    settings |= {"seed": config.seed}
    settings |= {
        f"runtime.{name}": config.runtime[name]
        for name in ("data_dir", "data_cache", "num_devices")
    }
    path = checkpoint if checkpoint == RANDOM else str(path_of(checkpoint))
    if checkpoint == RANDOM:
        settings["random.like"] = str(path_of(config.checkpoint))
    file = row.config.format(family=config.family, corruptions=config.corruptions)
    folder = f"{row.evaluation}-{row.needs}-{name}"
    cell = Cell(folder, (Stage(f"eval/{file}", settings, checkpoint=path),))
    return Entry({"row": row.title, "weights": name, "metric": row.metric}, cell)


def _value(outcome: Outcome) -> float | None:
    return outcome.values.get(outcome.entry.factors["metric"])


def _markdown(rows: list[Row], outcomes: list[Outcome]) -> str:
    found = {(o.entry.factors["row"], o.entry.factors["weights"]): _value(o) for o in outcomes}
    lines = [
        "| evaluation (%) | paper's table | pre-trained | random weights | the paper, ResNet-50, "
        "200 epochs on ImageNet |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [found.get((row.title, name)) for name in ("pre-trained", "random")]
        shown = ["-" if value is None else f"{value:.1f}" for value in cells]
        paper = ", ".join(f"{name} {value}" for name, value in row.paper.items()) or "-"
        lines.append(f"| {row.title} | {row.table} | {shown[0]} | {shown[1]} | {paper} |")
    failed = [f"* {o.entry.cell.name}: {o.failure}" for o in outcomes if o.failure]
    return "\n".join(lines + (["", "Failed:", *failed] if failed else [])) + "\n"
