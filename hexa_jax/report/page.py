"""Pictures and tables of a finished run: curves, hard examples, clusters, and a page that shows them together."""

import html
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from hexa_jax.data.decode import decode, resize_center_crop
from hexa_jax.data.source import Source
from hexa_jax.data.subset import spread
from hexa_jax.storage.workdir import INIT_RECORD
from hexa_jax.views.preview import ViewPreview

ROWS = [
    ("raw pixels", "pixels_"),
    ("random initialisation", "random_"),
    ("initial weights", "initial_"),
    ("plain", "plain_"),
    ("pre-trained", ""),
]
COLUMNS = [("kNN", "knn_accuracy"), ("linear probe", "linear_accuracy")]


def table(results: dict[str, Any]) -> str:
    """The closing table as text: accuracies in per cent of pixels, random weights, the plain run and this one."""
    columns = [(title, name) for title, name in COLUMNS if any(prefix + name in results for _, prefix in ROWS)]
    if not columns:
        return "no labels: nothing to measure accuracy with"
    compared = any("plain_" + name in results for _, name in columns)
    lines = [f"{'accuracy in %':24}" + "".join(f"{title:>14}" for title, _ in columns)]
    for title, prefix in ROWS:
        title = "with hard examples" if compared and not prefix else title
        cells = [results.get(prefix + name) for _, name in columns]
        # Most runs start from random weights, and are compared with no other run.
        if prefix in ("initial_", "plain_") and all(cell is None for cell in cells):
            continue
        lines.append(f"{title:24}" + "".join("             -" if c is None else f"{c:14.1f}" for c in cells))
    if "nmi" in results:
        plain = f" (plain: {results['plain_nmi']:.2f})" if "plain_nmi" in results else ""
        lines.append(f"clusters and labels share {results['nmi']:.2f} of their information (NMI){plain}")
    return "\n".join(lines)


class Pictured(NamedTuple):
    """What a report shows: views of a batch, the training examples, and their clusters int32 [heads, examples] or None."""

    views: ViewPreview
    source: Source
    assignments: np.ndarray | None


def write_report(
    workdir: pathlib.Path,
    config: ConfigDict,
    run: Pictured,
    results: dict[str, Any],
    plain: pathlib.Path | None = None,
) -> pathlib.Path:
    """Write `report/` of a workdir: pictures and index.html.

    Args:
        workdir: of the run; its metrics.jsonl is read.
        config: of the run.
        run: what to show of it.
        results: for the table.
        plain: workdir of the plain run to compare with, whose curves are drawn beside; None: none.

    Returns:
        The path of index.html.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    pictures = {}
    if run.assignments is not None and (run.assignments[0] >= 0).any():
        pictures["clusters.png"] = "Clusters of the first head: each row shows members of one cluster"
        _clusters(run.source, run.assignments[0], folder / "clusters.png")
    pictures |= {"curves.png": "Loss and accuracy", "hard_examples.png": "What the network learns from"}
    _curves(workdir, folder / "curves.png", plain)
    _hard_examples(run.views, folder / "hard_examples.png")
    page = folder / "index.html"
    figures = "".join(f"<h2>{title}</h2><img src={name!r} style='max-width:100%'>" for name, title in pictures.items())
    settings = html.escape(json.dumps(config.to_dict(), indent=1))
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>{html.escape(workdir.name)}</title>"
        f"<body style='font-family:sans-serif;max-width:1000px;margin:auto'><h1>{html.escape(workdir.name)}</h1>"
        f"{_started_from(workdir)}<pre>{html.escape(table(results))}</pre>{figures}<h2>Config</h2><pre>{settings}</pre>"
    )
    return page


def _started_from(workdir: pathlib.Path) -> str:
    """A line about the weights that the run started from; nothing where they were random."""
    if not (workdir / INIT_RECORD).is_file():
        return ""
    record = json.loads((workdir / INIT_RECORD).read_text())
    step = f", step {record['step']}" if record["step"] is not None else ""
    name = html.escape(f"{record['name']} ({record['architecture']}{step})")
    return f"<p>Started from {name}, SHA-256 <code>{record['sha256']}</code></p>"


def _curves(workdir: pathlib.Path, path: pathlib.Path, plain: pathlib.Path | None) -> None:
    """Metrics over steps, those of the plain run dashed."""

    def read(folder: pathlib.Path) -> list[dict]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    lines = read(workdir)
    runs = [("", lines, "-")] + ([("plain: ", read(plain), "--")] if plain else [])
    names = [
        ("loss", "loss_"),
        ("kNN accuracy in %", "knn_accuracy"),
        ("linear probe's accuracy in %", "linear_accuracy"),
        ("NMI with labels", "nmi"),
        ("embedding spread", "embedding_std"),
    ]
    names = [(title, name) for title, name in names if any(key.startswith(name) for line in lines for key in line)]
    figure = Figure(figsize=(4 * max(len(names), 1), 3))
    axes = figure.subplots(1, max(len(names), 1), squeeze=False)
    for axis, (title, prefix) in zip(axes[0], names, strict=False):
        for origin, lines, style in runs:
            for key in sorted({key for line in lines for key in line if key.startswith(prefix)}):
                points = [(line["step"], line[key]) for line in lines if key in line]
                marker = "." if len(points) < 30 else None
                label = origin + key.removeprefix("loss_")
                axis.plot(*zip(*points, strict=True), style, label=label, marker=marker)
        axis.set(title=title, xlabel="step")
        if prefix == "loss_" or plain:
            axis.legend()
    _save(figure, path)


def _hard_examples(shown: ViewPreview, path: pathlib.Path, count: int = 8) -> None:
    """Rows: clean crop, perturbation (zero is grey, the attack's radius is full scale), adversarial and cut-mixed views."""
    images = {view: _flat(crops[0])[:count, 0] for view, crops in shown.images.items()}
    rows = [("clean", images["clean"])]
    if "adversarial" in images:
        delta, radius = perturbation(images["clean"], images["adversarial"])
        rows += [(f"perturbation\n(±{255 * radius:.1f} of 255)", delta), ("adversarial", images["adversarial"])]
    rows += [(view.replace("_", "\n"), images[view]) for view in shown.lam]
    count = len(images["clean"])
    figure = Figure(figsize=(1.3 * count + 1.2, 1.4 * len(rows)))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for axis_row, (title, pictures) in zip(axes, rows, strict=True):
        lam = shown.lam.get(title.replace("\n", "_"))
        for column, (axis, image) in enumerate(zip(axis_row, pictures, strict=True)):
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if lam is not None:
                axis.set_xlabel(f"λ {_flat(lam)[column, 0]:.2f}", fontsize=8)
        axis_row[0].set_ylabel(title, fontsize=8)
    _save(figure, path)


def perturbation(clean: np.ndarray, adversarial: np.ndarray) -> tuple[np.ndarray, float]:
    """The difference on a symmetric scale, zero in the middle of [0, 1], and the largest one in pixels of [0, 1]."""
    radius = max(float(np.abs(adversarial - clean).max()), 1e-9)
    return 0.5 + 0.5 * (adversarial - clean) / radius, radius


def _clusters(source: Any, assignments: np.ndarray, path: pathlib.Path, rows: int = 10, columns: int = 12) -> None:
    """Members of clusters spread over the range of sizes, the largest first."""
    sizes = np.bincount(assignments[assignments >= 0])
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    chosen = order[np.linspace(0, len(order) - 1, min(rows, len(order))).astype(int)]
    figure = Figure(figsize=(columns, 1.05 * len(chosen)))
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for axis_row, cluster in zip(axes, chosen, strict=True):
        members = np.flatnonzero(assignments == cluster)
        members = members[spread(len(members), columns)]  # folders are sorted by class: the first ones are alike anyway
        for axis in axis_row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        for axis, index in zip(axis_row, members, strict=False):
            pixels = decode(source[int(index)]["image"], source.name(int(index)))
            axis.imshow(resize_center_crop(pixels, 96, 96))
        axis_row[0].set_ylabel(f"{sizes[cluster]} images", fontsize=7)
    _save(figure, path)


def _flat(x: jax.Array) -> np.ndarray:
    x = np.asarray(x)
    return x.reshape(-1, *x.shape[2:])  # microbatches and rows together


def _save(figure: Figure, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
