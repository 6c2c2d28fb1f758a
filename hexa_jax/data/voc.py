"""Pascal VOC as images with several labels: `voc:DIR[:SPLIT]`, `tfds:voc/2007:SPLIT`."""

import pathlib
import re
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.source import DataError
from hexa_jax.data.sources.tfds import TfdsSource

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PRESENT, DIFFICULT, ABSENT = 1, 0, -1
LISTS = "ImageSets/Main"


def voc_root(directory: str) -> pathlib.Path:
    """Find the folder with ImageSets, Annotations and JPEGImages, or VOC2007 in it.

    Raises:
        DataError: there is none.
    """
    root = pathlib.Path(directory).expanduser()
    for inner in ("VOCdevkit/VOC2007", "VOC2007", "."):
        if (root / inner / LISTS).is_dir():
            return root / inner
    raise DataError(f"voc:{directory} has no {LISTS}: name the VOCdevkit or VOC2007 folder")


def words(path: pathlib.Path, columns: int) -> np.ndarray:
    """str [lines, columns] of one of VOC's lists.

    Raises:
        DataError: it is missing or empty, or a line has another number of words.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        found = line.split()
        if found and len(found) != columns:
            raise DataError(f"{path}:{number} has {len(found)} words, not {columns}")
        rows += [found] if found else []
    if not rows:
        raise DataError(f"{path} is empty")
    return np.array(rows)


class VOCImages:
    """Images of a split of `VOCdevkit/VOC2007`, in the order of its list.

    Attributes:
        class_names: of the columns.
        matrix: int8 [N, C]: PRESENT, DIFFICULT (only difficult examples of the class are there) or
            ABSENT, as the official `ImageSets/Main/CLASS_SPLIT.txt` files have it.
    """

    num_classes = None  # of single labels

    def __init__(self, directory: str, split: str):
        root = voc_root(directory)
        lists = root / LISTS
        self.root, self.split = root, split
        self.ids = words(lists / f"{split}.txt", 1)[:, 0].tolist()
        found = sorted(
            match[1]
            for path in lists.iterdir()
            if (match := re.fullmatch(rf"(\w+)_{split}\.txt", path.name))
        )
        known = [name for name in CLASSES if name in found] or found
        if not known:
            raise DataError(
                f"{lists} has no CLASS_{split}.txt: VOC's classification lists are missing"
            )
        self.class_names = known
        self.matrix = np.stack(
            [self._column(lists / f"{name}_{split}.txt") for name in known], axis=1
        )

    def _column(self, path: pathlib.Path) -> np.ndarray:
        pairs = words(path, 2)
        values = dict(zip(pairs[:, 0].tolist(), pairs[:, 1].tolist(), strict=True))
        missing = [name for name in self.ids if name not in values]
        if missing:
            raise DataError(f"{path} says nothing of {missing[0]}, which {self.split}.txt lists")
        meaning = {"1": PRESENT, "0": DIFFICULT, "-1": ABSENT}
        if not set(values.values()) <= meaning.keys():
            raise DataError(f"{path} holds other values than 1, 0 and -1")
        return np.array([meaning[values[name]] for name in self.ids], np.int8)

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.root / "JPEGImages" / f"{self.ids[index]}.jpg")

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {"image": pathlib.Path(self.name(index)).read_bytes()}
        except OSError as error:
            raise BadImage(self.name(index), error.strerror or str(error)) from None

    def labels(self) -> None:
        """None: images have several."""


class VOCRecords:
    """The same from a prepared `tfds` data set with VOC's features; see `VOCImages`."""

    num_classes = None

    def __init__(self, spec: str, data_dir: str | None, data_cache: str = ""):
        self.records = TfdsSource(spec, data_dir=data_dir, data_cache=data_cache)
        rows = []
        for index in range(len(self.records)):
            record = self.records.record(index)
            if "labels_no_difficult" not in record:
                raise DataError(f"tfds:{spec} has no labels_no_difficult: it is no VOC data set")
            rows.append(
                (set(map(int, record["labels"])), set(map(int, record["labels_no_difficult"])))
            )
        self.class_names = list(CLASSES)
        self.matrix = np.full((len(rows), len(CLASSES)), ABSENT, np.int8)
        for row, (everything, easy) in enumerate(rows):
            self.matrix[row, list(everything)] = DIFFICULT
            self.matrix[row, list(easy)] = PRESENT

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.records[index]["image"]}

    def name(self, index: int) -> str:
        """As the records call it."""
        return self.records.name(index)

    def labels(self) -> None:
        """None: images have several."""


def open_voc(
    spec: str, data_dir: str | None = None, data_cache: str = ""
) -> VOCImages | VOCRecords:
    """The multi-label images that a config's string names.

    Args:
        spec: `voc:DIR[:SPLIT]` with split train, val, trainval (default) or test; or
            `tfds:voc/2007[:SPLIT]`.
        data_dir: where tfds data sets were prepared.
        data_cache: local folder for copies of a data set in a bucket.

    Raises:
        DataError: nothing usable is there.
    """
    kind, _, rest = spec.partition(":")
    if kind == "tfds" and rest:
        return VOCRecords(rest, data_dir, data_cache)
    if kind != "voc" or not rest:
        raise DataError(
            f"{spec!r} is no multi-label data set: use voc:VOCDEVKIT[:SPLIT] or tfds:voc/2007:SPLIT"
        )
    directory, _, split = (
        rest.rpartition(":")
        if re.search(r":(train|val|trainval|test)$", rest)
        else (rest, "", "trainval")
    )
    return VOCImages(directory, split)
