"""Line charts and dot plots as inline SVG: no script needed, sharp at any size, colors from the page's style.

Lines differ in color, in dashes and in the letter or word at their end, so that color alone never
carries the meaning.
"""

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 34
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4", "4 2 1 2", "3 6")
POINTS = 240  # of a line at most; means of neighbors beyond
MARKED = 16  # points of a line up to which each is marked


class Line(NamedTuple):
    """One line of a chart: a label and (x, y) points in order of x; `style` picks color and dashes."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int = 0


class Level(NamedTuple):
    """A horizontal line to compare with."""

    label: str
    y: float


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_range: tuple[float | None, float | None] = (None, None),
    x_high: float | None = None,
    levels: Sequence[Level] = (),
    unit: str = "",
    note: str = "",
    alone: bool = True,
) -> str:
    """Return a `<figure>` with lines over epochs.

    Args:
        title: what is drawn.
        lines: those without points are left out; without any the result is empty.
        y_range: smallest and largest y; None: from the data, with a margin.
        x_high: the last epoch of the axis; None: of the data.
        levels: horizontal lines to compare with, such as the level of chance.
        unit: behind numbers, such as " %".
        note: a sentence below the chart.
        alone: whether a single line needs no legend.
    """
    lines = [
        line._replace(points=thin([p for p in line.points if all(map(math.isfinite, p))]))
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    x_low, x_high = _span([x for line in lines for x, _ in line.points], 0.0, x_high)
    values = [y for line in lines for _, y in line.points] + [level.y for level in levels]
    y_low, y_high = _span(values, *y_range)
    x_of = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_of = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in ticks(y_low, y_high):
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text("tick", LEFT - 6, y + 3.5, "end", short(tick)))
    for tick in ticks(x_low, x_high):
        x = x_of(tick)
        parts.append(_text("tick", x, HEIGHT - BOTTOM + 15, "middle", short(tick)))
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">epoch</text>'
    )
    for level in levels:
        y = y_of(level.y)
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        # Below the line where there is room above nothing: the text must not leave the picture.
        below = y + 12 < HEIGHT - BOTTOM
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT - 2}" y="{y + (11 if below else -4):.1f}" '
            f'text-anchor="end">{html.escape(level.label)}</text>'
        )
    for line in lines:
        parts.append(_polyline(line, x_of, y_of))
    data = {
        "x": [x_low, x_high],
        "lines": [
            {"label": line.label, "points": [[_round(x), _round(y)] for x, y in line.points]}
            for line in lines
        ],
        "unit": unit,
    }
    if len(lines) == 1 and alone:  # its title says what it is
        heading, legend = f"<b>{number(lines[0].points[-1][1])}{html.escape(unit)}</b>", ""
    else:
        entries = (
            f"<li>{_sample(line.style)}<span>{html.escape(line.label)}</span>"
            f"<b>{number(line.points[-1][1])}{html.escape(unit)}</b></li>"
            for line in lines
        )
        heading, legend = "", f'<ul class="legend">{"".join(entries)}</ul>'
    spoken = "; ".join(
        f"{line.label}: {number(line.points[0][1])}{unit} at epoch {short(line.points[0][0])}, "
        f"{number(line.points[-1][1])}{unit} at epoch {short(line.points[-1][0])}"
        for line in lines
    )
    return (
        f'<figure class="chart" data-chart="{html.escape(json.dumps(data), quote=True)}">'
        f"<h3><span>{html.escape(title)}</span>{heading}</h3>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{title}. {spoken}", quote=True)}">'
        + "".join(parts)
        + f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
        + legend
        + (f"<figcaption>{html.escape(note)}</figcaption>" if note else "")
        + "</figure>"
    )


class Dot(NamedTuple):
    """A row of a dot plot: value, the ends of its interval if known, and whether it stands out."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = False


def dot_plot(
    title: str,
    dots: Sequence[Dot],
    *,
    x_range: tuple[float, float],
    levels: Sequence[Level] = (),
    unit: str = "",
) -> str:
    """Return an SVG with one row per dot, intervals as bars, on an axis that shows all of x_range."""
    if not dots:
        return ""
    row, label_width, width = 27, 108, 350
    height = TOP + row * len(dots) + 40
    x_of = _scale(*x_range, label_width, width - 20)
    bottom = height - 40
    parts = []
    for tick in ticks(*x_range):
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{short(tick)}{html.escape(unit)}</text>'
        )
    for level in levels:
        x = x_of(level.y)
        parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 31}" text-anchor="middle">{html.escape(level.label)}</text>'
        )
    for place, dot in enumerate(dots):
        y = TOP + row * (place + 0.5)
        kind = "strong" if dot.strong else "plain"
        name = html.escape(fitting(dot.label))
        parts.append(_text(f"label {kind}", label_width - 8, y + 4, "end", name))
        if dot.low is not None and dot.high is not None:
            parts.append(
                f'<line class="interval {kind}" x1="{x_of(dot.low):.1f}" x2="{x_of(dot.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        parts.append(
            f'<circle class="dot {kind}" cx="{x_of(dot.value):.1f}" cy="{y:.1f}" r="5.5"/>'
        )
        end = x_of(dot.high if dot.high is not None else dot.value)
        parts.append(
            f'<text class="label {kind}" x="{end + 10:.1f}" y="{y + 4:.1f}">{dot.value:.1f}</text>'
        )
    spoken = "; ".join(f"{dot.label} {dot.value:.1f}{unit}" for dot in dots)
    return (
        f'<svg class="dots" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(f"{title}: {spoken}", quote=True)}">{"".join(parts)}</svg>'
    )


def fitting(label: str, length: int = 17) -> str:
    """Return a label with its middle left out where it is too long: names of runs differ at their ends."""
    half = (length - 1) // 2
    return label if len(label) <= length else f"{label[:half]}…{label[-half:]}"


def spark(points: Sequence[tuple[float, float]]) -> str:
    """Return a small line without axes; empty for fewer than two points."""
    points = thin(points, 60)
    if len(points) < 2:
        return ""
    x_of = _scale(points[0][0], points[-1][0], 3, 93)
    low, high = min(y for _, y in points), max(y for _, y in points)
    y_of = _scale(low, high if high > low else low + 1, 25, 5)
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
    x, y = points[-1]
    return (
        '<svg class="spark" viewBox="0 0 100 30" aria-hidden="true">'
        f'<polyline class="s0" points="{path}"/><circle class="s0" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/></svg>'
    )


def thin(points: Sequence[tuple[float, float]], limit: int = POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of its neighbors; the last one stays as it is."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 1) / (limit - 1))
    means = []
    for first in range(0, len(points) - 1, size):
        group = points[first : min(first + size, len(points) - 1)]
        means.append((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)))
    return [*means, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers in [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value with three significant digits, and no more than it needs."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def short(value: float) -> str:
    """A number of an axis."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}".replace("e-0", "e-")


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _span(values: Sequence[float], low: float | None, high: float | None) -> tuple[float, float]:
    """The ends of an axis: those that are given, or the data's with a margin."""
    least, most = min(values), max(values)
    margin = 0.06 * (most - least) or 0.05 * abs(most) or 0.5
    start = low if low is not None else least - margin
    end = high if high is not None else most + margin
    return (start, end) if end > start else (start, start + 1)


def _scale(low: float, high: float, start: float, end: float):
    """A function from [low, high] to [start, end]; what is outside stays at the ends."""
    size = (high - low) or 1.0
    return lambda value: start + (end - start) * min(max((value - low) / size, 0.0), 1.0)


def _text(kind: str, x: float, y: float, anchor: str, words: str) -> str:
    """A text of an SVG; `words` is escaped HTML."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def _polyline(line: Line, x_of, y_of) -> str:
    style = line.style % len(DASHES)
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
    dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
    marked = line.points if len(line.points) <= MARKED else line.points[-1:]
    dots = "".join(
        f'<circle class="s{style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6"/>'
        for x, y in marked
    )
    return f'<polyline class="s{style}" points="{path}"{dash}/>{dots}'


def _sample(style: int) -> str:
    """The line of a legend's entry."""
    style %= len(DASHES)
    dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
    line = f'<line class="s{style}" x1="1" x2="27" y1="5" y2="5"{dash}/>'
    return f'<svg class="sample" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'
