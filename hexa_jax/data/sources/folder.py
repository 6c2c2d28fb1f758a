"""`folder:DIR[,DIR...]`: every image below one or several directories."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.formats import IMAGE_SUFFIXES
from hexa_jax.data.source import DataError, Source, StoredSource
from hexa_jax.data.sources.paths import Names, folder_classes, readable
from hexa_jax.data.sources.registry import Options, register


class FolderSource(StoredSource):
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
        skipped_note: one line about images in formats that need a package which is not installed.

    Raises:
        DataError: no such directory, no image below it, or fewer than two sub-directories to be
            classes where `labels` is "folders".
    """

    def __init__(self, directory: str, labels: str = "auto"):
        self.directory, origin = directory, f"folder:{directory}"
        if not os.path.isdir(directory):
            problem = "is not a directory" if os.path.exists(directory) else "does not exist"
            raise DataError(f"{origin} {problem}")
        paths = sorted(os.fsencode(path) for path in _walk(directory))
        if not paths:
            raise DataError(f"{origin} holds no image ({', '.join(s[1:] for s in IMAGE_SUFFIXES)})")
        kept, self.skipped_note = readable(paths, origin)
        paths = [path for path, keep in zip(paths, kept, strict=True) if keep]
        self._paths = Names(paths)
        labels_of, class_names, self.labels_note = folder_classes(paths, labels, origin)
        super().__init__(labels_of, class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self.directory, self._paths[index])


def read_file(path: str) -> bytes:
    """Return a file's bytes; BadImage where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(path, error.strerror or "cannot be read") from None


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
            raise DataError(
                f"folder:{directory} cannot be listed: {where}: {error.strerror}"
            ) from None
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else real).append(path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield path


class SeveralSources(StoredSource):
    """Several sources, one after the other, as one.

    Args:
        sources: with classes by name, all or none of them; a name means the same class in each.

    Raises:
        DataError: some have classes and some have none.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        notes = [
            [getattr(source, name, "") for source in sources]
            for name in ("labels_note", "skipped_note")
        ]
        self.labels_note, self.skipped_note = ("; ".join(filter(None, found)) for found in notes)
        labelled = [source for source in sources if source.class_names]
        class_names: list[str] | None = None
        labels: np.ndarray | None = None
        if labelled and len(labelled) < len(sources):
            without = next(source for source in sources if not source.class_names)
            raise DataError(
                f"{labelled[0].name(0)} is of a folder with classes, {without.name(0)} of one "
                "without: "
                "--config.data.labels=none uses neither"
            )
        if labelled:
            class_names = sorted({name for source in labelled for name in source.class_names or ()})
            number = {name: i for i, name in enumerate(class_names)}
            parts = []
            for source in sources:
                table = np.array(
                    [*(number[name] for name in source.class_names or ()), -1], np.int32
                )
                parts.append(table[source.labels()])
            labels = np.concatenate(parts)
        super().__init__(labels, class_names)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], index - (int(self._ends[which - 1]) if which else 0)

    def read(self, index: int) -> Any:
        source, inner = self._place(index)
        return source[inner]["image"]

    def name(self, index: int) -> str:
        source, inner = self._place(index)
        return source.name(inner)


def open_folders(where: str, options: Options) -> FolderSource | SeveralSources:
    """Return the images of a folder, or of several separated by commas."""
    whole = options.path(where)
    if os.path.isdir(whole) or "," not in where:  # a folder's name may hold a comma
        return FolderSource(whole, options.labels)
    folders = [options.path(part.strip()) for part in where.split(",") if part.strip()]
    real = [os.path.realpath(folder) for folder in folders]
    for i, inner in enumerate(real):
        for j, outer in enumerate(real):
            if i != j and os.path.join(inner, "").startswith(os.path.join(outer, "")):
                raise DataError(
                    f"folder:{folders[i]} lies in {folders[j]}: its images would count twice"
                )
    return SeveralSources([FolderSource(folder, options.labels) for folder in folders])


register(
    "folder",
    open_folders,
    usage="folder:DIR[,DIR...]",
    summary="any tree of JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF and, with `pip install pillow-heif`, HEIC "
    "files; sub-folders are classes if they look like it (`config.data.labels`)",
    paths=True,
)
