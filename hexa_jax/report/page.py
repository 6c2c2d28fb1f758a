"""The page of one run: what was run, is it healthy, curves, hard examples, clusters, map, settings.

`report/index.html` is one file with everything inside; it can be mailed, and opens without a
network.
"""

import os
import pathlib
from html import escape
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from hexa_jax.data.source import Source
from hexa_jax.report import picture_sections, sections
from hexa_jax.report.record import RunRecord, read_record
from hexa_jax.report.style import document
from hexa_jax.storage.workdir import PLAIN
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
    """Return the closing table as text: accuracies in per cent of all networks."""
    columns = [
        (title, name)
        for title, name in COLUMNS
        if any(prefix + name in results for _, prefix in ROWS)
    ]
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
        numbers = "".join("             -" if c is None else f"{c:14.1f}" for c in cells)
        lines.append(f"{title:24}" + numbers)
    if "nmi" in results:
        plain = f" (plain: {results['plain_nmi']:.2f})" if "plain_nmi" in results else ""
        lines.append(f"NMI of clusters and labels: {results['nmi']:.2f}{plain}")
    return "\n".join(lines)


class SampleImages(NamedTuple):
    """The images that health was measured on.

    Attributes:
        indices: int [N] examples of the source.
        images: uint8 [N, S, S, 3].
        features: [N, F].
        neighbors: int [N, k] positions in the sample, nearest first.
        similarity: [N, k] cosines of the same.
        clusters: int [N].
    """

    indices: np.ndarray
    images: np.ndarray
    features: np.ndarray
    neighbors: np.ndarray
    similarity: np.ndarray
    clusters: np.ndarray


class Pictured(NamedTuple):
    """What a report shows besides numbers.

    Attributes:
        views: of a batch; None: no hard examples are shown.
        source: the training examples.
        assignments: int32 [heads, examples], the method's clusters; None without.
        sample: None where health is not measured.
    """

    views: ViewPreview | None
    source: Source
    assignments: np.ndarray | None
    sample: SampleImages | None = None


def write_report(workdir: pathlib.Path, config: ConfigDict, run: Pictured) -> pathlib.Path:
    """Write `report/index.html` of a workdir, in one step: a browser sees the old page or the new one.

    Args:
        workdir: of the run; its files are read, see `hexa_jax.report.record`.
        config: of the run.
        run: what to show of it.

    Returns:
        The path of index.html.
    """
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    record = read_record(workdir, config.to_dict())
    shown = [
        section
        for section in (
            sections.health(record),
            sections.scores(record),
            sections.curves(*_with_plain(record)),
            picture_sections.hard_examples(record, run.views) if run.views is not None else None,
            picture_sections.clusters(record, run),
            picture_sections.image_map(run.sample),
            picture_sections.neighbors(run),
            sections.data(record),
            sections.settings(record),
            sections.next_steps(record),
        )
        if section is not None
    ]
    body = sections.header(record) + sections.navigation(shown)
    body += "<main>" + "".join(section.html for section in shown) + "</main>"
    body += sections.footer(record)
    path, temporary = folder / "index.html", folder / "index.html.tmp"
    temporary.write_text(document(escape(f"{record.name}: report"), body), encoding="utf-8")
    os.replace(temporary, path)
    return path


def _with_plain(record: RunRecord) -> tuple[list[RunRecord], list[str]]:
    """Return the run and the plain one that it is compared with, if any, with titles."""
    folder = record.workdir / PLAIN
    if not (folder / "metrics.jsonl").is_file():
        return [record], []
    return [record, read_record(folder)], ["hard examples", "plain"]
