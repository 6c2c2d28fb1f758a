"""`tfds:NAME`: examples of a prepared TensorFlow Datasets data set, without TensorFlow."""

import os
import pathlib
import re
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.source import DataError, checked_index, one_line
from hexa_jax.data.sources.registry import Options, register
from hexa_jax.storage.gcs import fetch, files, filesystem, is_remote


class TfdsSource:
    """A split of a data set prepared by tfds as ArrayRecord; images stay encoded.

    It is read from its files alone: neither the data set's own code, nor TensorFlow, nor the
    network is needed.

    Args:
      spec: NAME[/CONFIG][:VERSION][:SPLIT], what follows `tfds:`.
      data_dir: the directory given to tfds for preparing, or a copy of it in a bucket; by default
          tfds's own.
      data_cache: local folder for copies of what is in a bucket; without one each record is a
          request.
    Raises:
      DataError: not prepared (with the command that does it), not ArrayRecord, no such split, or no
          image feature.
    """

    def __init__(self, spec: str, *, data_dir: str | None = None, data_cache: str = ""):
        match = re.fullmatch(r"(?P<name>[^:]+?)(:(?P<version>\d[\d.*]*))?(:(?P<split>\D.*))?", spec)
        if match is None:
            raise DataError(
                f"unknown data source 'tfds:{spec}': use tfds:NAME[/CONFIG][:VERSION][:SPLIT]"
            )
        self._name = match["name"] + (f":{match['version']}" if match["version"] else "")
        self._split, self._data_dir = (
            match["split"] or "train",
            data_dir and os.path.expanduser(data_dir),
        )
        self._labels: np.ndarray | None = None
        self._cache, self._folder = data_cache, ""  # the second: of the copies
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds  # takes half a second

        try:
            builder = self._builder()
        except tfds.core.DatasetNotFoundError:
            where = f" --data_dir={self._data_dir}" if self._data_dir else ""
            if is_remote(self._data_dir or ""):
                where = " and copy it there"
            raise DataError(
                f"tfds:{self._name} is not prepared in "
                f"{self._data_dir or 'the data directory of tfds'}: run "
                f"python -m hexa_jax.prepare {self._name}{where} "
                "(after pip install -e '.[prepare]' in the clone of hexa_jax)"
            ) from None
        except Exception as error:  # those of tfds, or whatever a bucket's libraries raise
            raise DataError(f"tfds:{self._name} cannot be opened: {one_line(error)}") from None
        features, splits = dict(builder.info.features), sorted(builder.info.splits)
        images = [
            key for key, feature in features.items() if isinstance(feature, tfds.features.Image)
        ]
        if not images:
            raise DataError(
                f"tfds:{self._name} has no image feature (it has: {', '.join(features)})"
            )
        self._image_key = "image" if "image" in images else images[0]
        keys = [
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        ]
        self._label_key = "label" if "label" in keys else keys[0] if len(keys) == 1 else None
        self.class_names = list(features[self._label_key].names) if self._label_key else None
        self.num_classes = len(self.class_names) if self.class_names else None
        try:
            skip = {key: tfds.decode.SkipDecoding() for key in images}
            self._records = builder.as_data_source(self._split, decoders=skip)
        except NotImplementedError:
            raise DataError(
                f"tfds:{self._name} is stored as {builder.info.file_format.value}, without random "
                "access: prepare it "
                "again in another data_dir with file_format='array_record'"
            ) from None
        except (ValueError, KeyError):
            raise DataError(
                f"tfds:{self._name} has no split {self._split!r} (it has: {', '.join(splits)})"
            ) from None
        self._process = os.getpid()
        self._in_place = is_remote(builder.data_path)
        if self._in_place and self._cache:
            self._folder = str(self._fetched(builder))
            self._open()

    def _builder(self) -> Any:
        """What tfds knows of the data set."""
        import tensorflow_datasets as tfds

        if self._folder:
            return tfds.core.read_only_builder.builder_from_directory(self._folder)
        if is_remote(self._data_dir or ""):
            filesystem(str(self._data_dir))  # says what is missing
        return tfds.core.read_only_builder.builder_from_files(self._name, data_dir=self._data_dir)

    def _fetched(self, builder: Any) -> pathlib.Path:
        """Local copies of the split's files, and of those that describe the data set."""
        url = str(builder.data_path)
        shards = {
            pathlib.PurePath(path).name for path in builder.info.splits[self._split].filepaths
        }
        there = files(url).items()
        return fetch(
            url,
            {name: v for name, v in there if name in shards or ".array_record" not in name},
            self._cache,
        )

    def record(self, index: int) -> dict[str, Any]:
        """All features of a record, images encoded."""
        if self._process != os.getpid():  # readers survive neither a fork nor a pickle
            self._open()
        return self._records[checked_index(index, len(self))]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = self.record(index)
        except (ValueError, RuntimeError) as error:
            if self._in_place and "orrupt" not in str(error):  # the network: the image may be good
                raise DataError(f"{self.name(index)} cannot be read: {one_line(error)}") from None
            raise BadImage(self.name(index), f"unreadable record: {one_line(error)}") from None
        image = {"image": example[self._image_key]}
        if image["image"] is None:  # what is left of a record whose file was cut off
            raise BadImage(self.name(index), "unreadable record: it is empty")
        return {**image, "label": int(example[self._label_key])} if self._label_key else image

    def name(self, index: int) -> str:
        return f"tfds:{self._name}:{self._split}, index {index}"

    def labels(self) -> np.ndarray | None:
        """Return labels int32 [N], or None.

        The first call reads every record, as labels lie beside images: 140 GB of ImageNet.
        """
        if self._labels is None and self._label_key is not None:
            found = (self.record(i)[self._label_key] for i in range(len(self)))
            self._labels = np.array([-1 if label is None else label for label in found], np.int32)
        return self._labels

    def __getstate__(self) -> dict[str, Any]:
        names = ("_name", "_split", "_data_dir", "_labels", "_cache", "_folder")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def open_tfds(where: str, options: Options) -> TfdsSource:
    """Return the split of a prepared data set."""
    return TfdsSource(where, data_dir=options.data_dir, data_cache=options.data_cache)


register(
    "tfds",
    open_tfds,
    usage="tfds:NAME[/CONFIG][:VERSION][:SPLIT]",
    summary="a TensorFlow Datasets data set in ArrayRecord format, also from a bucket; "
    "`python -m hexa_jax.prepare` makes it, of a folder, too; the split may be a slice, "
    "`train[:10%]`",
)
