"""Outcomes as CSV (a line per run) and as Markdown (mean and deviation over seeds)."""

import csv
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hexa_jax.experiments.paired import compare
from hexa_jax.experiments.sweep import Outcome

SEED = "seed"
METRICS = {  # columns of the table, where a run has them
    "knn_accuracy": "kNN",
    "linear_accuracy": "linear probe",
    "probe_top1": "SGD probe",
    "random_knn_accuracy": "kNN, random initialisation",
    "random_linear_accuracy": "linear, random initialisation",
    "pixels_knn_accuracy": "kNN, raw pixels",
    "pixels_linear_accuracy": "linear, raw pixels",
}


class Summary(NamedTuple):
    """Mean and standard deviation over seeds (0 for a single one), and the values by seed."""

    mean: float
    std: float
    by_seed: dict[int, float]

    def text(self) -> str:
        """For a table cell."""
        return f"{self.mean:.1f} ± {self.std:.1f}" if len(self.by_seed) > 1 else f"{self.mean:.1f}"


def factors_of(outcome: Outcome) -> tuple:
    """All factors but the seed."""
    return tuple(value for name, value in outcome.entry.factors.items() if name != SEED)


def summarise(outcomes: Sequence[Outcome], metric: str) -> dict[tuple, Summary]:
    """Summarize each combination of factors that has a number, in order of appearance."""
    values: dict[tuple, dict[int, float]] = {}
    for outcome in outcomes:
        if metric in outcome.values:
            by_seed = values.setdefault(factors_of(outcome), {})
            by_seed[outcome.entry.factors[SEED]] = outcome.values[metric]
    return {
        factors: Summary(
            statistics.mean(by_seed.values()),
            statistics.stdev(by_seed.values()) if len(by_seed) > 1 else 0.0,
            by_seed,
        )
        for factors, by_seed in values.items()
    }


def difference(summary: Summary, baseline: Summary) -> str:
    """Return the mean paired difference over common seeds, with a 95 % interval from two on."""
    return compare(summary.by_seed, baseline.by_seed).text()


def write_csv(outcomes: Sequence[Outcome], path: pathlib.Path) -> None:
    """One line per entry: its factors, cell, numbers, and what went wrong."""
    names = list(outcomes[0].entry.factors)
    metrics = sorted({name for outcome in outcomes for name in outcome.values})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "cell", *metrics, "failure"])
        for outcome in outcomes:
            factors = [outcome.entry.factors[name] for name in names]
            numbers = [outcome.values.get(name, "") for name in metrics]
            writer.writerow([*factors, outcome.entry.cell.name, *numbers, outcome.failure])


def markdown(outcomes: Sequence[Outcome], baseline_of: dict[tuple, tuple] | None = None) -> str:
    """The table, one row per combination of factors.

    Args:
        outcomes: of the grid.
        baseline_of: factors of the row that a row is compared with, by its own factors; adds a
            column of paired differences.
    """
    metrics = [name for name in METRICS if any(name in outcome.values for outcome in outcomes)]
    summaries = {name: summarise(outcomes, name) for name in metrics}
    columns = [name for name in outcomes[0].entry.factors if name != SEED]
    compared = (
        [name for name in metrics[:3] if not name.startswith(("random", "pixels"))]
        if baseline_of
        else []
    )
    titles = [
        *columns,
        "runs",
        *[METRICS[name] for name in metrics],
        *[f"{METRICS[name]} - plain" for name in compared],
    ]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for factors in dict.fromkeys(map(factors_of, outcomes)):
        runs = max(
            (
                len(summaries[name][factors].by_seed)
                for name in metrics
                if factors in summaries[name]
            ),
            default=0,
        )
        cells = [str(value) for value in factors] + [str(runs)]
        cells += [
            summaries[name][factors].text() if factors in summaries[name] else "-"
            for name in metrics
        ]
        for name in compared:
            summary, baseline = (
                summaries[name].get(factors),
                summaries[name].get((baseline_of or {})[factors]),
            )
            cells.append(
                difference(summary, baseline)
                if summary and baseline and summary is not baseline
                else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [line for name in metrics if (line := _below_pixels(name, summaries))]
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        lines += [
            "",
            "Failed:",
            *[f"* {outcome.entry.cell.name}: {outcome.failure}" for outcome in failed],
        ]
    return "\n".join(lines) + "\n"


def _below_pixels(metric: str, summaries: Mapping[str, Mapping[tuple, Summary]]) -> str:
    """Return a caveat where no row's accuracy exceeds that of raw pixels; empty elsewhere."""
    pixels = summaries.get(f"pixels_{metric}")
    if not pixels or not summaries[metric]:
        return ""
    best = max(summary.mean for summary in summaries[metric].values())
    least = min(summary.mean for summary in pixels.values())
    if best > least:
        return ""
    return (
        f"\nNo row's {METRICS[metric]} is above that of raw pixels ({least:.1f}): at this size the "
        "differences say nothing."
    )
