"""config.task = "knn": nearest-neighbor accuracy of a frozen backbone, with a picture."""

import pathlib
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.data.decode import decode, resize_center_crop
from hexa_jax.data.source import Source
from hexa_jax.evals.knn import accuracy, knn_predict, nearest
from hexa_jax.evals.tasks.labelled import Extractor, open_backbone, open_both, open_split, usable
from hexa_jax.report.pictures import confusion_matrix
from hexa_jax.storage.workdir import write_json

ROWS, COLUMNS, SIDE = 8, 8, 96


def knn(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Accuracy for each number of neighbours and temperature; returns what `result.json` holds."""
    backbone = open_backbone(config)
    extractor = Extractor(config, backbone, workdir / "features")
    if config.leave_one_out:
        train = held_out = open_split(config, backbone, "source")
        bank = queries = extractor(train, "features")
    else:
        train, held_out = open_both(config, backbone)
        bank, queries = (
            extractor(train, "training features"),
            extractor(held_out, "held-out features"),
        )
    (x, labels), (q, wanted) = usable(bank), usable(queries)
    results: dict[str, Any] = {
        "train_images": len(x),
        "test_images": len(q),
        "pretraining_step": backbone.step,
    }
    shown = None  # predictions of the first setting, whose accuracy is the headline
    voters = len(x) - int(config.leave_one_out)
    if max(config.neighbours) > voters:
        log(f"{max(config.neighbours)} neighbours: all {voters} images vote, there are no more")
    for temperature in config.temperatures:
        for neighbours in config.neighbours:
            predictions = knn_predict(
                x,
                labels,
                q,
                neighbours=neighbours,
                temperature=temperature,
                leave_one_out=config.leave_one_out,
                mesh=extractor.mesh
                if jax.process_count() == 1
                else None,  # else each process its own devices
            )
            shown = predictions if shown is None else shown
            results[f"knn{neighbours}_tau{temperature:g}"] = accuracy(predictions, wanted)
    results["knn_accuracy"] = results[f"knn{config.neighbours[0]}_tau{config.temperatures[0]:g}"]
    report = workdir / "report"
    report.mkdir(exist_ok=True)
    confusion_matrix(
        wanted,
        np.empty(0) if shown is None else shown,
        getattr(train, "class_names", None),
        report / "confusion.png",
    )
    _gallery(
        train,
        held_out,
        bank.values,
        queries.values,
        config.leave_one_out,
        report / "neighbours.png",
    )
    write_json(workdir / "result.json", results)
    for name, value in results.items():
        if name.startswith("knn"):
            log(f"{name:24}{value:8.2f} %")
    log(f"pictures: {report / 'confusion.png'} and {report / 'neighbours.png'}")
    return results


def _gallery(
    train: Source,
    held_out: Source,
    bank: np.ndarray,
    queries: np.ndarray,
    leave_one_out: bool,
    path: pathlib.Path,
) -> None:
    """Each row: a held-out image, then its nearest training images with their cosine similarity."""
    chosen = np.linspace(0, len(queries) - 1, min(ROWS, len(queries))).astype(int)
    columns = min(COLUMNS, len(bank) - int(leave_one_out))
    similarity, position = nearest(
        bank, queries[chosen], columns, own=chosen if leave_one_out else None
    )
    figure = Figure(figsize=(columns + 1, 1.15 * len(chosen)))
    axes = figure.subplots(len(chosen), columns + 1, squeeze=False)
    for axis_row, query, scores, rows in zip(axes, chosen, similarity, position, strict=True):
        axis_row[0].imshow(_thumbnail(held_out, query))
        for axis, score, row in zip(axis_row[1:], scores, rows, strict=True):
            axis.imshow(_thumbnail(train, row))
            axis.set_xlabel(f"{score:.2f}", fontsize=6, labelpad=1)
        for axis in axis_row:
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("query", fontsize=7)
    axes[0, 1].set_title("nearest training images", fontsize=7, loc="left")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=120)


def _thumbnail(source: Source, index: int) -> np.ndarray:
    return resize_center_crop(
        decode(source[int(index)]["image"], source.name(int(index))), SIDE, SIDE
    )
