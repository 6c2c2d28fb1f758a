"""`parquet:GLOB`: images in Parquet files, in the layout of the Hugging Face Hub."""

import collections
import json
import os
import threading
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.source import DataError, StoredSource, missing_package, one_line
from hexa_jax.data.sources.folder import read_file
from hexa_jax.data.sources.paths import classes_of_texts
from hexa_jax.data.sources.registry import Options, register

CACHE_BYTES = 2**28  # of row groups, in each process
IMAGE_NAMES = ("image", "img", "jpg", "png", "bytes")
LABEL_NAMES = ("label", "labels")


class ParquetSource(StoredSource):
    """The rows of Parquet files, in the order of the files' names.

    A row group is read when one of its rows is wanted; the latest ones are kept, up to
    `CACHE_BYTES`.

    Args:
        paths: of the files.
        image_column: of {bytes, path} structs or of bytes; empty: the one there is.
        label_column: of whole numbers or texts; empty: "label", or the only one of classes.

    Raises:
        DataError: pyarrow is missing, a file cannot be read, or a column is missing or unclear.
    """

    def __init__(self, paths: list[str], image_column: str = "", label_column: str = ""):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise missing_package("parquet", "pyarrow") from None
        self._paths = paths
        groups, labels = [], []
        for number, path in enumerate(paths):
            try:
                with pq.ParquetFile(path) as file:
                    if not number:
                        self._image, label = self._columns(
                            file.schema_arrow, path, image_column, label_column
                        )
                        class_names = _class_names(file.schema_arrow, label)
                    for column in filter(None, (self._image, label)):
                        if column not in file.schema_arrow.names:
                            raise DataError(
                                f"parquet:{path} has no column {column!r}, which {paths[0]} has"
                            )
                    rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                    groups += [(number, group, count) for group, count in enumerate(rows)]
                    if label:
                        labels.append(file.read([label]).column(0))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"parquet:{path} cannot be read: {one_line(error)}") from None
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self._ends) or not self._ends[-1]:
            raise DataError(f"parquet:{paths[0]} holds no rows")
        self._start()
        if not labels:
            super().__init__(None, None)
            return
        column = pa.chunked_array([chunk for part in labels for chunk in part.chunks])
        if pa.types.is_integer(column.type):
            super().__init__(column.fill_null(-1).to_numpy().astype(np.int32), class_names)
        else:
            super().__init__(
                *classes_of_texts(["" if t is None else t for t in column.to_pylist()])
            )

    def _start(self) -> None:
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _columns(self, schema: Any, path: str, image: str, label: str) -> tuple[str, str]:
        """Names of the columns of images and of labels, the second empty where there is none."""
        import pyarrow as pa

        def is_image(kind: Any) -> bool:
            inner = (
                kind.field("bytes").type
                if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
                else kind
            )
            return pa.types.is_binary(inner) or pa.types.is_large_binary(inner)

        images = [field.name for field in schema if is_image(field.type)]
        known = f"it has {', '.join(f'{field.name} ({field.type})' for field in schema)}"[:300]
        if image and image not in images:
            raise DataError(f"parquet:{path} has no column of images {image!r}: {known}")
        if not image:
            named = [name for name in IMAGE_NAMES if name in images]
            if not images or (len(images) > 1 and not named):
                problem = "several columns of images" if images else "no column of image bytes"
                raise DataError(
                    f"parquet:{path} has {problem}: {known}; --config.data.image_column=NAME tells "
                    "which"
                )
            image = images[0] if len(images) == 1 else named[0]
        labels = [
            field.name
            for field in schema
            if pa.types.is_integer(field.type)
            or pa.types.is_string(field.type)
            or pa.types.is_large_string(field.type)
        ]
        if label and label not in labels:
            raise DataError(f"parquet:{path} has no column of labels {label!r}: {known}")
        classes = [name for name in labels if _class_names(schema, name)]
        if not label:
            label = next(
                (name for name in LABEL_NAMES if name in labels),
                classes[0] if len(classes) == 1 else "",
            )
        return image, label

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """(row group in the order of all, row in it)."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - int(self._ends[group] - self._groups[group, 2])

    def _rows(self, group: int) -> Any:
        """The images of a row group; one thread reads, the others wait for what it leaves."""
        import pyarrow.parquet as pq

        with self._lock:
            if group not in self._kept:
                number, inside, _ = self._groups[group].tolist()
                with pq.ParquetFile(self._paths[number]) as file:
                    self._kept[group] = file.read_row_group(inside, columns=[self._image]).column(0)
                while (
                    len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > CACHE_BYTES
                ):
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def read(self, index: int) -> bytes:
        import pyarrow as pa

        group, row = self._place(index)
        try:
            value = self._rows(group)[row].as_py()
        except (pa.ArrowException, OSError) as error:
            raise BadImage(self.name(index), f"unreadable row group: {one_line(error)}") from None
        if not isinstance(value, dict):
            value = {"bytes": value}
        if value["bytes"] is not None:
            return value["bytes"]
        if not value.get("path"):
            raise BadImage(self.name(index), "the row holds no image")
        folder = os.path.dirname(self._paths[int(self._groups[group, 0])])
        return read_file(os.path.join(folder, value["path"]))

    def name(self, index: int) -> str:
        group, row = self._place(index)
        number, inside, _ = self._groups[group].tolist()
        before = self._groups[group - inside : group, 2].sum()
        return f"{self._paths[number]}, row {row + int(before)}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The names that the datasets library wrote beside the schema for a column of class numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features[column].get("names") if features[column]["_type"] == "ClassLabel" else None
    except (KeyError, ValueError, TypeError):
        return None


def open_parquet(where: str, options: Options) -> ParquetSource:
    """Return the rows of the Parquet files that a pattern names."""
    return ParquetSource(
        options.files(where, ".parquet"), options.image_column, options.label_column
    )


register(
    "parquet",
    open_parquet,
    usage="parquet:GLOB",
    summary="Parquet files as on the Hugging Face Hub: a column of `{bytes, path}` or of bytes, and one of labels "
    "(`config.data.image_column`, `config.data.label_column`); needs `pip install pyarrow`",
    suffixes=(".parquet",),
    paths=True,
)
