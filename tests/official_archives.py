"""Miniatures of the archives that data sets are published in, and tfds's own builders run on them."""

import io
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image

# What would be downloaded lies in a folder: a file under its own name, an archive as the folder it unpacks to.
PREPARE = """
import sys, tensorflow_datasets as tfds
from etils import epath
name, data_dir, manual_dir, file_format, downloads = sys.argv[1:]
if downloads:
    tfds.download.DownloadManager.download = lambda self, url: epath.Path(downloads) / url.rsplit("/", 1)[1]
    tfds.download.DownloadManager.download_and_extract = lambda self, url: epath.Path(downloads)
builder = tfds.builder(name, data_dir=data_dir, file_format=file_format)
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, num_shards=2))
"""


def prepare(name, data_dir, manual_dir="", file_format="array_record", downloads="") -> None:
    """Run a tfds builder in a process of its own."""
    run_python(PREPARE, name, data_dir, manual_dir, file_format, downloads)


def run_python(code: str, *arguments) -> str:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def encoded(color: tuple[int, ...], size=(40, 30), mode="RGB", kind="JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, kind)
    return stream.getvalue()


def write_tar(target, members: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


def write_official_tars(folder, train: dict[str, dict[str, bytes]], validation: dict[str, bytes]) -> None:
    """ILSVRC2012_img_train.tar holds one tar per synset; ILSVRC2012_img_val.tar holds the images themselves."""
    folder.mkdir(parents=True)
    synsets = {}
    for synset, members in train.items():
        stream = io.BytesIO()
        write_tar(stream, members)
        synsets[f"{synset}.tar"] = stream.getvalue()
    for name, members in (("train", synsets), ("val", validation)):
        with open(folder / f"ILSVRC2012_img_{name}.tar", "wb") as file:
            write_tar(file, members)


def write_cifar(folder: pathlib.Path, name: str, files: dict[str, tuple], label_names: dict[str, list[str]]) -> None:
    """CIFAR's binary version: per file (labels uint8 [N, 1 or 2], images uint8 [N, 32, 32, 3]) as rows of labels and planes."""
    inner = folder / name
    inner.mkdir(parents=True)
    for file, (labels, images) in files.items():
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        np.concatenate([labels, planes], axis=1).astype(np.uint8).tofile(inner / file)
    for file, names in label_names.items():
        (inner / file).write_text("\n".join(names) + "\n\n")
