"""Pictures of evaluations."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix as count_confusions

NAMED_CLASSES = 25  # more are not named on the axes


def confusion_matrix(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str] | None, path: pathlib.Path
) -> None:
    """Shares of each true class (rows) that were predicted as each class (columns)."""
    classes = max(int(max(labels.max(initial=0), predictions.max(initial=0))) + 1, len(names or ()))
    counts = count_confusions(labels, predictions, labels=np.arange(classes)).astype(float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(5.5, 5))
    axis = figure.subplots()
    picture = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)  # as the numbers
    figure.colorbar(picture, shrink=0.8)
    if classes <= NAMED_CLASSES:
        texts = (
            [str(name) for name in names]
            if names is not None
            else [str(number) for number in range(classes)]
        )
        axis.set_xticks(range(classes), texts, rotation=90, fontsize=7)
        axis.set_yticks(range(classes), texts, fontsize=7)
        for row, column in np.argwhere(shares >= 0.01):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(
                column,
                row,
                f"{100 * shares[row, column]:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color=colour,
            )
    accuracy = 100 * np.mean(labels == predictions)
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"confusion in % of the true class, accuracy {accuracy:.1f} %",
    )
    _save(figure, path)


def curves(
    series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, path: pathlib.Path
) -> None:
    """Lines over 1, 2, ...: one per name."""
    figure = Figure(figsize=(5, 3.4))
    axis = figure.subplots()
    for name, values in series.items():
        axis.plot(np.arange(1, len(values) + 1), values, marker=".", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=7)
    _save(figure, path)


def error_bars(
    x: Sequence[float],
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    path: pathlib.Path,
) -> None:
    """Means with standard deviations over x, on a logarithmic axis: {name: (means, deviations)}."""
    figure = Figure(figsize=(5, 3.4))
    axis = figure.subplots()
    for name, (means, deviations) in series.items():
        axis.errorbar(x, means, yerr=deviations, marker=".", capsize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(x), [f"{value:g}" for value in x])
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=7)
    _save(figure, path)


def against_strength(
    panels: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]],
    ylabel: str,
    path: pathlib.Path,
) -> None:
    """Draw panels side by side: {x label: (x, {line: values})}, one axis from 0 on."""
    figure = Figure(figsize=(1 + 4.2 * len(panels), 3.6))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (xlabel, (x, series)) in zip(axes[0], panels.items(), strict=True):
        for name, values in series.items():
            axis.plot(x, values, marker=".", label=name)
        axis.set(xlabel=xlabel, xticks=list(x))
    axes[0, 0].set(ylabel=ylabel, ylim=(0, None))
    axes[0, -1].legend(fontsize=7)
    _save(figure, path)


def image_grid(
    rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str | int], path: pathlib.Path
) -> None:
    """Images uint8 [H, W, 3] under column titles, each row with its name."""
    figure = Figure(figsize=(1.2 * len(columns) + 0.5, 1.2 * len(rows)))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axis_row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(axis_row, images, strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(name, fontsize=7)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(str(title), fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
