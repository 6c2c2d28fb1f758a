"""The paper's figures, drawn from the outcomes of their grids; each is written as PNG and SVG."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from hexa_jax.experiments.presets import BETAS, CONTROL, PLAIN, STRENGTHS
from hexa_jax.experiments.sweep import Outcome
from hexa_jax.experiments.tables import METRICS, Summary, summarise

GREY, COLOURS = "#999999", matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]


def save(figure: Figure, workdir: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Write `name`.png and `name`.svg; returns their paths."""
    figure.tight_layout()
    paths = [workdir / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths


def measured(outcomes: Sequence[Outcome]) -> list[str]:
    """Accuracies that the outcomes have, the one closest to the paper's first."""
    order = ("probe_top1", "linear_accuracy", "knn_accuracy")
    return [name for name in order if any(name in outcome.values for outcome in outcomes)]


def fig2(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> list[pathlib.Path]:
    """Bars per scheme, seeds as points."""
    return _bars(outcomes, workdir, "fig2", lambda factors: factors[1])


def fig5(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> list[pathlib.Path]:
    """(a) densities of the Beta distributions; (b) accuracy with each."""
    figure = Figure(figsize=(5, 3.4))
    axis = figure.subplots()
    x = np.linspace(0.001, 0.999, 500)
    for alpha, beta in BETAS:
        law = scipy.stats.beta(alpha, beta)
        label = f"({alpha}, {beta}): mean {law.mean():.2f}, std {law.std():.2f}"
        axis.plot(x, law.pdf(x), label=label)
    axis.set(
        xlabel="share of the first image, before clipping",
        ylabel="density",
        ylim=(0, 5),
        title="Beta(α, β)",
    )
    axis.legend(fontsize=7)
    paths = save(figure, workdir, "fig5_densities")
    return paths + _bars(outcomes, workdir, "fig5", lambda factors: factors[1])


def claim(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> list[pathlib.Path]:
    """Bars per run: plain ones and HEXA, seeds as points."""
    return _bars(outcomes, workdir, "claim", lambda factors: factors[1])


def _bars(
    outcomes: Sequence[Outcome], workdir: pathlib.Path, name: str, label: Any
) -> list[pathlib.Path]:
    """Draw one panel per method and metric.

    A bar per row with its standard deviation over seeds; seeds are points.
    """
    metrics = measured(outcomes)
    methods = list(dict.fromkeys(outcome.entry.factors["method"] for outcome in outcomes))
    if not metrics:
        return []
    shape = len(methods), len(metrics)
    figure = Figure(figsize=(4.2 * shape[1] + 0.5, 3 * shape[0]))
    axes = figure.subplots(*shape, squeeze=False)
    for axis_row, method in zip(axes, methods, strict=True):
        for axis, metric in zip(axis_row, metrics, strict=True):
            rows = {f: s for f, s in summarise(outcomes, metric).items() if f[0] == method}
            _bar_panel(axis, {label(factors): summary for factors, summary in rows.items()})
            _levels(axis, [o for o in outcomes if o.entry.factors["method"] == method], metric)
            cut = ", axis cut" if axis.get_ylim()[0] > 0 else ""
            axis.set(title=f"{method}: {METRICS[metric]}", ylabel=f"accuracy in %{cut}")
    return save(figure, workdir, name)


def _bar_panel(axis: Any, rows: dict[str, Summary]) -> None:
    for position, (title, summary) in enumerate(rows.items()):
        colour = GREY if title == PLAIN or title.startswith(CONTROL) else COLOURS[0]
        axis.bar(position, summary.mean, yerr=summary.std, color=colour, alpha=0.7, capsize=3)
        axis.plot(
            [position] * len(summary.by_seed),
            list(summary.by_seed.values()),
            ".",
            color="black",
            markersize=4,
        )
        axis.annotate(
            f"{summary.mean:.1f}",
            (position, summary.mean + summary.std),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    axis.set_xticks(range(len(rows)), list(rows), rotation=40, ha="right", fontsize=8)
    points = [value for summary in rows.values() for value in summary.by_seed.values()]
    # bars that start at zero would hide differences of a few points: say where they start
    if points:
        spread = max(max(points) - min(points), 1.0)
        axis.set_ylim(max(0, min(points) - spread), max(points) + 0.6 * spread)


def _levels(axis: Any, outcomes: Sequence[Outcome], metric: str) -> None:
    """Draw what raw pixels and random weights reach, where that is within the axis."""
    low, high = axis.get_ylim()
    for name, prefix, dashes in (("raw pixels", "pixels", "--"), ("random weights", "random", ":")):
        key = f"{prefix}_{metric}"
        values = [outcome.values[key] for outcome in outcomes if key in outcome.values]
        if values and low <= np.mean(values) <= high:
            axis.axhline(
                np.mean(values), color="black", linewidth=0.8, linestyle=dashes, label=name
            )
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def fig3(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> list[pathlib.Path]:
    """Draw accuracy (a) over epochs of pre-training, (b) over epochs of the SGD probe.

    Plain dashed, HEXA solid.
    """
    panels = [
        ("kNN", ".", "knn_accuracy", "epochs of pre-training"),
        ("linear probe", ".", "linear_accuracy", "epochs of pre-training"),
        ("SGD probe of the last checkpoint", "probe", "top1", "epochs of the probe"),
    ]
    drawn = [
        panel
        for panel in panels
        if any(_curve(outcome.folder / panel[1], panel[2]) for outcome in outcomes)
    ]
    if not drawn:
        return []
    figure = Figure(figsize=(4.4 * len(drawn), 3.4))
    axes = figure.subplots(1, len(drawn), squeeze=False)
    methods = list(dict.fromkeys(outcome.entry.factors["method"] for outcome in outcomes))
    for axis, (title, folder, metric, xlabel) in zip(axes[0], drawn, strict=True):
        groups: dict[tuple, list[dict[float, float]]] = {}
        for outcome in outcomes:
            factors = outcome.entry.factors
            groups.setdefault((factors["method"], factors["scheme"]), []).append(
                _curve(outcome.folder / folder, metric)
            )
        for (method, scheme), curves in groups.items():
            epochs = sorted(set.intersection(*[set(curve) for curve in curves]))
            values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
            style = {
                "color": COLOURS[methods.index(method)],
                "linestyle": "--" if scheme == PLAIN else "-",
            }
            axis.plot(epochs, values.mean(0), label=f"{method}, {scheme}", marker=".", **style)
            if len(curves) > 1:
                low, high = (
                    values.mean(0) - values.std(0, ddof=1),
                    values.mean(0) + values.std(0, ddof=1),
                )
                axis.fill_between(epochs, low, high, color=style["color"], alpha=0.15)
        axis.set(title=title, xlabel=xlabel, ylabel="accuracy in %")
        axis.legend(fontsize=7)
    return save(figure, workdir, "fig3")


def _curve(folder: pathlib.Path, metric: str) -> dict[float, float]:
    """Epoch -> value of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["epoch"]: line[metric] for line in lines if metric in line and "epoch" in line}


def fig4(outcomes: Sequence[Outcome], workdir: pathlib.Path) -> list[pathlib.Path]:
    """Accuracy per epsilon and eta; cells that are the same run are marked."""
    metrics = measured(outcomes)
    if not metrics:
        return []
    figure = Figure(figsize=(3.6 * len(metrics), 3.3))
    axes = figure.subplots(1, len(metrics), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        rows = summarise(outcomes, metric)
        grid = np.full((len(STRENGTHS), len(STRENGTHS)), np.nan)
        plain = next((summary for factors, summary in rows.items() if factors[1] == "-"), None)
        for (_, epsilon, eta), summary in rows.items():
            if epsilon != "-":
                place = STRENGTHS.index(epsilon), STRENGTHS.index(eta)
                grid[place] = summary.mean
                note = "" if (epsilon, eta) in ((1, 1), (3, 3)) else "\n(the run of 1, 1)"
                axis.annotate(
                    summary.text() + note, place[::-1], ha="center", va="center", fontsize=8
                )
        axis.imshow(grid, cmap="Blues", alpha=0.6)
        axis.set_xticks(range(len(STRENGTHS)), [f"η = {eta}" for eta in STRENGTHS])
        axis.set_yticks(range(len(STRENGTHS)), [f"ε = {epsilon}" for epsilon in STRENGTHS])
        axis.set_title(METRICS[metric] + (f", plain {plain.text()}" if plain else ""), fontsize=9)
    return save(figure, workdir, "fig4")


FIGURES = {"fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "claim": claim}
