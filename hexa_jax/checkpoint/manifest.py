"""The manifest of a checkpoint: sizes and checksums, written last and read first."""

import errno
import functools
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from hexa_jax.storage import gcs

MANIFEST = "MANIFEST.json"
_KNOWN = re.compile(
    "No space left on device|Read-only file system|Permission denied|Disk quota exceeded"
)
_PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ENOTCONN, errno.EHOSTDOWN)


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message is one line for the user."""

    passing = False  # whether the reason may go away by itself


def is_transient(error: Exception) -> bool:
    """Return whether storage that fails this way may work again by itself.

    Judged by the text, because orbax wraps the system's errors in its own.
    """
    reasons = ("timed out", *(os.strerror(code).lower() for code in _PASSING))
    return any(reason in str(error).lower() for reason in reasons)


def one_line(error: Exception) -> str:
    """Return the reason of an error, the system's or orbax's, as one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    known = _KNOWN.search(text)
    return known[0] if known else text[:300] or type(error).__name__


_blake2b = functools.partial(hashlib.blake2b, digest_size=16)


def _checksum(path: Any) -> str:
    with path.open("rb") as file:  # in small pieces: memory does not grow with the file
        return hashlib.file_digest(file, _blake2b).hexdigest()


def _own_checksum(manifest: dict) -> str:
    return _blake2b(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: pathlib.Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Any) -> int:
    status = path.stat()
    return status.st_size if isinstance(status, os.stat_result) else status.length


def write_manifest(path: Any, manifest: dict) -> None:
    """Flush all files to the disk, then add the manifest in one atomic step.

    Args:
        path: the folder, local or in a bucket, as `gcs.path_of` gives it; so it is below.
        manifest: what it says besides the files' sizes and checksums.
    """
    if remote := gcs.is_remote(path):
        names = list(gcs.files(str(path)))
    else:
        entries = list(path.rglob("*"))
        for entry in (*entries, path.parent):
            _sync(entry)
        names = [str(entry.relative_to(path)) for entry in entries if entry.is_file()]
    files = {
        name: {"bytes": _size(path / name), "blake2b": _checksum(path / name)}
        for name in sorted(names)
    }
    manifest = {**manifest, "files": files}
    text = json.dumps({**manifest, "checksum": _own_checksum(manifest)}, indent=1)
    if remote:
        (path / MANIFEST).write_text(text)  # there, a file appears whole or not at all
        return
    temporary = path / f"{MANIFEST}.tmp"
    temporary.write_text(text)
    _sync(temporary)
    temporary.rename(path / MANIFEST)
    _sync(path)


def read_manifest(path: Any) -> dict:
    """Return the manifest of a folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest.pop("checksum") == _own_checksum(manifest):
            return manifest
        reason = "does not match its own checksum"
    except FileNotFoundError:
        reason = "is missing: the save did not finish"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = f"is damaged: {one_line(error)}"
    raise CheckpointError(f"{path}: {MANIFEST} {reason}")


def verify(path: Any) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: one is not as it was written.
    """
    files = read_manifest(path)["files"]
    name = MANIFEST
    try:
        for name, entry in files.items():  # all sizes first: they cost nothing
            if (size := _size(path / name)) != (wanted := entry["bytes"]):
                raise CheckpointError(f"{path}: {name} has {size} bytes instead of {wanted}")
        for name, entry in files.items():
            if _checksum(path / name) != entry["blake2b"]:
                raise CheckpointError(f"{path}: {name} does not match its checksum")
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {one_line(error)}") from None
