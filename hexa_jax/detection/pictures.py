"""Pictures of detections beside the true boxes."""

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hexa_jax.data.subset import spread
from hexa_jax.detection.batches import pixels_of
from hexa_jax.detection.data import DetectionSource
from hexa_jax.detection.metrics import Detections

SHOWN_SCORE = 0.5  # detections below it are not drawn
COLUMNS = 4  # images in a row


def picture_detections(
    source: DetectionSource, found: Sequence[Detections], count: int, path: pathlib.Path
) -> None:
    """Draw images spread over the data.

    True boxes above (difficult ones dashed), detections with their scores below.
    """
    chosen = spread(len(source), count)
    groups = np.array_split(chosen, -(-len(chosen) // COLUMNS))
    figure = Figure(figsize=(3.2 * COLUMNS, 5.0 * len(groups)))
    axes = figure.subplots(2 * len(groups), COLUMNS, squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    colours = matplotlib.colormaps["tab10" if len(source.class_names) <= 10 else "tab20"]
    for row, group in enumerate(groups):
        for column, index in enumerate(group.tolist()):
            pixels, truth, detections = pixels_of(source, index), source.truth(index), found[index]
            above, below = axes[2 * row, column], axes[2 * row + 1, column]
            above.imshow(pixels)
            below.imshow(pixels)
            above.set_title(
                f"{pathlib.Path(source.name(index)).name}: {len(truth.labels)} true", fontsize=7
            )
            for box, label, difficult in zip(
                truth.boxes, truth.labels, truth.difficult, strict=True
            ):
                _draw(
                    above,
                    box,
                    source.class_names[label],
                    colours(int(label) % colours.N),
                    "--" if difficult else "-",
                )
            shown = detections.scores >= SHOWN_SCORE
            below.set_title(
                f"{int(shown.sum())} found with a score from {SHOWN_SCORE:g}", fontsize=7
            )
            for box, score, label in zip(
                detections.boxes[shown],
                detections.scores[shown],
                detections.labels[shown],
                strict=True,
            ):
                name = f"{source.class_names[label]} {score:.2f}"
                _draw(below, box, name, colours(int(label) % colours.N), "-")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _draw(axis: Axes, box: np.ndarray, text: str, colour: object, style: str) -> None:
    x1, y1, x2, y2 = box.tolist()
    axis.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=style, linewidth=1
        )
    )
    axis.text(
        x1,
        y1,
        text,
        fontsize=5,
        color="white",
        backgroundcolor=colour,
        va="bottom",
        bbox={"pad": 0.5, "lw": 0, "facecolor": colour},
    )
