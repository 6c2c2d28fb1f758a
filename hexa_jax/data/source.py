"""Sources of examples: `source[i]` has "image" (bytes or uint8 [H, W, 3]) and "label".

There is no label where the source has none. The index is the example's identity, the same on every
host and in every run.
"""

from typing import Any, Protocol

import numpy as np


class DataError(ValueError):
    """A data set that cannot be used as asked; the message is one line for the user."""


class Source(Protocol):
    """Random access to examples. Picklable; files are opened lazily, once per process."""

    @property
    def num_classes(self) -> int | None: ...

    @property
    def class_names(self) -> list[str] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return example `index`.

        Raises:
            IndexError: it is out of range.
            BadImage: the stored bytes cannot be read.
        """

    def name(self, index: int) -> str:
        """What to call the example in a message: its path, or "index N" of the source."""

    def labels(self) -> np.ndarray | None:
        """int32 [N], or None. Free except for tfds, which reads every record once."""


def checked_index(index: int, length: int) -> int:
    """The index as an int; IndexError unless it is one of 0 ... length - 1."""
    if not 0 <= index < length:  # no negative indices: an index is an identity
        raise IndexError(f"index {index} of a source of {length} examples")
    return int(index)


def one_line(error: Exception) -> str:
    """An error's own text, without line breaks."""
    return " ".join(str(error).split())[:300]


class StoredSource:
    """Base of sources whose labels are in memory; a subclass defines `read` and `name`.

    Args:
        labels: int32 [N], -1 where unknown; None without labels.
        class_names: one per class; None where classes are numbers.
    """

    def __init__(self, labels: np.ndarray | None, class_names: list[str] | None):
        self._labels, self.class_names = labels, class_names
        self.num_classes: int | None = None  # also where all labels are unknown
        if labels is not None:
            self.num_classes = max(int(labels.max(initial=-1)) + 1, len(class_names or ())) or None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Any:
        """Return an example's encoded bytes or pixels; BadImage where they cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return what to call an example in a message."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = checked_index(index, len(self))
        example = {"image": self.read(index)}
        return example if self._labels is None else {**example, "label": int(self._labels[index])}

    def labels(self) -> np.ndarray | None:
        """Return int32 [N], or None."""
        return self._labels

    def forget_labels(self) -> None:
        """Have no labels from now on."""
        self._labels = self.class_names = self.num_classes = None


def missing_package(kind: str, package: str, reason: str = "") -> DataError:
    """Return the error of a kind of source whose package is not installed."""
    return DataError(f"{kind}: needs a package{reason}: pip install {package}")
