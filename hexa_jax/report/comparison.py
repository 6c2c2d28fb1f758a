"""Several runs on one page: what differs in their settings, their results, and their curves over each other."""

import os
import pathlib
from collections.abc import Sequence
from html import escape

from hexa_jax.report import sections, words
from hexa_jax.report.charts import DASHES, Level, dot_plot
from hexa_jax.report.charts import Dot as ChartDot
from hexa_jax.report.record import RunRecord, differing_settings, read_record
from hexa_jax.report.sections import Section, rows_table, section
from hexa_jax.report.style import document
from hexa_jax.storage.workdir import WorkdirError

MOST = len(DASHES)  # runs that lines can tell apart


def write_comparison(workdirs: Sequence[pathlib.Path], output: pathlib.Path) -> None:
    """Write a page about 1 to MOST runs.

    Args:
        workdirs: of pre-training runs, finished or not.
        output: the page's path.

    Raises:
        WorkdirError: one is no run, one is named twice, or there are too many.
    """
    if len(workdirs) > MOST:
        raise WorkdirError(
            f"{len(workdirs)} runs are more than the {MOST} that lines can tell apart"
        )
    resolved = [workdir.resolve() for workdir in workdirs]
    if twice := [path for path in resolved if resolved.count(path) > 1]:
        raise WorkdirError(f"{twice[0]} is named twice")
    records = [read_record(workdir) for workdir in resolved]
    titles = _titles(records)
    shown = [
        part
        for part in (
            _runs(records, titles),
            _differences(records, titles),
            _scores(records, titles),
            sections.curves(records, titles),
        )
        if part is not None
    ]
    heading = f"{len(records)} runs compared" if len(records) > 1 else "One run"
    body = (
        f"<header><h1>{heading}</h1>"
        f'<p class="lead">{escape(", ".join(titles))}</p></header>{sections.navigation(shown)}'
        f"<main>{''.join(part.html for part in shown)}</main>"
        "<footer><p>Written by <code>python -m hexa_jax.report</code>; run it again to see the "
        "newest numbers.</p></footer>"
    )
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(document(heading, body), encoding="utf-8")
    os.replace(temporary, output)


def _titles(records: Sequence[RunRecord]) -> list[str]:
    """The folders' names, with as much of the path above as makes them different."""
    depth, titles = 1, [record.name for record in records]
    while len(set(titles)) < len(titles):
        depth += 1
        titles = ["/".join(record.workdir.parts[-depth:]) for record in records]
    return titles


def _runs(records: Sequence[RunRecord], titles: Sequence[str]) -> Section:
    """A verdict in words for each run, and a row with its main numbers."""
    cards, rows = "", []
    for record, title in zip(records, titles, strict=True):
        found = words.verdict(record)
        rank, agreement = record.last("rankme"), record.last("neighbor_agreement")
        seconds = sum(record.facts.get("seconds_by_start", {}).values())
        cards += (
            f'<article><div class="top"><h3>{escape(title)}</h3>{sections.pill(found.status)}</div>'
            f"<p>{escape(found.words)}</p></article>"
        )
        rows.append(
            (
                escape(title),
                escape(record.config["method"]),
                escape(", ".join(sections.hard_views(record.config)) or "none"),
                f"{record.epoch:.3g} of {record.epochs}",
                "–" if rank is None else f"{rank:.1f}",
                "–" if agreement is None else f"{100 * agreement:.0f} %",
                sections.duration(seconds) if seconds else "–",
            )
        )
    head = ["run", "method", "hard views", "epoch", "effective rank", "neighbors agree", "time"]
    body = f'<div class="health">{cards}</div>{rows_table("Main numbers", head, rows)}'
    return section("runs", "Runs", "", body)


def _differences(records: Sequence[RunRecord], titles: Sequence[str]) -> Section | None:
    """The settings that are not the same in all runs."""
    if len(records) < 2:
        return None
    differing = differing_settings(list(records))
    if not differing:
        body = "<p>All settings are the same (those of <code>runtime</code> aside).</p>"
        return section("settings", "What differs", "", body)
    rows = []
    for key, values in differing.items():
        cells = ("–" if value is None else f"<code>{escape(str(value))}</code>" for value in values)
        rows.append((f"<code>{escape(key)}</code>", *cells))
    head = ["setting", *map(escape, titles)]
    lead = (
        f"{len(rows)} setting{'s' if len(rows) > 1 else ''}, those of <code>runtime</code> aside."
    )
    return section("settings", "What differs", lead, rows_table("Settings that differ", head, rows))


def _scores(records: Sequence[RunRecord], titles: Sequence[str]) -> Section | None:
    """Accuracies of the networks, with intervals."""
    body = ""
    table: dict[str, list[str]] = {title: [] for title in titles}
    for place, (name, _) in enumerate(sections.SCORES):
        dots = []
        for record, title in zip(records, titles, strict=True):
            own = dict(sections.score_rows(record)).get("pre-trained")
            value = own[place] if own else None
            table[title].append("–" if value is None else f"{value:.1f}")
            if value is None:
                continue
            half = words.interval(value, record.facts.get("test_images"))
            low, high = (max(value - half, 0), min(value + half, 100)) if half else (None, None)
            dots.append(ChartDot(title, value, low, high, strong=True))
        if dots:
            classes = {record.facts.get("classes") for record in records}
            count = classes.pop() if len(classes) == 1 else None
            levels = [Level(f"chance {100 / count:.1f}", 100 / count)] if count else []
            plot = dot_plot(f"{name} accuracy", dots, x_range=(0, 100), levels=levels, unit=" %")
            body += f'<figure class="group"><h3>{name}: accuracy in %</h3>{plot}</figure>'
    if not body:
        return None
    body = f'<div class="plots">{body}</div>'
    head = ["run", *(name for name, _ in sections.SCORES)]
    rows = [(escape(title), *cells) for title, cells in table.items()]
    body += rows_table("Accuracy in %", head, rows, numbers=True)
    lead = "Of the networks as they are now; bars are 95 % intervals of the images they are tested on, not of seeds."
    return section("scores", "Scores", lead, body)
