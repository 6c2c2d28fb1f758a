"""The parts of a report's page that show images: hard examples, clusters, map, neighbors."""

from html import escape
from typing import Any

import numpy as np

from hexa_jax.data.subset import spread
from hexa_jax.report import images
from hexa_jax.report.charts import number
from hexa_jax.report.record import RunRecord
from hexa_jax.report.sections import Section, section
from hexa_jax.views.preview import UNATTACKED, ViewPreview

EXAMPLES = 6  # rows of hard examples
GROUPS, MEMBERS = 8, 12  # clusters, and images of each
QUERIES = 8  # images whose neighbors are shown
VIEW_NAMES = {
    "cutmix": "cut-mixed",
    "cutmix_adversarial": "cut-mixed, adversarial",
    "mixup": "blended",
}


def hard_examples(record: RunRecord, shown: ViewPreview) -> Section | None:
    """Clean crops, what the attack adds, and the other hard views, large enough to see."""
    pictures = {view: flat(crops[0])[:EXAMPLES, 0] for view, crops in shown.images.items()}
    clean = pictures.pop("clean")
    if not pictures:
        return None
    columns: list[tuple[str, np.ndarray, list[str]]] = [("clean crop", clean, [""] * len(clean))]
    lead = []
    for view, crops in pictures.items():
        name = VIEW_NAMES.get(view, view.replace("_", " "))
        captions = [""] * len(crops)
        if view in shown.lam:
            captions = [
                f"{100 * share:.0f} % this image"
                for share in flat(shown.lam[view])[: len(crops), 0]
            ]
        if view in ("adversarial", "noise"):
            levels, factor = images.strength(clean, crops)
            change = images.difference(clean, crops, factor)
            columns.append(
                (
                    f"difference × {factor}",
                    change,
                    [f"at most {number(levels)} of 255"] * len(crops),
                )
            )
        columns.append((name, crops, captions))
        lead.append(_effect(record, name, f"loss_{view}"))
    turned = _turn(shown)
    if turned is not None:
        lead.append(f"The attack turns embeddings by {number(turned)}° on average.")
    cells = ""
    for row in range(len(clean)):
        for title, crops, captions in columns:
            caption = f"<b>{escape(title)}</b>" + (
                f"<br>{escape(captions[row])}" if captions[row] else ""
            )
            cells += images.picture(crops[row], f"example {row + 1}: {title}", caption)
    grid = f'<div class="views" style="grid-template-columns:repeat({len(columns)},minmax(0,1fr))">{cells}</div>'
    return section("hard-examples", "Hard examples", escape(" ".join(filter(None, lead))), grid)


def _effect(record: RunRecord, name: str, loss: str) -> str:
    """How a view's loss compares with the clean one's."""
    clean, own = record.last("loss_clean"), record.last(loss)
    if clean is None or own is None or clean <= 0:
        return ""
    more = "more" if own > clean else "less"
    share = 100 * abs(own / clean - 1)
    return f"{name.capitalize()} views have {share:.0f} % {more} loss than clean ones."


def _turn(shown: ViewPreview) -> float | None:
    """Mean angle in degrees between embeddings of clean and of attacked crops."""
    if UNATTACKED not in shown.outputs or "adversarial" not in shown.outputs:
        return None
    a, b = (np.asarray(shown.outputs[name], np.float64) for name in (UNATTACKED, "adversarial"))
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines = np.sum(a * b, axis=-1) / np.maximum(size, 1e-12)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def clusters(record: RunRecord, run: Any) -> Section | None:
    """Members of some clusters: of the method where it has them, else of the sample."""
    if run.assignments is not None and (run.assignments[0] >= 0).any():
        assigned, whose = run.assignments[0], "that the method learns from (its first head)"
        examples = np.arange(len(assigned))
        stored = {} if run.sample is None else {int(i): p for p, i in enumerate(run.sample.indices)}
    elif run.sample is not None:
        assigned, examples = run.sample.clusters, run.sample.indices
        stored = {int(i): p for p, i in enumerate(run.sample.indices)}
        whose = f"of the sample of {len(assigned):,} images, by k-means of their features"
    else:
        return None
    sizes = np.bincount(assigned[assigned >= 0])
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    chosen = order[spread(len(order), GROUPS)]
    body = ""
    for cluster in chosen:
        members = examples[assigned == cluster]
        # folders are sorted by class: the first ones are alike anyway
        members = members[spread(len(members), MEMBERS)]
        strip = "".join(_member(run, stored, int(member)) for member in members)
        count = f"{sizes[cluster]:,} image{'s' if sizes[cluster] > 1 else ''}"
        body += f'<div class="group"><h3>Cluster {cluster}: {count}</h3><div class="strip">{strip}</div></div>'
    lead = (
        f"{len(order):,} clusters {whose}; from {sizes[order[-1]]:,} to {sizes[order[0]]:,} "
        f"images, half of them {int(np.median(sizes[order])):,} or more. {len(chosen)} are shown, "
        "from the largest to the smallest."
    )
    return section("clusters", "Clusters", escape(lead), body)


def _member(run: Any, stored: dict[int, int], index: int, caption: str = "", kind: str = "") -> str:
    """A thumbnail of an example, from the sample's pixels where they hold it."""
    name = short_name(run.source.name(index))
    image = (
        run.sample.images[stored[index]]
        if index in stored
        else images.thumbnail(run.source, index, 96)
    )
    if image is None:
        return ""
    return images.picture(image, name, caption, kind or "member", side=96)


def image_map(sample: Any) -> Section | None:
    """A map on which similar images are neighbors."""
    if sample is None or len(sample.images) < 8:
        return None
    canvas = images.image_map(sample.images, sample.features)
    columns, rows = images.map_shape(len(sample.images))
    shown = columns * rows
    body = (
        '<input type="checkbox" id="bigger"><label for="bigger">larger</label>'
        f'<div class="zoom" tabindex="0" role="region" aria-label="map of images">'
        f'<img loading="lazy" width="{canvas.shape[1]}" height="{canvas.shape[0]}" '
        f'alt="map of {shown} images; similar ones are close together" src="{images.data_uri(canvas)}"></div>'
    )
    lead = f"{shown} images by their features (t-SNE, moved onto a grid): neighbors should look alike in what matters to you."
    return section("map", "Map of images", escape(lead), body)


def neighbors(run: Any) -> Section | None:
    """Some images with the nearest others."""
    if run.sample is None:
        return None
    sample = run.sample
    stored = {int(i): p for p, i in enumerate(sample.indices)}
    body = ""
    for place in spread(len(sample.indices), QUERIES):
        index = int(sample.indices[place])
        strip = _member(run, stored, index, "this image", "query")
        for other, cosine in zip(sample.neighbors[place], sample.similarity[place], strict=True):
            strip += _member(run, stored, int(sample.indices[other]), f"{cosine:.2f}")
        body += f'<div class="group"><h3>{escape(short_name(run.source.name(index)))}</h3><div class="strip">{strip}</div></div>'
    lead = "The framed image, then those of the sample with the most similar features; numbers are cosines."
    return section("neighbors", "Nearest neighbors", lead, body)


def short_name(name: str) -> str:
    """The end of a path: folder and file."""
    return "/".join(name.replace("\\", "/").split("/")[-2:])


def flat(x: Any) -> np.ndarray:
    """[M, n, ...] as [M * n, ...]: microbatches and rows together."""
    x = np.asarray(x)
    return x.reshape(-1, *x.shape[2:])
