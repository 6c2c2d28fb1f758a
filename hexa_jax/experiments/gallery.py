"""Fig. 1 on a trained network: hard examples, their pseudo-labels and where they lie.

Legend: B rows of a batch, V crops, D embedding, K clusters or prototypes.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA

from hexa_jax.data.decode import decode, resize_center_crop
from hexa_jax.data.source import Source
from hexa_jax.data.subset import spread
from hexa_jax.experiments.figures import save
from hexa_jax.report.images import perturbation
from hexa_jax.training.input import TrainingData
from hexa_jax.training.load_run import LoadedRun, load_run
from hexa_jax.views.preview import PICTURES, UNATTACKED, ViewPreview

SIDE = 128  # pixels of thumbnails
MEMBERS = 3  # images that show a pseudo-label
SHOWN = 6  # rows of the gallery
DRAWN = 10  # examples that are followed in the projection


def draw_gallery(run_folder: pathlib.Path, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Draw fig1 of the run in `run_folder`; returns the pictures' paths."""
    run = load_run(run_folder)
    with jax.set_mesh(run.trainer.mesh):
        data = TrainingData.open(run.config, run.source, run.trainer)
        batch = next(data.batches(run.trainer.spec.steps_per_epoch + run.step - 1))
        shown = jax.device_get(run.trainer.compile().views(run.state, batch, data.resident))
    whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), shown)
    name = f"fig1_{run.config.method}"
    return [*_gallery(run, whole, workdir, name), *_projection(whole, workdir, f"{name}_space")]


def _gallery(
    run: LoadedRun, shown: ViewPreview, workdir: pathlib.Path, name: str
) -> list[pathlib.Path]:
    views = {view: np.clip(crops[0][:, 0], 0, 1) for view, crops in shown.images.items()}
    clean, adversarial = views["clean"], views["adversarial"]
    delta, radius = perturbation(clean, adversarial)
    titles = [
        "image",
        "augmented",
        f"perturbation\n(full scale ±{255 * radius:.0f}/255)",
        "adversarial",
        "cut-mixed",
        "its mask",
    ]
    before, after, pictures_of = _pseudo_labels(run, shown)
    changed = before != after
    # Half of the rows show a pseudo-label that the attack changes, where there are some.
    pictured = np.arange(min(PICTURES, len(clean)))
    order = np.concatenate([pictured[changed[pictured]], pictured[~changed[pictured]]])[:SHOWN]
    columns = len(titles) + 2 * MEMBERS
    figure = Figure(figsize=(1.25 * columns, 1.4 * len(order)))
    axes = figure.subplots(len(order), columns, squeeze=False)
    for axis_row, row in zip(axes, order, strict=True):
        mask = np.repeat(shown.mask[0][row, 0].astype(float), 3, axis=-1)
        pictures = [
            _thumbnail(run.source, shown.index[row]),
            clean[row],
            delta[row],
            adversarial[row],
            views["cutmix"][row],
            mask,
        ]
        pictures += _padded(pictures_of(before[row], row)) + _padded(pictures_of(after[row], row))
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.set(xticks=[], yticks=[])
            if picture is None:
                axis.set_frame_on(False)
            elif isinstance(picture, str):
                axis.set_frame_on(False)
                axis.text(0.5, 0.5, picture, ha="center", va="center", fontsize=8)
            else:
                axis.imshow(picture, interpolation="nearest")
        axis_row[5].set_xlabel(f"λ = {shown.lam['cutmix'][row, 0]:.2f}", fontsize=8)
        axis_row[len(titles) + MEMBERS].set_ylabel(
            "changed" if changed[row] else "kept", fontsize=8
        )
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=8)
    axes[0, len(titles)].set_title(
        "nearest pseudo-label\nbefore the attack", fontsize=8, loc="left"
    )
    axes[0, len(titles) + MEMBERS].set_title("after the attack", fontsize=8, loc="left")
    figure.suptitle(
        f"{run.config.method}: the attack changes the nearest pseudo-label of "
        f"{100 * changed.mean():.0f} % of {len(changed)} images"
    )
    return save(figure, workdir, name)


def _padded(pictures: list[Any]) -> list[Any]:
    return (pictures + [None] * MEMBERS)[:MEMBERS]


def _pseudo_labels(
    run: LoadedRun, shown: ViewPreview
) -> tuple[np.ndarray, np.ndarray, Callable[[int, int], list[Any]]]:
    """Return each row's nearest pseudo-label when clean and attacked, [B] each.

    And what shows a label's meaning.
    """
    clean, adversarial = shown.outputs[UNATTACKED][:, 0], shown.outputs["adversarial"][:, 0]
    method = run.config.method
    if method == "rotation":
        own = {name: np.asarray(leaf) for name, leaf in run.state.params["method"].items()}
        guess = lambda z: np.argmax(z @ own["kernel"] + own["bias"], axis=1)  # noqa: E731
        return guess(clean), guess(adversarial), lambda label, _: [f"turned by {90 * label}°"]
    if method in ("moco", "simclr"):  # instances: the keys of the batch, or the sibling views
        labels = np.asarray(shown.y) if method == "moco" else shown.outputs["clean"][:, 1]
        members = lambda label, _: [_thumbnail(run.source, shown.index[label])]  # noqa: E731
    else:
        labels = np.asarray(
            run.state.method.prototypes[0]
            if method == "deepcluster"
            else run.state.params["method"]["prototypes"]
        )
        if method == "deepcluster":
            clusters, examples = (
                np.asarray(run.state.method.assignments[0]),
                np.arange(len(run.source)),
            )
        else:
            clusters, examples = np.argmax(clean @ labels.T, axis=1), shown.index

        def members(label: int, row: int) -> list[Any]:
            others = examples[(clusters == label) & (examples != shown.index[row])]
            # folders are sorted by class
            found = others[spread(len(others), MEMBERS)] if len(others) else []
            return [_thumbnail(run.source, example) for example in found] or ["no other\nmember"]

    return np.argmax(clean @ labels.T, axis=1), np.argmax(adversarial @ labels.T, axis=1), members


def _thumbnail(source: Source, index: int) -> np.ndarray:
    pixels = decode(source[int(index)]["image"], source.name(int(index)))
    return resize_center_crop(pixels, SIDE, SIDE)


def _projection(shown: ViewPreview, workdir: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Draw Fig. 1(b): embeddings of all views on the first two principal axes of the clean ones."""
    views = {
        view: np.asarray(z[:, 0], np.float64)
        for view, z in shown.outputs.items()
        if view in shown.images
    }
    axes = PCA(2).fit(views["clean"])
    flat = {view: axes.transform(z) for view, z in views.items()}
    number_of = {int(row): position for position, row in enumerate(shown.row)}
    figure = Figure(figsize=(6.4, 5.2))
    axis = figure.subplots()
    axis.plot(*flat["clean"].T, ".", color="#cccccc", markersize=4, zorder=0)
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for row in range(min(DRAWN, len(flat["clean"]))):
        colour, start = colours[row % 10], flat["clean"][row]
        axis.annotate(
            "", flat["adversarial"][row], start, arrowprops={"arrowstyle": "-", "color": colour}
        )
        partner = flat["clean"][number_of[int(shown.partner[row])]]
        axis.plot(
            *np.stack([start, flat["cutmix"][row], partner]).T, ":", color=colour, linewidth=0.8
        )
        axis.plot(*start, "o", color=colour)
        axis.plot(*flat["adversarial"][row], "^", color=colour)
        axis.plot(*flat["cutmix"][row], "s", color=colour)
    marks = [
        ("o", "clean"),
        ("^", "adversarial"),
        ("s", "cut-mixed (dotted: its two images)"),
        (".", "other clean views"),
    ]
    axis.legend(
        [Line2D([], [], marker=mark, linestyle="", color="grey") for mark, _ in marks],
        [text for _, text in marks],
        fontsize=8,
    )
    share = 100 * axes.explained_variance_ratio_.sum()
    axis.set(
        title=f"embeddings, two principal axes ({share:.0f} % of the variance)",
        xticks=[],
        yticks=[],
    )
    return save(figure, workdir, name)
