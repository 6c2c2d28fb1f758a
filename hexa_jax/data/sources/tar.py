"""`tar:GLOB`: images in tar files (webdataset shards), indexed for random access."""

import hashlib
import json
import logging
import os
import tarfile
import tempfile
from typing import NamedTuple

import numpy as np

from hexa_jax.data.decode import BadImage
from hexa_jax.data.formats import IMAGE_SUFFIXES
from hexa_jax.data.source import DataError, StoredSource, one_line
from hexa_jax.data.sources.paths import (
    Names,
    classes_of_texts,
    folder_classes,
    readable,
    without_common_folder,
)
from hexa_jax.data.sources.registry import Options, register

INDEX_SUFFIX = ".index.npz"
INDEX_VERSION = 1
_log = logging.getLogger(__name__)


class ShardIndex(NamedTuple):
    """Where the images of a tar file lie.

    Attributes:
        offsets, sizes: int64 [N], of each image's bytes in the file.
        names: of the members.
        labels: from the .cls or .json member beside an image, "" where there is none.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    names: list[bytes]
    labels: list[str]


class TarSource(StoredSource):
    """The images in tar files, in the order of the files' names and of their members.

    Labels are those of webdataset's convention, a member KEY.cls (a number or a name) or KEY.json
    with a "label" beside KEY.jpg; where there are none, the folders in the files count as in
    `FolderSource`. The index of a file is kept beside it, or in `cache` where that folder cannot be
    written to, and is made again when the file's size or time of change is another.

    Args:
        paths: of the tar files, not compressed.
        labels: see `folder_classes`; .cls and .json count where it is "auto".
        cache: a local folder, or "".

    Raises:
        DataError: a file cannot be read as a tar file, or no file holds an image.
    """

    def __init__(self, paths: list[str], labels: str = "auto", cache: str = ""):
        origin = f"tar:{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        indices = [shard_index(path, cache) for path in paths]
        names = [name for index in indices for name in index.names]
        if not names:
            raise DataError(
                f"{origin}: no member is an image ({', '.join(s[1:] for s in IMAGE_SUFFIXES)})"
            )
        kept, self.skipped_note = readable(names, origin)
        self._paths = paths
        self._shard = np.repeat(
            np.arange(len(paths), dtype=np.int32), [len(index.names) for index in indices]
        )[kept]
        self._offsets = np.concatenate([index.offsets for index in indices])[kept]
        self._sizes = np.concatenate([index.sizes for index in indices])[kept]
        names = [name for name, keep in zip(names, kept, strict=True) if keep]
        self._names = Names(names)
        texts = [label for index in indices for label in index.labels]
        texts = [text for text, keep in zip(texts, kept, strict=True) if keep]
        self.labels_note = ""
        if labels == "auto" and any(texts):
            super().__init__(*classes_of_texts(texts))
        else:
            found = folder_classes(without_common_folder(names), labels, origin)
            self.labels_note = found.note
            super().__init__(found.labels, found.class_names)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> bytes:
        size = int(self._sizes[index])
        try:
            # Opened for each image: a thousand shards would be as many open files in every worker.
            with open(self._paths[self._shard[index]], "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, int(self._offsets[index]))
        except OSError as error:
            raise BadImage(self.name(index), error.strerror or "cannot be read") from None
        if len(data) < size:
            raise BadImage(self.name(index), "the tar file ends before it")
        return data

    def name(self, index: int) -> str:
        return f"{self._paths[self._shard[index]]}/{self._names[index]}"


def shard_index(path: str, cache: str = "") -> ShardIndex:
    """Return the index of a tar file: the one that is kept, or a new one, which is then kept.

    Raises:
        DataError: the file cannot be read, is compressed, or is damaged.
    """
    try:
        status = os.stat(path)
        places = [path + INDEX_SUFFIX]
        if cache:
            digest = hashlib.sha256(
                os.path.abspath(path).encode(errors="surrogateescape")
            ).hexdigest()[:20]
            places.append(
                os.path.join(os.path.expanduser(cache), "tar_index", digest + INDEX_SUFFIX)
            )
        about = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)
        for place in places:
            if (kept := _load(place, about)) is not None:
                return kept
        _log.info("reading the table of contents of %s", path)
        index = _scan(path)
    except OSError as error:
        raise DataError(f"tar:{path}: {error.strerror or one_line(error)}") from None
    for place in places:
        try:
            _save(place, about, index)
            break
        except OSError:
            continue
    else:
        _log.warning(
            "the index of %s cannot be kept (%s): each start reads the whole file",
            path,
            ", ".join(places),
        )
    return index


def _scan(path: str) -> ShardIndex:
    """Read the headers of all members."""
    offsets: list[int] = []
    sizes: list[int] = []
    names: list[bytes] = []
    keys: list[str] = []
    labels: dict[str, str] = {}
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise DataError(
                f"tar:{path} is compressed, without random access: unpack it once with gunzip"
            )
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                folder, base = os.path.split(member.name)
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                key, ending = (
                    os.path.join(folder, base.partition(".")[0]),
                    os.path.splitext(base)[1].lower(),
                )
                if ending in IMAGE_SUFFIXES:
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                    names.append(os.fsencode(member.name.removeprefix("./")))
                    keys.append(key)
                elif ending in (".cls", ".json") and (ending == ".cls" or key not in labels):
                    content = archive.extractfile(member)
                    label = _label(content.read() if content else b"", ending)
                    labels[key] = label or labels.get(key, "")
    except tarfile.TarError as error:
        raise DataError(f"tar:{path} cannot be read as a tar file: {one_line(error)}") from None
    found = [labels.get(key, "") for key in keys]
    return ShardIndex(np.array(offsets, np.int64), np.array(sizes, np.int64), names, found)


def _label(content: bytes, ending: str) -> str:
    """The label in a .cls or .json member; empty where there is none."""
    if ending == ".cls":
        return content.decode(errors="replace").strip()
    try:
        value = json.loads(content)
    except ValueError:
        return ""
    label = value.get("label", value.get("cls", "")) if isinstance(value, dict) else ""
    return str(label) if isinstance(label, str | int) and not isinstance(label, bool) else ""


def _load(place: str, about: np.ndarray) -> ShardIndex | None:
    """Read an index; None where it is missing, damaged, or of an older tar file."""
    try:
        with np.load(place, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["about"], about):
                return None
            parts = np.split(arrays["names"], arrays["ends"][:-1]) if len(arrays["ends"]) else []
            names = [part.tobytes() for part in parts]
            return ShardIndex(arrays["offsets"], arrays["sizes"], names, arrays["labels"].tolist())
    except Exception:  # whatever a damaged zip file makes NumPy raise
        return None


def _save(place: str, about: np.ndarray, index: ShardIndex) -> None:
    """Write an index in one step; several processes may do so at once."""
    os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(place) or ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                about=about,
                offsets=index.offsets,
                sizes=index.sizes,
                names=np.frombuffer(b"".join(index.names), np.uint8),
                ends=np.cumsum([len(name) for name in index.names], dtype=np.int64),
                labels=np.array(index.labels, np.str_),
            )
        os.chmod(temporary, 0o644)  # mkstemp's are the owner's alone
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise


def open_tar(where: str, options: Options) -> TarSource:
    """Return the images in the tar files that a pattern names."""
    return TarSource(options.files(where, ".tar"), options.labels, options.data_cache)


register(
    "tar",
    open_tar,
    usage="tar:GLOB",
    summary="images in tar files, such as webdataset shards (`tar:shards/train-*.tar`); labels from `.cls` or "
    "`.json` members, or by folder; the first start writes an index beside each file",
    suffixes=(".tar",),
    paths=True,
)
