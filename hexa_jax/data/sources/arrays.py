"""`arrays:FILE.npz`: images in memory, or memory-mapped."""

import os
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from hexa_jax.data.source import DataError, checked_index, one_line
from hexa_jax.data.sources.registry import Options, register
from hexa_jax.storage.gcs import fetch_file, is_remote


class ArraySource:
    """Images in memory, or memory-mapped.

    Args:
      images: uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W].
      labels: integers [N], -1 where unknown; or None.
      class_names: one name per class; or None.
      origin: how messages call the source.
    Raises:
      DataError: another shape or type.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | np.ndarray | None = None,
        origin: str = "arrays",
    ):
        if images.dtype != np.uint8:
            raise DataError(f"{origin}: images must be uint8, not {images.dtype}")
        if (
            images.ndim not in (3, 4)
            or (images.ndim == 4 and images.shape[3] not in (1, 3))
            or 0 in images.shape
        ):
            raise DataError(
                f"{origin}: images must be [N, H, W, 3] or [N, H, W], not {list(images.shape)}"
            )
        if labels is not None:
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
                found = f"{labels.dtype} {list(labels.shape)}"
                raise DataError(f"{origin}: labels must be integers [{len(images)}], not {found}")
            if labels.min() < -1 or labels.max() >= 2**31:
                raise DataError(
                    f"{origin}: labels must be 0, 1, ... (-1: unknown), not {labels.min()} to "
                    f"{labels.max()}"
                )
            labels = labels.astype(np.int32)
        self._images, self._labels, self.origin = images, labels, origin
        self._file: str | None = None
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.num_classes = (
            None
            if labels is None
            else max(int(labels.max()) + 1, len(self.class_names or ())) or None
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = checked_index(index, len(self))
        image = np.asarray(self._images[index])
        if image.ndim == 2 or image.shape[2] == 1:
            image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
        return (
            {"image": image}
            if self._labels is None
            else {"image": image, "label": int(self._labels[index])}
        )

    def name(self, index: int) -> str:
        return f"{self.origin}, index {index}"

    def labels(self) -> np.ndarray | None:
        return self._labels

    def __reduce__(self):
        if self._file is not None:  # a worker maps the file again instead of receiving a copy of it
            return load_arrays, (self._file,)
        return ArraySource, (self._images, self._labels, self.class_names, self.origin)


def load_arrays(path: str) -> ArraySource:
    """The arrays `images`, and optionally `labels` and `class_names`, of an npz file.

    One by `np.savez` is memory-mapped: it may exceed the memory, and workers share it. One by
    `np.savez_compressed` is loaded whole in every worker.
    """
    origin = f"arrays:{path}"
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {entry.removesuffix(".npy") for entry in archive.namelist()}
        if "images" not in keys:
            raise DataError(
                f"{origin} has no array 'images' (it holds: {', '.join(sorted(keys)) or 'nothing'})"
            )
        labels, class_names = (
            _npz_array(path, key) if key in keys else None for key in ("labels", "class_names")
        )
        source = ArraySource(_npz_array(path, "images"), labels, class_names, origin)
    except FileNotFoundError:
        raise DataError(f"{origin} does not exist") from None
    except DataError:  # a ValueError that says enough
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{origin} is not a readable npz file: {one_line(error)}") from None
    source._file = os.path.abspath(path)
    return source


def _npz_array(path: str, key: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        if entry.compress_type == zipfile.ZIP_STORED:
            with archive.open(entry) as member:
                if np.lib.format.read_magic(member) == (1, 0):
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                    start = member.tell()
                    # the entry's data follow its own header, name and extra field
                    with open(path, "rb") as file:
                        file.seek(entry.header_offset + 26)
                        offset = (
                            entry.header_offset
                            + 30
                            + sum(struct.unpack("<HH", file.read(4)))
                            + start
                        )
                    if not dtype.hasobject and 0 not in shape:
                        return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[key]


def open_arrays(where: str, options: Options) -> ArraySource:
    """Return the arrays of a file, of a copy of it where it lies in a bucket."""
    if not is_remote(where):
        return load_arrays(options.path(where))
    if not options.data_cache:
        raise DataError(
            f"arrays:{where} needs a config.runtime.data_cache, a local folder for a copy"
        )
    return load_arrays(str(fetch_file(where, options.data_cache)))


register(
    "arrays",
    open_arrays,
    usage="arrays:FILE.npz",
    summary="the arrays `images` (uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W]) and, if there are any, "
    "`labels` (integers [N]) and `class_names` of a NumPy file; one written by `np.savez` may be "
    "larger than the memory",
    suffixes=(".npz",),
    paths=True,
)
