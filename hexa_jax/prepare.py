"""Write a data set as ArrayRecord, which training reads at random without TensorFlow.

python -m hexa_jax.prepare imagenet2012 --manual_dir=DIR [--data_dir=DIR]
    any data set of tfds, by its name
python -m hexa_jax.prepare folder:DIR --name=NAME [--data_dir=DIR] [--labels=auto]
    a folder of images, one sub-folder per class or none

--data_dir    where it goes; by default TFDS_DATA_DIR, or ~/tensorflow_datasets. Copied to a bucket,
              it is read from there
--manual_dir  where you put the archives that tfds may not download (ImageNet:
              ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar)
--name        of the new data set: lower case, digits and underscores; --config.data.source=tfds:NAME
              reads it
--labels      whether sub-folders are classes: auto (yes, unless their names are dates or images lie
              beside them), folders or none

Images keep their bytes: nothing is decoded. A data set that is there is left alone; one that was
interrupted is begun anew. This needs TensorFlow (pip install -e '.[prepare]' in the clone of
hexa_jax, or pip install tensorflow-cpu importlib_resources); training does not.
"""

import importlib.util
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from hexa_jax.core.arguments import Parser
from hexa_jax.data.source import DataError, one_line
from hexa_jax.data.sources import FolderSource
from hexa_jax.storage.gcs import is_remote

EVERY = 2000  # images between two lines of progress


def main(argv: list[str]) -> int:
    """Prepare a data set; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    parser = Parser("hexa_jax.prepare", DataError)
    parser.add_argument("dataset")
    parser.add_argument("--data_dir")
    parser.add_argument("--manual_dir")
    parser.add_argument("--name")
    parser.add_argument("--labels", default="auto")
    try:
        options = parser.parse_args(argv)
        if is_remote(options.data_dir or ""):
            where = f"gcloud storage cp -r DIR/* {options.data_dir}"
            raise DataError(
                f"--data_dir={options.data_dir}: prepare into a local folder and copy it: {where}"
            )
        if importlib.util.find_spec("tensorflow") is None:
            raise DataError(
                "preparing needs TensorFlow: pip install -e '.[prepare]' in the clone of hexa_jax, "
                "or pip install tensorflow-cpu importlib_resources"
            )
        kind, _, rest = options.dataset.partition(":")
        if kind == "folder":
            where = prepare_folder(rest, options.name or "", options.data_dir, options.labels)
        else:
            where = prepare_tfds(options.dataset, options.data_dir, options.manual_dir)
    except (DataError, OSError) as error:
        print(f"hexa_jax.prepare: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hexa_jax.prepare: interrupted; the same command begins anew", file=sys.stderr)
        return 130
    print(f"ready: {where}")
    return 0


def prepare_tfds(name: str, data_dir: str | None, manual_dir: str | None) -> str:
    """Download and prepare a data set of tfds; returns its folder.

    Raises:
        DataError: unknown name, archives missing, or a download that failed.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise DataError(f"tfds has no {name!r}: {one_line(error)}") from None
    settings = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        builder.download_and_prepare(download_config=settings)
    except (AssertionError, ValueError, RuntimeError, tfds.download.DownloadError) as error:
        raise DataError(f"{name} cannot be prepared: {one_line(error)}") from None
    return str(builder.data_dir)


def prepare_folder(directory: str, name: str, data_dir: str | None, labels: str = "auto") -> str:
    """Pack a folder of images, with labels if any, into a data set; return its folder.

    Raises:
        DataError: no images, a name that tfds would not take, or a data set of that name with other
            images.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(
            f"--name={name!r}: lower case letters, digits and underscores, such as --name=my_photos"
        )
    source = FolderSource(str(pathlib.Path(directory).expanduser()), labels)
    if source.labels_note:
        print(source.labels_note.replace("--config.data.labels", "--labels"), flush=True)
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    if source.class_names:
        features["label"] = tfds.features.ClassLabel(names=source.class_names)
    builder = tfds.dataset_builders.AdhocBuilder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": _Examples(source)},
        data_dir=data_dir,
        file_format="array_record",
        description=f"The images of {pathlib.Path(directory).name}.",
    )
    if builder.is_prepared():
        there = builder.info.splits["train"].num_examples
        if there != len(source):
            raise DataError(
                f"{builder.data_dir} has {there} images, {directory} has {len(source)}: give "
                "another --name"
            )
        return str(builder.data_dir)
    builder.download_and_prepare()
    return str(builder.data_dir)


class _Examples:
    """What tfds stores of a folder; iterating prints progress."""

    def __init__(self, source: FolderSource):
        self.source = source

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        labels, begin = self.source.labels(), time.monotonic()
        for index in range(len(self.source)):
            path = self.source.name(index)
            example: dict[str, Any] = {
                "image": path,
                "file_name": str(pathlib.PurePath(path).relative_to(self.source.directory)),
            }
            if labels is not None:
                example["label"] = int(labels[index])
            yield index, example
            done = index + 1
            if done % EVERY == 0 or done == len(self.source):
                speed = done / max(time.monotonic() - begin, 1e-9)
                left = int((len(self.source) - done) / speed)
                print(
                    f"{done} of {len(self.source)} images  {speed:.0f} images/s  ETA "
                    f"{left // 60}:{left % 60:02d}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
