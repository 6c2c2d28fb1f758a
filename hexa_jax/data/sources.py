"""Where examples come from: a folder, arrays, a prepared tfds data set, or drawn shapes. No TensorFlow is imported."""

import logging
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.shapes import ShapesSource
from hexa_jax.data.source import DataError, Source, checked_index, one_line
from hexa_jax.data.tfds_source import TfdsSource
from hexa_jax.storage.gcs import fetch_file, is_remote

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FOLDER_LABELS = ("auto", "folders", "none")
# A year, a month of it, or a day: how photographs are filed, and hardly what is on them.
DATE_NAME = re.compile(r"(19|20)\d\d([-_. ]?(0[1-9]|1[0-2])([-_. ]?(0[1-9]|[12]\d|3[01]))?)?")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


def make_source(
    spec: str,
    *,
    seed: int = 0,
    image_size: int = 32,
    num_examples: int = 10_000,
    data_dir: str | None = None,
    data_cache: str = "",
    labels: str = "auto",
) -> Source:
    """The source that a config's string names.

    Args:
      spec: `folder:DIR`, `arrays:FILE.npz`, `tfds:NAME[/CONFIG][:VERSION][:SPLIT]` (the split defaults to train and may
        be a slice, `train[:10%]`) or `shapes[:train|test]`.
      seed, image_size, num_examples: which shapes to draw; the other sources are what is stored.
      data_dir: where tfds data sets were prepared; by default `TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
      data_cache: local folder for copies of what is in a bucket; without one, only tfds data sets can be read from there.
      labels: whether the sub-folders of a folder are its classes, see `FolderSource`; other sources ignore it.
    Raises:
      DataError: nothing usable is there; one line says what and what to do.
    """
    kind, _, rest = spec.partition(":")
    if kind == "shapes":
        try:
            return ShapesSource(rest or "train", image_size=image_size, num_examples=num_examples, seed=seed)
        except ValueError as error:
            raise DataError(str(error)) from None
    if kind == "tfds" and rest:
        return TfdsSource(rest, data_dir=data_dir, data_cache=data_cache)
    if kind == "folder" and is_remote(rest):
        raise DataError(f"{spec}: pack a folder for a bucket with python -m hexa_jax.prepare, and copy that there")
    if kind == "arrays" and is_remote(rest):
        if not data_cache:
            raise DataError(f"{spec} needs a config.runtime.data_cache, a local folder for a copy")
        rest = str(fetch_file(rest, data_cache))
    if kind == "folder" and rest:
        return FolderSource(os.path.expanduser(rest), labels)
    if kind == "arrays" and rest:
        return load_arrays(os.path.expanduser(rest))
    raise DataError(
        f"unknown data source {spec!r}: use folder:DIR, arrays:FILE.npz, tfds:NAME[/CONFIG][:SPLIT] or shapes[:SPLIT]"
    )


class FolderSource:
    """Every image below a directory, in the order of the sorted relative paths.

    Hidden and other files are ignored; a linked directory is followed once.

    Args:
        directory: the folder.
        labels: "auto": the class of an image is its first-level sub-directory if there are at least
            two of those, no image lies beside them, and their names are not all dates; otherwise
            there are no labels. "folders": the sub-directories are the classes whatever their names
            are, and images beside them are of no known class (-1). "none": there are no labels.

    Attributes:
        labels_note: one line about what was taken for classes and how to change that; empty where
            nobody would be surprised.

    Raises:
        DataError: no such directory, no image below it, or fewer than two sub-directories to be
            classes where `labels` is "folders".
    """

    def __init__(self, directory: str, labels: str = "auto"):
        if labels not in FOLDER_LABELS:
            raise DataError(f"data.labels={labels!r} is not known: use one of {', '.join(FOLDER_LABELS)}")
        self.directory = directory
        if not os.path.isdir(directory):
            problem = "is not a directory" if os.path.exists(directory) else "does not exist"
            raise DataError(f"folder:{directory} {problem}")
        paths = sorted(os.fsencode(path) for path in _walk(directory))
        if not paths:
            raise DataError(f"folder:{directory} holds no image ({', '.join(s[1:] for s in IMAGE_SUFFIXES)})")
        # One block of bytes: a list of a million strings would be copied into every worker by its reference counts.
        self._paths = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        tops = [path.split(b"/", 1)[0] if b"/" in path else b"" for path in paths]
        classes = sorted(set(tops) - {b""})
        beside = tops.count(b"")
        dates = all(DATE_NAME.fullmatch(os.fsdecode(name)) for name in classes)
        labelled = labels == "folders" or (labels == "auto" and len(classes) >= 2 and not beside and not dates)
        if labels == "folders" and len(classes) < 2:
            raise DataError(
                f"folder:{directory} has {len(classes)} sub-folders with images: "
                "--config.data.labels=folders needs two or more"
            )
        ids = {name: i for i, name in enumerate(classes)} | {b"": -1}
        self._labels = np.array([ids[top] for top in tops], np.int32) if labelled else None
        self.labels_note = ""
        if labels == "auto" and len(classes) >= 2:
            self.labels_note = f"folder:{directory}: {_note(classes, labelled, beside)}"
        self.class_names = [os.fsdecode(name) for name in classes] if labelled else None
        self.num_classes = len(classes) if labelled else None
        if self.class_names and {name.lower() for name in self.class_names} <= SPLIT_NAMES:
            logging.getLogger(__name__).warning(
                "folder:%s: sub-directories %s are taken as the classes; are they splits? Then name one: folder:%s",
                directory, ", ".join(self.class_names), os.path.join(directory, self.class_names[0]),
            )  # fmt: skip
            self.labels_note = ""  # the warning says it

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = checked_index(index, len(self))
        try:
            with open(self.name(index), "rb") as file:
                image = file.read()
        except OSError as error:
            raise BadImage(self.name(index), error.strerror or "cannot be read") from None
        return {"image": image} if self._labels is None else {"image": image, "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.directory, os.fsdecode(self._paths[start : self._ends[index]]))

    def labels(self) -> np.ndarray | None:
        return self._labels


def _note(classes: list[bytes], labelled: bool, beside: int) -> str:
    """What became of the sub-folders of a folder, and the setting that changes it."""
    shown = [os.fsdecode(name) for name in classes[:3]] + ["..."] * (len(classes) > 3)
    folders = f"{len(classes)} sub-folders ({', '.join(shown)})"
    if labelled:
        return f"its {folders} are taken as the classes; if they are not, --config.data.labels=none"
    images = "1 image lies" if beside == 1 else f"{beside} images lie"
    reason = f"{images} beside them" if beside else "their names are dates"
    return f"its {folders} are not taken as classes, because {reason}; if they are, --config.data.labels=folders"


def _walk(directory: str) -> Iterator[str]:
    """Relative paths of the images below a directory, in any order but always the same set."""
    seen: set[tuple[int, int]] = set()
    real: list[str] = [""]
    linked: list[str] = []
    while real or linked:
        # Real directories first: a link to one of them is then recognised, and loops end.
        relative = real.pop() if real else linked.pop()
        where = os.path.join(directory, relative)
        try:
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(where) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise DataError(f"folder:{directory} cannot be listed: {where}: {error.strerror}") from None
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else real).append(path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield path


class ArraySource:
    """Images in memory, or memory-mapped.

    Args:
      images: uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W].
      labels: integers [N], -1 where unknown; or None.
      class_names: one name per class; or None.
      origin: how messages call the source.
    Raises:
      DataError: another shape or type.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | np.ndarray | None = None,
        origin: str = "arrays",
    ):
        if images.dtype != np.uint8:
            raise DataError(f"{origin}: images must be uint8, not {images.dtype}")
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape:
            raise DataError(f"{origin}: images must be [N, H, W, 3] or [N, H, W], not {list(images.shape)}")
        if labels is not None:
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
                found = f"{labels.dtype} {list(labels.shape)}"
                raise DataError(f"{origin}: labels must be integers [{len(images)}], not {found}")
            if labels.min() < -1 or labels.max() >= 2**31:
                raise DataError(
                    f"{origin}: labels must be 0, 1, ... (-1: unknown), not {labels.min()} to {labels.max()}"
                )
            labels = labels.astype(np.int32)
        self._images, self._labels, self.origin = images, labels, origin
        self._file: str | None = None
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.num_classes = None if labels is None else max(int(labels.max()) + 1, len(self.class_names or ())) or None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = checked_index(index, len(self))
        image = np.asarray(self._images[index])
        if image.ndim == 2 or image.shape[2] == 1:
            image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
        return {"image": image} if self._labels is None else {"image": image, "label": int(self._labels[index])}

    def name(self, index: int) -> str:
        return f"{self.origin}, index {index}"

    def labels(self) -> np.ndarray | None:
        return self._labels

    def __reduce__(self):
        if self._file is not None:  # a worker maps the file again instead of receiving a copy of it
            return load_arrays, (self._file,)
        return ArraySource, (self._images, self._labels, self.class_names, self.origin)


def load_arrays(path: str) -> ArraySource:
    """The arrays `images`, and optionally `labels` and `class_names`, of an npz file.

    One by `np.savez` is memory-mapped: it may exceed the memory, and workers share it. One by `np.savez_compressed` is
    loaded whole in every worker.
    """
    origin = f"arrays:{path}"
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {entry.removesuffix(".npy") for entry in archive.namelist()}
        if "images" not in keys:
            raise DataError(f"{origin} has no array 'images' (it holds: {', '.join(sorted(keys)) or 'nothing'})")
        labels, class_names = (_npz_array(path, key) if key in keys else None for key in ("labels", "class_names"))
        source = ArraySource(_npz_array(path, "images"), labels, class_names, origin)
    except FileNotFoundError:
        raise DataError(f"{origin} does not exist") from None
    except DataError:  # a ValueError that says enough
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{origin} is not a readable npz file: {one_line(error)}") from None
    source._file = os.path.abspath(path)
    return source


def _npz_array(path: str, key: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        if entry.compress_type == zipfile.ZIP_STORED:
            with archive.open(entry) as member:
                if np.lib.format.read_magic(member) == (1, 0):
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                    start = member.tell()
                    with open(path, "rb") as file:  # the entry's data follow its own header, name and extra field
                        file.seek(entry.header_offset + 26)
                        offset = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + start
                    if not dtype.hasobject and 0 not in shape:
                        return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[key]
