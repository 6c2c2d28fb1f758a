"""The parts of a report's page, each from a run's record and pictures to HTML."""

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from hexa_jax.report import charts, words
from hexa_jax.report.charts import Level, Line
from hexa_jax.report.record import RunRecord, changed_settings
from hexa_jax.storage.workdir import flatten

ICONS = {words.GOOD: "✓", words.WATCH: "!", words.BAD: "✕", words.PLAIN: "i"}
NAMED = 30  # unreadable files that are named


class Section(NamedTuple):
    """A part of the page: its anchor, its title in the navigation, its HTML."""

    anchor: str
    title: str
    html: str


def section(anchor: str, title: str, lead: str, body: str) -> Section:
    """Return a section with a heading; `lead` and `body` are HTML."""
    opening = f'<p class="lead">{lead}</p>' if lead else ""
    return Section(
        anchor,
        title,
        f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">{escape(title)}</h2>'
        f"{opening}{body}</section>",
    )


def pill(status: str, text: str = "") -> str:
    """Return a status as a word with a sign, in its color."""
    return f'<span class="pill {status}"><span aria-hidden="true">{ICONS[status]}</span>{escape(text or status)}</span>'


def rows_table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: bool = False,
    strong: int = -1,
) -> str:
    """Return a table of HTML cells whose first column names the rows."""
    kind = ' class="n"' if numbers else ' class="text"'
    top = "".join(
        f'<th scope="col"{kind if place and numbers else ""}>{cell}</th>'
        for place, cell in enumerate(head)
    )
    body = ""
    for place, (first, *rest) in enumerate(rows):
        mark = ' class="strong"' if place == strong else ""
        body += (
            f'<tr{mark}><th scope="row">{first}</th>'
            + "".join(f"<td{kind}>{cell}</td>" for cell in rest)
            + "</tr>"
        )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# ---- Top -----------------------------------------------------------------------------------------


def header(record: RunRecord) -> str:
    """The run's name, verdict, progress and circumstances."""
    config, facts = record.config, record.facts
    done = "knn_accuracy" in record.results or record.results.get("epochs") == record.epochs
    views = hard_views(config)
    recipe = f"{config['method']}, " + (
        f"with {', '.join(views)}" if views else "without hard views"
    )
    state = "finished" if done else "running or stopped"
    found = words.verdict(record)
    seconds = sum(facts.get("seconds_by_start", {}).values())
    versions = facts.get("versions", {})
    classes = facts.get("classes")
    entries = {
        "Images": f"{facts['images']:,}" if "images" in facts else None,
        "Classes": f"{classes} (only to measure accuracy)"
        if classes
        else "none: no labels are used",
        "Network": f"{config['model']['backbone']}"
        + (
            f", {facts['parameters'] / 1e6:.1f} million parameters"
            if facts.get("parameters")
            else ""
        ),
        "Device": facts.get("device"),
        "Time": duration(seconds)
        + (f" in {n} starts" if (n := len(facts.get("seconds_by_start", {}))) > 1 else "")
        if seconds
        else None,
        "Started": next(iter(facts.get("seconds_by_start", {})), None),
        "Seed": str(config.get("seed", 0)),
        "Code": " ".join(
            filter(None, [f"hexa_jax {versions.get('hexa_jax', '')}", facts.get("commit")])
        )
        if versions
        else None,
        "JAX": versions.get("jax"),
        "Started from": started_from(record.initial),
    }
    listed = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in entries.items()
        if value
    )
    return (
        f"<header><h1>{escape(record.name)}</h1>"
        f'<p class="lead">{escape(recipe)} on {escape(str(config["data"]["source"]))} · '
        f"epoch {record.epoch:.3g} of {record.epochs}, {state}</p>"
        + (
            ""
            if done
            else f'<progress max="{record.epochs}" value="{record.epoch:.3f}" aria-label="epochs done"></progress>'
        )
        + f'<div class="banner {found.status}" role="status">{pill(found.status)}<p>{escape(found.words)}</p></div>'
        f'<dl class="facts">{listed}</dl></header>'
    )


def started_from(initial: dict[str, Any]) -> str | None:
    """The weights that a run started from in words; None for random ones."""
    if not initial:
        return None
    step = f", step {initial['step']}" if initial.get("step") is not None else ""
    return f"{initial['name']} ({initial['architecture']}{step}), SHA-256 {initial['sha256']}"


def hard_views(config: dict[str, Any]) -> list[str]:
    """Names of the hard views that a config turns on."""
    if config.get("scheme"):
        return (
            [part for part in config["scheme"].split("+") if part != "std"]
            if config["scheme"] != "all"
            else ["all of Fig. 2"]
        )
    views = config.get("views", {})
    return [
        name.replace("_", " ")
        for name, view in views.items()
        if isinstance(view, dict) and view.get("weight")
    ]


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def navigation(shown: Sequence[Section]) -> str:
    """Links to the sections."""
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in shown)
    return f'<nav aria-label="sections"><ul>{links}</ul></nav>'


def footer(record: RunRecord) -> str:
    """Where the page comes from."""
    return (
        "<footer><p>Written by hexa_jax after each epoch; reload to see the newest. The numbers "
        f"are in <code>{escape(record.address)}/metrics.jsonl</code>.</p></footer>"
    )


# ---- Health and scores ---------------------------------------------------------------------------


def health(record: RunRecord) -> Section | None:
    """Findings as cards: value, status, words, and the course so far."""
    found = words.findings(record)
    if not found:
        return None
    cards = "".join(
        f'<article><div class="top"><h3>{escape(finding.title)}</h3>{pill(finding.status)}</div>'
        f'<div class="value"><span>{escape(finding.value)}</span>{charts.spark(finding.curve)}</div>'
        f"<p>{escape(finding.words)}</p></article>"
        for finding in found
    )
    return section("health", "Is it healthy?", "", f'<div class="health">{cards}</div>')


SCORES = (("kNN", "knn_accuracy"), ("linear probe", "linear_accuracy"))
ORIGINS = (
    ("raw pixels", "pixels_"),
    ("random weights", "random_"),
    ("initial weights", "initial_"),
    ("plain", "plain_"),
    ("pre-trained", ""),
)


def score_rows(record: RunRecord) -> list[tuple[str, list[float | None]]]:
    """(origin, accuracy by kNN and by linear probe) in %, those that are known; the newest for the network."""
    rows = []
    for origin, prefix in ORIGINS:
        values: list[float | None] = []
        for _, name in SCORES:
            value = record.results.get(prefix + name)
            if value is None and not record.results:
                curve = record.curve(name)
                if not prefix:
                    value = curve[-1][1] if curve and curve[-1][0] > 0 else None
                elif prefix == ("initial_" if record.initial else "random_"):
                    value = curve[0][1] if curve and curve[0][0] == 0 else None
            values.append(value)
        if any(value is not None for value in values):
            rows.append((origin, values))
    return rows


def scores(record: RunRecord) -> Section | None:
    """Accuracies with intervals, beside raw pixels and random weights."""
    rows = score_rows(record)
    if not rows:
        return None
    images_, classes = record.facts.get("test_images"), record.facts.get("classes")
    levels = [Level(f"chance {100 / classes:.1f}", 100 / classes)] if classes else []
    plots = ""
    for place, (title, _) in enumerate(SCORES):
        dots = []
        for origin, values in rows:
            if (value := values[place]) is not None:
                half = words.interval(value, images_)
                low, high = (
                    (max(value - half, 0.0), min(value + half, 100.0)) if half else (None, None)
                )
                dots.append(charts.Dot(origin, value, low, high, strong=origin == "pre-trained"))
        if dots:
            plot = charts.dot_plot(
                f"{title} accuracy", dots, x_range=(0, 100), levels=levels, unit=" %"
            )
            plots += f'<figure class="group"><h3>{title}: accuracy in %</h3>{plot}</figure>'
    body = f'<div class="plots">{plots}</div>'
    cells = [
        (origin, *("–" if v is None else f"{v:.1f}" for v in values)) for origin, values in rows
    ]
    body += rows_table(
        "Accuracy in %",
        ["", *(title for title, _ in SCORES)],
        cells,
        numbers=True,
        strong=len(cells) - 1,
    )
    lead = f"Of {images_:,} images" if images_ else "Of the held-out images"
    lead += f" in {classes} classes" if classes else ""
    lead += ", bars are 95 % intervals" if images_ else ""
    if record.facts.get("leave_one_out"):
        lead += "; no held-out images were given, so each training image is judged by all others"
    return section("scores", "Scores", escape(lead + "."), body)


# ---- Curves --------------------------------------------------------------------------------------


class Plot(NamedTuple):
    """A chart of the page: metrics by their names' beginning, and how to draw them."""

    title: str
    prefixes: tuple[str, ...]
    low: float | None = None
    high: float | None = None
    unit: str = ""
    note: str = ""


PLOTS = (
    Plot(
        "Loss",
        ("loss",),
        note="by view, without the views' weights; the total is what is minimized",
    ),
    Plot("Accuracy", ("knn_accuracy", "linear_accuracy"), 0, 100, " %"),
    Plot(
        "Effective rank",
        ("rankme",),
        0,
        None,
        note="RankMe of features and of the head's embeddings",
    ),
    Plot(
        "Neighbors that agree",
        ("neighbor_agreement",),
        0,
        1,
        note="share of nearest images that two crops have in common",
    ),
    Plot(
        "Clusters of the sample",
        ("cluster_",),
        0,
        1,
        note="stability: Rand index with the epoch before; evenness of sizes",
    ),
    Plot(
        "Alignment",
        ("alignment",),
        0,
        None,
        note="squared distance of two crops of an image, lower is better",
    ),
    Plot("Uniformity", ("uniformity",), None, 0, note="lower is more even on the sphere"),
    Plot(
        "Agreement with labels",
        ("nmi",),
        0,
        1,
        note="normalized mutual information of clusters and labels",
    ),
    Plot("Spread of embeddings", ("embedding_std",), 0, None),
    Plot("Images that changed cluster", ("changed_cluster",), 0, 1),
    Plot("Empty clusters", ("empty_clusters",), 0, None),
    Plot("Learning rate", ("learning_rate",), 0, None),
    Plot("Norm of gradients", ("gradient_norm",), 0, None),
    Plot("Norm of parameters", ("parameter_norm",), 0, None),
    Plot("Images per second", ("images_per_second",), 0, None),
    Plot("Waiting for input", ("input_wait",), 0, 1, note="share of the time"),
)
LABELS = {
    "loss": "total",
    "knn_accuracy": "kNN",
    "linear_accuracy": "linear probe",
    "rankme": "features",
    "rankme_embedding": "embeddings",
    "cluster_stability": "stability",
    "cluster_evenness": "evenness",
}


def label_of(metric: str) -> str:
    """A metric's name in a legend."""
    return LABELS.get(metric, metric.removeprefix("loss_").replace("_", " "))


def curves(records: Sequence[RunRecord], titles: Sequence[str] = ()) -> Section | None:
    """Charts of all that is logged; of several runs one line for each, named by `titles`."""
    drawn = "".join(chart(plot, records, titles) for plot in PLOTS)
    if not drawn:
        return None
    lead = "Over epochs, all axes linear. Point at a chart to read the numbers of that epoch in it."
    return section("curves", "Curves", lead, f'<div class="charts">{drawn}</div>')


def chart(plot: Plot, records: Sequence[RunRecord], titles: Sequence[str]) -> str:
    """Return a chart of the runs that have its metrics, or several if lines of many runs have many metrics."""
    names = sorted({n for record in records for n in record.names() if n.startswith(plot.prefixes)})

    def draw(title: str, lines: list[Line], record: RunRecord) -> str:
        return charts.line_chart(
            title,
            lines,
            y_range=(plot.low, plot.high),
            levels=_levels(plot, record),
            unit=plot.unit,
            note=plot.note,
            x_high=max(1.0, *(other.epoch for other in records)),
            alone=len(records) == 1,
        )

    if len(records) == 1:
        (record,) = records
        lines = [
            Line(label_of(name), record.curve(name), style) for style, name in enumerate(names)
        ]
        return draw(plot.title, lines, record)
    made = ""
    for name in names:
        lines = [
            Line(title, record.curve(name), style)
            for style, (title, record) in enumerate(zip(titles, records, strict=True))
        ]
        what = plot.title if len(names) == 1 else f"{plot.title}: {label_of(name)}"
        made += draw(what, lines, records[0])
    return made


def _levels(plot: Plot, record: RunRecord) -> list[Level]:
    """What a chart's lines are compared with."""
    classes = record.facts.get("classes")
    if plot.title == "Accuracy" and classes:
        return [Level(f"chance {100 / classes:.1f} %", 100 / classes)]
    if plot.title == "Spread of embeddings":
        return [Level("collapse", words.COLLAPSED)]
    return []


# ---- Data, settings, what next -------------------------------------------------------------------


def data(record: RunRecord) -> Section | None:
    """Files that could not be read."""
    names = record.facts.get("unreadable") or []
    if not names:
        return None
    listed = "".join(f"<li><code>{escape(name)}</code></li>" for name in names[:NAMED])
    more = f"<p>… and {len(names) - NAMED} more.</p>" if len(names) > NAMED else ""
    lead = f"{len(names)} of {record.facts.get('images', 0):,} images could not be read and took no part."
    return section("data", "Unreadable files", escape(lead), f"<ul>{listed}</ul>{more}")


def settings(record: RunRecord) -> Section:
    """What differs from the recipe, and all settings folded."""
    changed = changed_settings(record)
    recipe = record.command.get("recipe")
    if changed:
        rows = [
            (f"<code>{escape(key)}</code>", *(f"<code>{escape(str(v))}</code>" for v in values))
            for key, values in changed.items()
        ]
        body = rows_table(
            "Settings that differ from the recipe", ["setting", "recipe", "this run"], rows
        )
    else:
        body = f"<p>{'All settings are those of the recipe.' if recipe else 'The recipe is not recorded.'}</p>"
    everything = "".join(
        f"<div><code>{escape(key)}</code><code>{escape(str(value))}</code></div>"
        for key, value in sorted(flatten(record.config).items())
    )
    body += f'<details><summary>All settings</summary><div class="settings">{everything}</div></details>'
    lead = f"Recipe: <code>{escape(recipe)}</code>" if recipe else ""
    argv = record.command.get("argv")
    if argv:
        body = f'<pre id="command">{escape(shlex.join(argv))}</pre>' + body
    return section("settings", "Settings", lead, body)


def next_steps(record: RunRecord) -> Section:
    """Commands to go on with."""
    workdir = shlex.quote(record.address)
    evaluation = "python -m hexa_jax.main --config=configs/eval"
    best = "@best" if record.config.get("runtime", {}).get("keep_best") else ""
    own = f"--config.checkpoint={workdir}{best}"
    steps = [
        (
            "Features of your images",
            f"{evaluation}/features.py {own} --workdir={workdir}-features",
        ),
        (
            "Use the network elsewhere",
            f"python -m hexa_jax.export --checkpoint={workdir}{best} --format=torchvision "
            f"--output={workdir}.safetensors",
        ),
        (
            "Set it beside other runs",
            f"python -m hexa_jax.report {workdir} OTHER_RUN --output=comparison.html",
        ),
    ]
    if record.facts.get("classes"):
        steps.insert(0, ("Judge it by kNN", f"{evaluation}/knn.py {own} --workdir={workdir}-knn"))
    body = "".join(
        f"<h3>{escape(title)}</h3><pre>{escape(command)}</pre>" for title, command in steps
    )
    return section("next", "What next", "", body)
