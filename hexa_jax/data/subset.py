"""A part of a source, chosen by indices; looks like a source itself."""

from typing import Any

import numpy as np

from hexa_jax.data.source import Source
from hexa_jax.data.sources.tfds import TfdsSource


class Subset:
    """Examples `indices` of a source, numbered from 0."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, np.asarray(indices)
        self.num_classes, self.class_names = source.num_classes, source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """Of the example, for messages."""
        return self.source.name(int(self.indices[index]))

    def labels(self) -> np.ndarray | None:
        """int32 labels of the part, or None."""
        labels = self.source.labels()
        return None if labels is None else labels[self.indices]


def spread(num_examples: int, limit: int) -> np.ndarray:
    """Return int64 indices of at most `limit` examples (0: all), spread evenly."""
    count = min(limit, num_examples) if limit else num_examples
    return np.arange(count) * num_examples // count


def labels_are_free(source: Source) -> bool:
    """Whether `labels()` costs nothing: tfds would read every record."""
    return not isinstance(source.source if isinstance(source, Subset) else source, TfdsSource)
