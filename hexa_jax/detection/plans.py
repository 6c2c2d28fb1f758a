"""Which images are in which batch, on which canvas.

A function of the images' sizes, the seed and the batch's number.
"""

import dataclasses

import numpy as np

from hexa_jax.data.pipeline import pass_order
from hexa_jax.detection.canvases import Canvases, is_portrait

BATCH_STREAM = 3  # after pipeline's


@dataclasses.dataclass(frozen=True)
class Planned:
    """A batch before anything is read.

    Attributes:
        index: int64 [N] rows of the source; -1: nothing.
        short: short side that images are asked to have, in pixels.
        canvas: (height, width).
        epoch: from 0.
    """

    index: np.ndarray
    short: int
    canvas: tuple[int, int]
    epoch: int


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """Batches without end.

    An epoch is as many whole batches as there are; it leaves out the last of its order.

    Batches are of lying or of standing images, but for one an epoch, of what both leave over. Its
    canvas is as most of its images are, and the others are scaled down where they do not fit (one
    of 500 x 375 on 800 x 1344 pixels becomes 800 x 600 at most, within the usual range of short
    sides). So images of a rare orientation are used, too, and no further shape is compiled.

    Attributes:
        sizes: int [n, 2] (height, width).
        batch_size: N.
        short_sides: one is drawn for each batch.
    """

    sizes: np.ndarray
    batch_size: int
    seed: int
    canvases: Canvases
    short_sides: tuple[int, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return len(self.sizes) // self.batch_size

    def __getitem__(self, step: int) -> Planned:
        epoch, number = divmod(step, self.steps_per_epoch)
        generator = np.random.default_rng([self.seed, BATCH_STREAM, epoch])
        place = generator.permutation(self.steps_per_epoch)[number]
        short = int(generator.choice(self.short_sides, size=self.steps_per_epoch)[number])
        index = self._grouped(epoch)[place]
        return Planned(index, short, self.canvases.smallest(self.sizes[index], short), epoch)

    def _grouped(self, epoch: int) -> np.ndarray:
        """Return int64 [steps_per_epoch, N]: lying images, then standing ones.

        One batch at most has both.
        """
        order = pass_order(self.seed, epoch, len(self.sizes))[
            : self.steps_per_epoch * self.batch_size
        ]
        tall = is_portrait(self.sizes[order])
        return np.concatenate([order[~tall], order[tall]]).reshape(-1, self.batch_size)


class EvaluationPlan:
    """Every image once: those of a canvas together, the last batch filled with -1."""

    def __init__(self, sizes: np.ndarray, batch_size: int, canvases: Canvases, short: int):
        self.canvases = canvases
        places: dict[tuple[int, int], list[int]] = {}
        for index in range(len(sizes)):
            places.setdefault(canvases.smallest(sizes[index : index + 1], short), []).append(index)
        self._batches = []
        for canvas in [shape for shape in canvases.all if shape in places]:
            for first in range(0, len(places[canvas]), batch_size):
                rows = np.full(batch_size, -1, np.int64)
                part = places[canvas][first : first + batch_size]
                rows[: len(part)] = part
                self._batches.append(Planned(rows, short, canvas, 0))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Planned:
        return self._batches[number]
