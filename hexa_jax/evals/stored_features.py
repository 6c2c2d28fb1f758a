"""Features on disk, in parts: an extraction that was cut off resumes behind the last."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Features(NamedTuple):
    """Float32 [N, F], int32 [N] labels (-1: none), and which rows could be read."""

    values: np.ndarray
    labels: np.ndarray
    known: np.ndarray


def join(parts: list[Features]) -> Features:
    """One after another; at least one."""
    return Features(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


class StoredFeatures:
    """A folder of parts; those of other weights or images are deleted when it is opened.

    Args:
        folder: made if it is not there.
        about: JSON values that say what the features are of.
    """

    def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]):
        self.folder = folder
        described, text = folder / "about.json", json.dumps(dict(about), indent=1, sort_keys=True)
        if not described.is_file() or described.read_text() != text:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            described.write_text(text)

    def load(self) -> list[Features]:
        """The parts that are complete, in order, up to the first that is not."""
        parts: list[Features] = []
        while (path := self._path(len(parts))).is_file():
            with np.load(path, allow_pickle=False) as arrays:
                parts.append(Features(*(arrays[name] for name in Features._fields)))
        return parts

    def add(self, number: int, part: Features) -> None:
        """Writes part `number`; a kill in between leaves nothing that looks like one."""
        temporary = self.folder / "unfinished"
        with open(temporary, "wb") as file:
            np.savez(file, **part._asdict())
        temporary.rename(self._path(number))

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"part_{number:05d}.npz"
