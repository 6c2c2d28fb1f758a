"""`hf:NAME[:SPLIT]`: Hugging Face data sets from the cache, a copy, or the Hub."""

import os
import re
from typing import Any

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.source import DataError, StoredSource, missing_package, one_line
from hexa_jax.data.sources.folder import read_file
from hexa_jax.data.sources.paths import classes_of_texts
from hexa_jax.data.sources.registry import Options, register


class HuggingFaceSource(StoredSource):
    """A split of a data set; images stay encoded, in the memory-mapped files of the library.

    Args:
        dataset: a `datasets.Dataset`.
        origin: what messages call it.
        image_column, label_column: empty: found by their features.

    Raises:
        DataError: there is no column of images, or several and none of them is called image or img.
    """

    def __init__(self, dataset: Any, origin: str, image_column: str = "", label_column: str = ""):
        import datasets

        features = dataset.features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        known = (
            f"it has {', '.join(f'{name} ({type(f).__name__})' for name, f in features.items())}"[
                :300
            ]
        )
        named = [name for name in ("image", "img") if name in images]
        if image_column and image_column not in images:
            raise DataError(f"{origin} has no column of images {image_column!r}: {known}")
        if not image_column and len(images) != 1 and not named:
            problem = "several columns of images" if images else "no column of images"
            raise DataError(
                f"{origin} has {problem}: {known}; --config.data.image_column=NAME tells which"
            )
        self._image = image_column or (images[0] if len(images) == 1 else named[0])
        classes = [
            name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)
        ]
        plain = [
            n
            for n in ("label", "labels")
            if n in features and isinstance(features[n], datasets.Value)
        ]
        if label_column and label_column not in features:
            raise DataError(f"{origin} has no column {label_column!r}: {known}")
        label = label_column or next(
            (name for name in (*plain, "label", "labels") if name in (*classes, *plain)),
            classes[0] if len(classes) == 1 else "",
        )
        self.origin = origin
        self._rows = dataset.select_columns([self._image]).cast_column(
            self._image, datasets.Image(decode=False)
        )
        if not label:
            super().__init__(None, None)
            return
        values = list(dataset.select_columns([label]).with_format(None)[label])
        if isinstance(features[label], datasets.ClassLabel):
            numbers = [-1 if value is None else value for value in values]
            super().__init__(np.array(numbers, np.int32), list(features[label].names))
        else:
            super().__init__(*classes_of_texts(["" if v is None else str(v) for v in values]))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> bytes:
        try:
            value = self._rows[index][self._image]
        except Exception as error:  # of pyarrow, about a damaged file
            raise BadImage(self.name(index), f"unreadable row: {one_line(error)}") from None
        if value is None or (value["bytes"] is None and not value["path"]):
            raise BadImage(self.name(index), "the row holds no image")
        return value["bytes"] if value["bytes"] is not None else read_file(value["path"])

    def name(self, index: int) -> str:
        return f"{self.origin}, row {index}"


def open_hf(where: str, options: Options) -> HuggingFaceSource:
    """Return a split of a data set, the train split by default."""
    try:
        import datasets
    except ImportError:
        raise missing_package("hf", "datasets") from None
    match = re.fullmatch(r"(?P<name>[^:@]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?", where)
    if match is None:
        raise DataError(f"unknown data source 'hf:{where}': use hf:NAME[@CONFIG][:SPLIT]")
    split, origin = match["split"] or "train", f"hf:{where}"
    local = options.path(match["name"]) if not match["name"].startswith("gs://") else ""
    try:
        if os.path.isdir(local) and any(
            os.path.isfile(os.path.join(local, name))
            for name in ("state.json", "dataset_dict.json")
        ):
            loaded = datasets.load_from_disk(local)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise DataError(
                        f"{origin} has no split {split!r} (it has: {', '.join(loaded)})"
                    )
                loaded = loaded[split]
            elif match["split"]:
                raise DataError(f"{origin}: the folder holds a single split, without a name")
        else:
            name = local if os.path.isdir(local) else match["name"]
            loaded = datasets.load_dataset(name, match["config"], split=split)
    except DataError:
        raise
    except Exception as error:  # of the library, its network and its file readers
        reason = one_line(error)
        offline = "offline" in reason.lower() or isinstance(error, ConnectionError)
        hint = (
            "; it is not in the cache of datasets, and the Hub cannot be reached" if offline else ""
        )
        raise DataError(f"{origin} cannot be opened: {reason}{hint}") from None
    return HuggingFaceSource(loaded, origin, options.image_column, options.label_column)


register(
    "hf",
    open_hf,
    usage="hf:NAME[@CONFIG][:SPLIT]",
    summary="a data set of the Hugging Face `datasets` library: by name from its cache or the Hub, or a local folder "
    "that it saved; works offline (`HF_HUB_OFFLINE=1`); needs `pip install datasets`",
)
