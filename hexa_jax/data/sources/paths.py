"""Names of examples, kept small, and the classes that their folders stand for."""

import collections
import logging
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hexa_jax.data.formats import missing_formats
from hexa_jax.data.source import DataError

FOLDER_LABELS = ("auto", "folders", "none")
# A year, a month of it, or a day: how photographs are filed, and hardly what is on them.
DATE_NAME = re.compile(r"(19|20)\d\d([-_. ]?(0[1-9]|1[0-2])([-_. ]?(0[1-9]|[12]\d|3[01]))?)?")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


class Names:
    """A list of texts in one block of bytes.

    A list of a million strings would be copied into every worker process by its reference counts.
    """

    def __init__(self, names: Iterable[bytes]):
        names = list(names)
        self._block = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._block[start : self._ends[index]])


class FolderClasses(NamedTuple):
    """Classes by folder.

    Attributes:
        labels: int32 [N], or None.
        class_names: sorted, or None.
        note: one line about what was taken for classes and how to change that; empty where nobody
            would be surprised.
    """

    labels: np.ndarray | None
    class_names: list[str] | None
    note: str


def folder_classes(paths: list[bytes], labels: str, origin: str) -> FolderClasses:
    """Return the classes that the first-level folders of relative paths stand for.

    Args:
        paths: of all examples, relative to what `origin` names.
        labels: "auto": folders are classes if there are at least two, no path lies beside them, and
            their names are not all dates. "folders": they are the classes whatever their names are,
            and paths beside them are of no known class (-1). "none": there are no classes.
        origin: for messages.

    Raises:
        DataError: fewer than two folders to be classes where `labels` is "folders".
    """
    if labels not in FOLDER_LABELS:
        raise DataError(
            f"data.labels={labels!r} is not known: use one of {', '.join(FOLDER_LABELS)}"
        )
    tops = [path.split(b"/", 1)[0] if b"/" in path else b"" for path in paths]
    classes = sorted(set(tops) - {b""})
    beside = tops.count(b"")
    dates = all(DATE_NAME.fullmatch(os.fsdecode(name)) for name in classes)
    labelled = labels == "folders" or (
        labels == "auto" and len(classes) >= 2 and not beside and not dates
    )
    if labels == "folders" and len(classes) < 2:
        raise DataError(
            f"{origin} has {len(classes)} sub-folders with images: --config.data.labels=folders "
            "needs two or more"
        )
    note = ""
    if labels == "auto" and len(classes) >= 2:
        note = f"{origin}: {_note(classes, labelled, beside)}"
    if not labelled:
        return FolderClasses(None, None, note)
    ids = {name: i for i, name in enumerate(classes)} | {b"": -1}
    names = [os.fsdecode(name) for name in classes]
    if {name.lower() for name in names} <= SPLIT_NAMES:
        logging.getLogger(__name__).warning(
            "%s: sub-directories %s are taken as the classes; are they splits? Then name one: "
            "%s/%s",
            origin,
            ", ".join(names),
            origin,
            names[0],
        )
        note = ""  # the warning says it
    return FolderClasses(np.array([ids[top] for top in tops], np.int32), names, note)


def _note(classes: list[bytes], labelled: bool, beside: int) -> str:
    """What became of the sub-folders of a folder, and the setting that changes it."""
    shown = [os.fsdecode(name) for name in classes[:3]] + ["..."] * (len(classes) > 3)
    folders = f"{len(classes)} sub-folders ({', '.join(shown)})"
    if labelled:
        return f"its {folders} are taken as the classes; if they are not, --config.data.labels=none"
    images = "1 image lies" if beside == 1 else f"{beside} images lie"
    reason = f"{images} beside them" if beside else "their names are dates"
    return f"its {folders} are not taken as classes, because {reason}; if they are, --config.data.labels=folders"


def without_common_folder(paths: list[bytes]) -> list[bytes]:
    """Return relative paths without the folders that all of them share."""
    while paths:
        top, slash, _ = paths[0].partition(b"/")
        if not slash or not all(path.startswith(top + slash) for path in paths):
            break
        paths = [path[len(top) + 1 :] for path in paths]
    return paths


def classes_of_texts(texts: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return int32 labels [N] and class names for labels given as texts.

    Whole numbers are the labels themselves, other texts are numbered in their sorted order, and an
    empty text is no known class (-1).
    """
    known = sorted({text for text in texts if text})
    if not known:
        return None, None
    if all(re.fullmatch(r"\d{1,9}", text) for text in known):
        return np.array([int(text) if text else -1 for text in texts], np.int32), None
    ids = {text: number for number, text in enumerate(known)} | {"": -1}
    return np.array([ids[text] for text in texts], np.int32), known


def readable(paths: list[bytes], origin: str) -> tuple[np.ndarray, str]:
    """Return which images can be read here, bool [N], and one line about the others.

    Raises:
        DataError: none is.
    """
    missing = {ending.encode(): need for ending, need in missing_formats().items()}
    needs = [missing.get(os.path.splitext(path)[1].lower()) for path in paths]
    counts = collections.Counter(need for need in needs if need)
    note = "; ".join(
        f"{origin}: {count} images are skipped, because {need}" for need, count in counts.items()
    )
    if note and counts.total() == len(paths):
        raise DataError(note)
    return np.array([need is None for need in needs], bool), note
