"""Images with boxes: `voc:DIR[:SPLIT]`, `tfds:voc/2007:SPLIT`, or several joined by "+"."""

import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hexa_jax.data.decode import BadImage, header_size
from hexa_jax.data.source import DataError
from hexa_jax.data.sources.tfds import TfdsSource
from hexa_jax.data.subset import spread
from hexa_jax.data.voc import CLASSES, LISTS, voc_root, words
from hexa_jax.detection.annotations import Scene, read_annotation
from hexa_jax.detection.metrics import Truth

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
# What can be mended or dropped, in words.
KINDS = {
    "unknown_labels": "boxes of other classes dropped",
    "clipped_boxes": "boxes clipped to the image",
    "empty_boxes": "boxes outside of the image dropped",
    "difficult_boxes": "difficult boxes",
    "images_without_boxes": "images without a box",
    "sizes_from_images": "annotations without a size",
    "repeated_images": "repeated images dropped",
    "wrong_sizes": "annotations with a wrong size",
}
_UNREADABLE = (1, 1)  # size of an image whose header is broken and of which nothing else is known


class Annotated(NamedTuple):
    """An encoded image and its objects, in pixels of that image."""

    image: bytes
    truth: Truth


class DetectionSource:
    """Random access to images with boxes.

    Attributes:
        class_names: what labels mean.
        sizes: int32 [n, 2] (height, width) as the annotations say, or the image's header where they
            do not.
        found: sizes of images that turned out to be of another size than `sizes` when they were
            decoded.
        counts: how many of each of KINDS. Difficult boxes are left out of training and ignored in
            evaluation; images without a box are background to train on, and evaluated, too; wrong
            sizes are those in `found`.

    Args:
        files: the encoded images.
        scenes: what is on them.
        class_names: known classes; None: VOC's 20 where all objects are of those, else the names
            that occur, sorted.
        limit: keep at most so many images, spread evenly; 0: all.

    Raises:
        DataError: no box is left.
    """

    def __init__(
        self,
        files: "_Joined",
        scenes: list[Scene],
        class_names: Sequence[str] | None = None,
        limit: int = 0,
    ):
        occurring = sorted({name for scene in scenes for name in scene.names})
        if class_names is None:
            class_names = CLASSES if set(occurring) <= set(CLASSES) else occurring
        self.class_names = list(class_names)
        self.counts = Counter(dict.fromkeys(KINDS, 0))
        rows = self._once(files)
        rows = rows[spread(len(rows), limit)]
        self._files = _Joined(files.parts, files.places[rows])
        scenes = [scenes[row] for row in rows]
        self.sizes = np.array(
            [self._size(row, scene) for row, scene in enumerate(scenes)], np.int32
        ).reshape(-1, 2)
        self.found: dict[int, tuple[int, int]] = {}
        self._keep_known(scenes)
        self._count()

    def _once(self, files: "_Joined") -> np.ndarray:
        first: dict[str, int] = {}
        for row in range(len(files.places)):
            first.setdefault(files.name(row), row)
        self.counts["repeated_images"] = len(files.places) - len(first)
        return np.array(list(first.values()), np.int64)

    def _size(self, row: int, scene: Scene) -> tuple[int, int]:
        if scene.size is not None:
            return scene.size
        self.counts["sizes_from_images"] += 1
        try:
            return header_size(self._files.read(row), self._files.name(row))
        except BadImage:
            return _UNREADABLE  # whoever wants its pixels is told why

    def _keep_known(self, scenes: list[Scene]) -> None:
        """Objects of known classes, one after the other.

        Those of image i lie from ends[i] to ends[i + 1].
        """
        number = {name: label for label, name in enumerate(self.class_names)}
        labels = np.array(
            [number.get(name, -1) for scene in scenes for name in scene.names], np.int32
        )
        known = labels >= 0
        self._labels = labels[known]
        self._boxes = np.concatenate([scene.boxes for scene in scenes])[known]
        self._difficult = np.concatenate([scene.difficult for scene in scenes])[known]
        ends = np.cumsum([0, *(len(scene.names) for scene in scenes)])
        self._ends = np.concatenate([[0], np.cumsum(known)])[ends]
        unknown = sorted({name for scene in scenes for name in scene.names} - number.keys())
        if unknown and not known.any():
            raise DataError(
                f"{self.name(0)} and the {len(scenes) - 1} other images have no box of a known "
                f"class: they have {_some(unknown)}, known are {_some(self.class_names)}"
            )
        self.counts["unknown_labels"] = int(np.sum(~known))

    def _count(self) -> None:
        for index in range(len(self)):
            truth, written = (
                self.truth(index),
                self._boxes[self._ends[index] : self._ends[index + 1]],
            )
            outside = (written[:, :2] < 0).any(axis=1) | (
                written[:, 2:] > self.sizes[index, ::-1]
            ).any(axis=1)
            empty = len(written) - len(truth.labels)
            self.counts["clipped_boxes"] += int(outside.sum()) - empty
            self.counts["empty_boxes"] += empty
            self.counts["difficult_boxes"] += int(truth.difficult.sum())
            self.counts["images_without_boxes"] += not len(truth.labels)
        if self.counts["images_without_boxes"] == len(self):
            raise DataError(
                f"{self.name(0)} and the {len(self) - 1} other images have no box of a known class"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def summary(self) -> str:
        """One line: how much there is, and what was mended or dropped."""
        mended = [f"{count} {KINDS[kind]}" for kind, count in self.counts.items() if count]
        whole = (
            f"{len(self)} images with {len(self._labels)} boxes of {len(self.class_names)} classes"
        )
        return "; ".join([whole, *mended])

    def name(self, index: int) -> str:
        """Path or record of an image, for messages."""
        return self._files.name(index)

    def __getitem__(self, index: int) -> Annotated:
        """Raises BadImage where the file cannot be read."""
        return Annotated(self._files.read(index), self.truth(index))

    def note_size(self, index: int, size: tuple[int, int]) -> None:
        """Remember the (height, width) that an image had when it was decoded."""
        if index not in self.found and tuple(self.sizes[index].tolist()) != size:
            self.found[index] = size
            self.counts["wrong_sizes"] += 1

    def truth(self, index: int, size: tuple[int, int] | None = None) -> Truth:
        """The objects of an image, clipped to it; those of which nothing is left are gone.

        Args:
            index: of the image.
            size: (height, width) of the image where it is known better than from `found` or
                `sizes`.
        """
        height, width = size or self.found.get(index, self.sizes[index])
        mine = slice(self._ends[index], self._ends[index + 1])
        boxes = np.clip(self._boxes[mine], 0, np.array([width, height, width, height], np.float32))
        some = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return Truth(boxes[some], self._labels[mine][some], self._difficult[mine][some])


def open_detection(
    spec: str, data_dir: str | None = None, class_names: Sequence[str] | None = None, limit: int = 0
) -> DetectionSource:
    """The images with boxes that a config's string names.

    Args:
        spec: `voc:DIR[:SPLIT]`, split by default trainval, or `tfds:voc/2007[:SPLIT]`; several
            joined with "+".
        data_dir: where tfds data sets were prepared.
        class_names, limit: see `DetectionSource`.

    Raises:
        DataError: nothing usable is there, or an annotation is wrong; one line with the file.
    """
    kind, _, rest = spec.partition(":")
    if kind not in ("voc", "tfds") or not rest:
        raise DataError(
            f"{spec!r} is no detection data set: use voc:VOCDEVKIT[:SPLIT] or tfds:voc/2007:SPLIT"
        )
    parts: list[Any] = []
    for part in _parts(spec):
        kind, _, rest = part.partition(":")
        parts.append(_Folder(rest) if kind == "voc" else _Records(rest, data_dir))
    scenes = [scene for part in parts for scene in part.scenes]
    for part in parts:
        del part.scenes  # what workers get should be small
    return DetectionSource(_Joined(parts), scenes, class_names, limit)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _parts(spec: str) -> list[str]:
    """Split a sum of sources; kind and data set carry over.

    voc:a:train+b:val+tfds:voc/2007:train+test is voc:a:train, voc:b:val, tfds:voc/2007:train+test.
    """
    parts: list[str] = []
    for piece in spec.split("+"):
        kind = parts[-1].partition(":")[0] if parts else ""
        if piece.startswith(("voc:", "tfds:")):
            parts.append(piece)
        elif kind == "tfds" and not (":" in piece or "/" in piece):
            parts[-1] += "+" + piece  # a sum of splits, which tfds reads itself
        elif kind == "voc" and not os.path.isdir(_directory_split(parts[-1][4:])[0]):
            parts[-1] += "+" + piece  # a folder with + in its name
        else:
            parts.append(f"{kind}:{piece}")
    return parts


def _directory_split(text: str) -> tuple[str, str]:
    """DIR[:SPLIT] taken apart; a colon may also belong to the folder."""
    directory, colon, split = text.rpartition(":")
    if not colon or "/" in split or os.path.isdir(os.path.expanduser(text)):
        return os.path.expanduser(text), "trainval"
    return os.path.expanduser(directory), split or "trainval"


class _Folder:
    """Encoded images and annotations of a split of a folder in VOC's layout."""

    def __init__(self, text: str):
        directory, split = _directory_split(text)
        root = voc_root(directory)
        path = root / LISTS / f"{split}.txt"
        if not path.is_file():
            there = sorted(
                other.stem for other in (root / LISTS).glob("*.txt") if "_" not in other.stem
            )
            raise DataError(f"{path} is missing (there are: {', '.join(there) or 'none'})")
        ids = words(path, 1)[:, 0].tolist()
        self.paths = [self._image(root, name, path) for name in ids]
        self.scenes = [read_annotation(root / "Annotations" / f"{name}.xml") for name in ids]

    @staticmethod
    def _image(root: pathlib.Path, name: str, listed: pathlib.Path) -> str:
        for suffix in SUFFIXES:
            path = root / "JPEGImages" / f"{name}{suffix}"
            if path.is_file():
                return str(path)
        raise DataError(f"{root / 'JPEGImages' / name}.jpg is missing, and {listed} lists it")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        try:
            return pathlib.Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise BadImage(self.paths[index], error.strerror or "cannot be read") from None


class _Records:
    """Encoded images and annotations of a prepared tfds data set with VOC's features."""

    def __init__(self, spec: str, data_dir: str | None):
        self.records = TfdsSource(spec, data_dir=data_dir)
        self.scenes = [self._scene(index) for index in range(len(self.records))]

    def _scene(self, index: int) -> Scene:
        """Return VOC's corners from tfds's, which are divided by the annotated size.

        That size is not kept: it is the image's.
        """
        nothing = Scene(_UNREADABLE, [], np.zeros((0, 4), np.float32), np.zeros(0, bool))
        try:
            height, width = header_size(self.read(index), self.name(index))
            objects = self.records.record(index).get("objects", {})
        except BadImage:
            return nothing  # whoever wants its pixels is told why
        if not {"bbox", "label", "is_difficult"} <= objects.keys():
            raise DataError(
                f"{self.name(index)} has no objects with bbox, label and is_difficult: it is no "
                "VOC data set"
            )
        y1, x1, y2, x2 = np.asarray(objects["bbox"], np.float64).reshape(-1, 4).T
        corners = np.stack([x1 * width, y1 * height, x2 * width, y2 * height], axis=1)
        # as almost all corners were before they were stored as float32 fractions
        whole = np.round(corners)
        corners = np.where(np.abs(corners - whole) < 1e-3, whole, corners)
        names = [CLASSES[label] for label in objects["label"]]
        boxes = (corners - [1, 1, 0, 0]).astype(np.float32)
        return Scene(
            (height, width), names, boxes, np.asarray(objects["is_difficult"], bool).reshape(-1)
        )

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return self.records.name(index)

    def read(self, index: int) -> bytes:
        return self.records[index]["image"]


class _Joined:
    """Chosen images of several parts, one after the other.

    Places int64 [n, 2] are (part, row of it).
    """

    def __init__(self, parts: Sequence[Any], places: np.ndarray | None = None):
        if places is None:
            pairs = [(number, row) for number, part in enumerate(parts) for row in range(len(part))]
            places = np.array(pairs, np.int64).reshape(-1, 2)
        self.parts, self.places = parts, places

    def name(self, index: int) -> str:
        part, row = self.places[index].tolist()
        return self.parts[part].name(row)

    def read(self, index: int) -> bytes:
        part, row = self.places[index].tolist()
        return self.parts[part].read(row)
