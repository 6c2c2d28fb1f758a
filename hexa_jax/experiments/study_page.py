"""The page of a study's stage: a table in Markdown, and a picture of intervals.

Made from its declaration and its cells' numbers.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from hexa_jax.experiments.figures import COLOURS, save
from hexa_jax.experiments.paired import Comparison, compare, holm, verdict
from hexa_jax.experiments.study import METRIC, SECONDARY

Declaration = Mapping[str, Any]
Results = Mapping[str, Mapping[str, float]]  # numbers by cell
CONTROLS = {"EE": "plain", "EP": "extra", "EC": "longer", "RN": "noise"}
LEGEND = (
    "EE: minus the plain method at equal epochs. EP: minus plain with a second clean view, equal "
    "passes. EC: minus plain with as many more steps as the arm costs. RN: minus random noise of "
    "the attack's size. Differences by seed, in points of accuracy on all held-out images, with 95 "
    "% intervals of Student's t."
)


class Row(NamedTuple):
    """An arm's comparisons by control; an arm without an attack has no RN."""

    name: str
    arm: str
    plain: str
    primary: dict[str, Comparison]
    secondary: Comparison


def by_seed(
    declaration: Declaration, results: Results, run: str, metric: str = METRIC
) -> dict[int, float]:
    """A run's finished seeds."""
    cells = {seed: results.get(f"{run}-seed{seed}", {}) for seed in declaration["seeds"]}
    return {seed: values[metric] for seed, values in cells.items() if metric in values}


def rows(declaration: Declaration, results: Results) -> list[Row]:
    """One row per arm, in the order of the declaration."""

    def difference(treated: str, control: str, metric: str = METRIC) -> Comparison:
        return compare(*(by_seed(declaration, results, run, metric) for run in (treated, control)))

    return [
        Row(
            name,
            trial["arm"],
            trial["plain"],
            {
                key: difference(trial["arm"], trial[field])
                for key, field in CONTROLS.items()
                if trial[field]
            },
            difference(trial["arm"], trial["plain"], SECONDARY),
        )
        for name, trial in declaration["arms"].items()
    ]


def complete(declaration: Declaration, results: Results) -> bool:
    """Whether every cell of the stage is there."""
    cells = (f"{run}-seed{seed}" for run in declaration["runs"] for seed in declaration["seeds"])
    return all(METRIC in results.get(cell, {}) for cell in cells)


def page(declaration: Declaration, results: Results, stage: str, screened: int) -> str:
    """The page's text.

    Verdicts are those of confirmed arms, and only once all seeds are in: looking earlier and
    stopping where it suits would make them wrong more often than they say.

    Args:
        declaration: of the stage, from `Study.declaration`.
        results: of the cells that are finished.
        stage: screen or confirm.
        screened: how many arms were tried before any was confirmed.
    """
    table = rows(declaration, results)
    judged = stage == "confirm" and complete(declaration, results)
    family = holm([row.primary["EE"].p for row in table])
    titles = ["arm", "seeds", "kNN plain", "kNN arm", *CONTROLS, "linear EE"]
    titles += ["p (Holm)", "EE, adjusted interval", "verdict"] if judged else []
    lines = [
        f"# {declaration['part']}: {stage}",
        "",
        _summary(declaration, results, stage, screened),
        "",
    ]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row, adjusted in zip(table, family, strict=True):
        ee = row.primary["EE"]
        cells = [
            row.name,
            str(ee.pairs),
            *(_mean(declaration, results, run) for run in (row.plain, row.arm)),
        ]
        cells += [row.primary[key].text() if key in row.primary else "" for key in CONTROLS]
        cells.append(row.secondary.text())
        if judged:
            words = verdict(
                ee, adjusted, row.primary["EP"], row.primary["EC"], row.primary.get("RN")
            )
            cells += [f"{adjusted.p:.3f}", ee.text(adjusted.alpha), words]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        LEGEND,
        "",
        "## Controls beside plain",
        "",
        "| control | seeds | minus plain |",
        "|---|---|---|",
    ]
    for control, difference in _controls(declaration, results):
        lines.append(f"| {control} | {difference.pairs} | {difference.text()} |")
    return "\n".join(lines) + "\n"


def _summary(declaration: Declaration, results: Results, stage: str, screened: int) -> str:
    finished = sum(len(by_seed(declaration, results, run)) for run in declaration["runs"])
    total = len(declaration["runs"]) * len(declaration["seeds"])
    seeds = ", ".join(map(str, declaration["seeds"]))
    words = f"{finished} of {total} cells; seeds {seeds}; commit {declaration['commit']}; data {declaration['data'][0]}. "
    if stage == "screen":
        return (
            words
            + f"{len(declaration['arms'])} arms tried. Screening chooses what to confirm; it shows nothing by itself."
        )
    return (
        words
        + f"{len(declaration['arms'])} of {screened} screened arms, which are the family of Holm's adjustment."
    )


def _mean(declaration: Declaration, results: Results, run: str) -> str:
    values = list(by_seed(declaration, results, run).values())
    return f"{sum(values) / len(values):.1f}" if values else "-"


def _controls(declaration: Declaration, results: Results) -> Iterator[tuple[str, Comparison]]:
    """Each control but the plain runs, against the plain run of its base."""
    seen = set()
    for trial in declaration["arms"].values():
        for field in ("extra", "longer", "noise"):
            run = trial[field]
            if run and run not in seen:
                seen.add(run)
                pair = (by_seed(declaration, results, name) for name in (run, trial["plain"]))
                yield run, compare(*pair)


def draw(
    declaration: Declaration, results: Results, stage: str, workdir: pathlib.Path
) -> list[pathlib.Path]:
    """Write STAGE.png and .svg: each arm's differences from each control; seeds as dots."""
    table = rows(declaration, results)
    figure = Figure(figsize=(7.5, 1.6 + 0.75 * len(table)))
    axis = figure.subplots()
    for position, row in enumerate(table):
        for number, (key, difference) in enumerate(row.primary.items()):
            if not difference.pairs:
                continue
            height, color = position + 0.2 * (number - 1.5), COLOURS[list(CONTROLS).index(key)]
            half = difference.half_width()
            spread = None if math.isinf(half) else [[half], [half]]
            label = (
                key
                if position == 0 or all(key not in above.primary for above in table[:position])
                else None
            )
            axis.errorbar(
                difference.mean,
                height,
                xerr=spread,
                fmt="o",
                color=color,
                capsize=3,
                markersize=4,
                label=label,
            )
            axis.plot(
                difference.differences,
                [height] * difference.pairs,
                ".",
                color=color,
                alpha=0.4,
                markersize=3,
            )
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(table)), [row.name for row in table], fontsize=8)
    axis.invert_yaxis()
    axis.set(
        xlabel="kNN accuracy of the arm minus its control, in points",
        title=f"{declaration['part']}: {stage}",
    )
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    return save(figure, workdir, stage)
