"""Write the table of `hexa embed`: one row per image, as Parquet, CSV or NumPy arrays.

Columns of N images, F features and k neighbors:

    path        what the source calls the image
    label       its class where the source has one, else empty
    cluster     int32
    neighbors   int32 [k], rows of this table (from 0), the most similar first
    similarity  float32 [k], their cosines
    embedding   float32 [F], not normalized

In CSV the lists are spread over columns: neighbor_1, similarity_1, ..., embedding_1, ...
"""

import csv
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from hexa_jax.data.source import DataError
from hexa_jax.explore.embedding import Embedded
from hexa_jax.explore.structure import Clusters, Neighbors

SUFFIXES = (".parquet", ".csv", ".npz")
ROWS = 10_000  # of a row group


def check_table(path: pathlib.Path) -> None:
    """Say before any work whether the table could be written.

    Raises:
        DataError: unknown suffix, no such folder, or pyarrow is missing.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"--output={path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not path.parent.is_dir():
        raise DataError(f"--output={path}: there is no folder {path.parent}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise DataError(
                f"--output={path} needs pyarrow: pip install pyarrow, or write .csv or .npz"
            ) from None


def write_table(
    path: pathlib.Path,
    images: Embedded,
    labels: list[str],
    clusters: Clusters,
    neighbors: Neighbors,
) -> None:
    """Write the table in the format of the path's suffix; the file appears when it is complete.

    Args:
        path: checked by `check_table`.
        images: N embedded images.
        labels: [N] class names, empty where there is none.
        clusters: of the images.
        neighbors: of the images.
    """
    columns = {
        "path": images.names,
        "label": labels,
        "cluster": clusters.labels,
        "neighbors": neighbors.rows,
        "similarity": neighbors.similarity,
        "embedding": images.values,
    }
    writers = {".parquet": _parquet, ".csv": _csv, ".npz": _npz}
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        writers[path.suffix](temporary, columns)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _parts(length: int) -> Iterator[slice]:
    return (slice(first, first + ROWS) for first in range(0, length, ROWS))


def _parquet(path: pathlib.Path, columns: dict) -> None:
    import pyarrow
    import pyarrow.parquet

    def array(values: list | np.ndarray) -> pyarrow.Array:
        if not isinstance(values, np.ndarray):
            # A name that is not UTF-8 (bytes of the file system) must not end the work.
            return pyarrow.array([_text(value) for value in values], pyarrow.string())
        if values.ndim == 1:
            return pyarrow.array(values)
        flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
        return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])

    def table(part: slice) -> pyarrow.Table:
        return pyarrow.table({name: array(values[part]) for name, values in columns.items()})

    with pyarrow.parquet.ParquetWriter(path, table(slice(0, 0)).schema) as writer:
        for part in _parts(len(columns["path"])):
            writer.write_table(table(part))


def _csv(path: pathlib.Path, columns: dict) -> None:
    singular = {"neighbors": "neighbor"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        header: list[str] = []
        for name, values in columns.items():
            if isinstance(values, np.ndarray) and values.ndim == 2:
                header += [f"{singular.get(name, name)}_{i + 1}" for i in range(values.shape[1])]
            else:
                header.append(name)
        writer.writerow(header)
        for row in range(len(columns["path"])):
            cells: list[str] = []
            for values in columns.values():
                value = values[row]
                cells += map(_cell, value if isinstance(value, np.ndarray) else [value])
            writer.writerow(cells)


def _cell(value: str | np.generic) -> str:
    """Nine significant digits give a float32 back exactly."""
    return f"{value:.9g}" if isinstance(value, np.floating) else _text(str(value))


def _npz(path: pathlib.Path, columns: dict) -> None:
    def array(values: list | np.ndarray) -> np.ndarray:
        return values if isinstance(values, np.ndarray) else np.array([_text(v) for v in values])

    with path.open("wb") as file:
        arrays: dict[str, Any] = {name: array(values) for name, values in columns.items()}
        np.savez(file, **arrays)


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()
