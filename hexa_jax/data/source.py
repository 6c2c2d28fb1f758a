"""What a source of examples is: `source[i]` is `{"image": encoded bytes or uint8 [H, W, 3], "label": int}`.

There is no label where the source has none. The index is the example's identity, the same on every host and in every run.
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
        """Example `index`. Raises IndexError out of range, BadImage where the stored bytes cannot be read."""

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
