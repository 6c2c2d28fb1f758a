"""Batches of images with boxes on the devices.

Training's are augmented and without end; evaluation's have each image once.

Legend: N rows of a batch, H W of its canvas, M boxes of an image (padded).
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax.core.errors import ConfigError
from hexa_jax.data.decode import BadImage, crop_generator, decode
from hexa_jax.data.pipeline import BadImages, host_iterator, read_or_replace, tolerated
from hexa_jax.data.source import DataError
from hexa_jax.detection.canvases import Canvases, content_sizes, draw, move_boxes
from hexa_jax.detection.data import DetectionSource
from hexa_jax.detection.metrics import Truth
from hexa_jax.detection.plans import EvaluationPlan, TrainingPlan
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import Layout, local_rows

AHEAD = 2  # batches on the devices, so that the transfer of one overlaps the step before it


class DetectionBatch(NamedTuple):
    """Images with boxes; all leaves are split over the mesh's "data" axis along N.

    Attributes:
        images: uint8 [N, H, W, 3], content in the top left corner, the rest 0.
        sizes: int32 [N, 2] (height, width) of the content; 0 in rows that are padding.
        boxes: float32 [N, M, 4] (x1, y1, x2, y2) in pixels of `images`, without the difficult ones.
        labels: int32 [N, M], -1 where there is no box.
        index: int32 [N] row of the source, -1 in rows that are padding.
    """

    images: Any
    sizes: Any
    boxes: Any
    labels: Any
    index: Any


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the host knows of all rows of a batch of evaluation: NumPy, the same on every process.

    Attributes:
        index: int64 [N] row of the source; -1: padding.
        originals: int64 [N, 2] (height, width) of the stored images.
        contents: int64 [N, 2], the same on the canvas.
    """

    index: np.ndarray
    originals: np.ndarray
    contents: np.ndarray

    def to_original(self, row: int, boxes: np.ndarray) -> np.ndarray:
        """float32 [..., 4] boxes on the canvas of a row as boxes of its stored image."""
        return move_boxes(boxes, self.contents[row], self.originals[row])


@dataclasses.dataclass(frozen=True)
class DetectionSteps:
    """Random access to this process's rows of every batch: the source of grain's data set.

    An element is a dict of a DetectionBatch's arrays, with only these rows, and
        original: int64 [local, 2] (height, width) of the stored image, 0 in rows that are padding;
        bad: int64 [k], images that could not be read.

    Attributes:
        plan: number -> Planned.
        rows: int [local], this process's.
        flip: probability of mirroring an image.
        max_boxes: M.
        max_failures: consecutive unreadable images after which to give up; None: at the first, with
            its name.
    """

    source: DetectionSource
    plan: Any
    num_steps: int
    rows: np.ndarray
    seed: int
    flip: float
    max_boxes: int
    max_failures: int | None

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        planned = self.plan[int(number)]
        count = len(self.rows)
        images = np.zeros((count, *planned.canvas, 3), np.uint8)
        sizes, originals = np.zeros((count, 2), np.int32), np.zeros((count, 2), np.int64)
        boxes = np.zeros((count, self.max_boxes, 4), np.float32)
        labels = np.full((count, self.max_boxes), -1, np.int32)
        indices, bad = np.full(count, -1, np.int32), []
        for slot, index in enumerate(planned.index[self.rows].tolist()):
            if index < 0:
                continue
            pixels, index, failed = self._read(index)
            bad += failed
            size = pixels.shape[:2]
            content = content_sizes(
                np.array(size), planned.short, self.plan.canvases.limit, planned.canvas
            )
            mirrored = bool(crop_generator(self.seed, planned.epoch, index, 0).random() < self.flip)
            draw(pixels, content, mirrored, images[slot])
            truth = largest_boxes(self.source.truth(index, size), self.max_boxes)
            boxes[slot, : len(truth.labels)] = move_boxes(truth.boxes, size, content, mirrored)
            labels[slot, : len(truth.labels)] = truth.labels
            sizes[slot], originals[slot], indices[slot] = content, size, index
        element = DetectionBatch(images, sizes, boxes, labels, indices)._asdict()
        return element | {"original": originals, "bad": np.array(bad, np.int64)}

    def _read(self, index: int) -> tuple[np.ndarray, int, list[int]]:
        """Return pixels of an image or the next readable one, its index, and those before it."""
        if self.max_failures is None:
            try:
                return pixels_of(self.source, index), index, []
            except (BadImage, OSError) as error:
                raise DataError(f"every image of an evaluation must be readable: {error}") from None
        pixels, _, failed = read_or_replace(_Pixels(self.source), index, self.max_failures)
        return pixels, (index + len(failed)) % len(self.source), failed


def pixels_of(source: DetectionSource, index: int) -> np.ndarray:
    """Return uint8 [h, w, 3] as the annotation means it.

    As stored, or turned as EXIF says where only then the size is right.
    """
    data, name = source[index].image, source.name(index)
    pixels = decode(data, name, turn=False)
    said = tuple(source.sizes[index].tolist())
    if pixels.shape[:2] != said and pixels.shape[1::-1] == said:
        turned = decode(data, name)
        return turned if turned.shape[:2] == said else pixels
    return pixels


def largest_boxes(truth: Truth, count: int) -> Truth:
    """Return the objects to train on: the `count` largest that are not difficult, in order."""
    sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
    easy = np.flatnonzero(~truth.difficult)
    order = np.argsort(-sides.prod(axis=1)[easy], kind="stable")[:count]
    kept = np.sort(easy[order])
    return Truth(truth.boxes[kept], truth.labels[kept], truth.difficult[kept])


class _Pixels:
    """A detection source as `read_or_replace` wants it."""

    def __init__(self, source: DetectionSource):
        self.source, self.name = source, source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": pixels_of(self.source, index)}


class TrainingBatches:
    """Training's batches.

    Attributes:
        steps_per_epoch: batches of an epoch.
        canvases: the shapes that batches have.
        images_over_max_boxes: of which some boxes are left out, as data.max_boxes is smaller.

    Raises:
        ConfigError: sizes that cannot work.
    """

    def __init__(self, config: ConfigDict, source: DetectionSource, mesh: Mesh):
        data, batch = config.data, config.batch_size
        if not 0 < batch <= len(source):
            raise ConfigError(
                f"batch_size={batch} must be 1 to {len(source)}, the number of images"
            )
        if data.max_boxes < 1:
            raise ConfigError(f"data.max_boxes={data.max_boxes} must be positive")
        if not 0 <= data.flip <= 1:
            raise ConfigError(f"data.flip={data.flip} must be a probability, 0 to 1")
        self.config, self.source, self.mesh = config, source, mesh
        self._rows = _local(mesh, batch)
        self.canvases = Canvases(data.canvases, data.short_sides, data.long_limit)
        self._plan = TrainingPlan(
            source.sizes.copy(), batch, config.seed, self.canvases, tuple(data.short_sides)
        )
        self.steps_per_epoch = self._plan.steps_per_epoch
        truths = (source.truth(index) for index in range(len(source)))
        self.images_over_max_boxes = sum(
            int((~truth.difficult).sum() > data.max_boxes) for truth in truths
        )
        self.bad_images = BadImages(source, data.max_bad_fraction)

    def after(self, step: int, stop: int) -> Iterator[DetectionBatch]:
        """The batches after a step, up to number `stop`."""
        config = self.config
        steps = DetectionSteps(
            source=self.source,
            plan=self._plan,
            num_steps=stop,
            rows=self._rows,
            seed=config.seed,
            flip=config.data.flip,
            max_boxes=config.data.max_boxes,
            max_failures=tolerated(config.data.max_bad_fraction, len(self.source)),
        )
        return _ahead(self._place(element) for element in _elements(steps, step, config.runtime))

    def _place(self, element: dict) -> DetectionBatch:
        self.bad_images.add(element.pop("bad"))
        for index, size in zip(
            element["index"].tolist(), element.pop("original").tolist(), strict=True
        ):
            self.source.note_size(index, tuple(size))
        return _on_devices(self.mesh, self.config.batch_size, element)


class EvaluationBatches:
    """Evaluation's batches, with what the host needs to take their boxes back to the stored images.

    After the last one, the source's `truth` is that of the images as they were decoded.

    Attributes:
        batch_size: N, runtime.batch_size rounded up to what the devices share equally.
        canvases: the shapes that batches have.
    """

    def __init__(self, config: ConfigDict, source: DetectionSource, mesh: Mesh):
        data = config.data
        self.config, self.source, self.mesh = config, source, mesh
        self.batch_size = max(1, -(-config.runtime.batch_size // mesh.size)) * mesh.size
        self._rows = _local(mesh, self.batch_size)
        self.canvases = Canvases(data.canvases, (data.eval_short_side,), data.long_limit)
        self._plan = EvaluationPlan(
            source.sizes.copy(), self.batch_size, self.canvases, data.eval_short_side
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[DetectionBatch, Rows]]:
        steps = DetectionSteps(
            source=self.source,
            plan=self._plan,
            num_steps=len(self._plan),
            rows=self._rows,
            seed=0,
            flip=0.0,
            max_boxes=self.config.data.max_boxes,
            max_failures=None,
        )
        elements = _elements(steps, 0, self.config.runtime)
        return _ahead(self._place(number, element) for number, element in enumerate(elements))

    def _place(self, number: int, element: dict) -> tuple[DetectionBatch, Rows]:
        element.pop("bad")
        planned, originals = self._plan[number], np.zeros((self.batch_size, 2), np.int64)
        originals[self._rows] = element.pop("original")
        originals = processes.largest(originals)
        real = planned.index >= 0
        contents = np.zeros_like(originals)
        contents[real] = content_sizes(
            originals[real], planned.short, self.canvases.limit, planned.canvas
        )
        for index, size in zip(planned.index[real].tolist(), originals[real].tolist(), strict=True):
            self.source.note_size(index, tuple(size))
        batch = _on_devices(self.mesh, self.batch_size, element)
        return batch, Rows(planned.index, originals, contents)


def _local(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int [local] rows that this process must build."""
    layout = Layout(batch_size, 1, mesh.size, bn_group_size=batch_size, cutmix_block=0)
    try:
        layout.check()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return local_rows(mesh, layout)[0]


def _elements(steps: DetectionSteps, start: int, runtime: ConfigDict) -> Iterator[dict]:
    return host_iterator(steps, start, runtime.workers, runtime.threads, runtime.prefetch)


def _on_devices(mesh: Mesh, batch_size: int, element: dict) -> DetectionBatch:
    rows = NamedSharding(mesh, P("data"))
    placed = {
        name: jax.make_array_from_process_local_data(rows, leaf, (batch_size, *leaf.shape[1:]))
        for name, leaf in element.items()
    }
    return DetectionBatch(**placed)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    waiting: collections.deque[Any] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting
