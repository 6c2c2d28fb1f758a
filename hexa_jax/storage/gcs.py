"""Files in a bucket: gs:// paths through gcsfs and etils' epath, and local copies.

Never through TensorFlow.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

# epath would ask TensorFlow for gs:// wherever that is installed.
os.environ["EPATH_USE_TF"] = "false"
from etils import epath

for _name in ("gcsfs", "google.auth"):
    # they log tracebacks of what arrives here as exceptions
    logging.getLogger(_name).setLevel(logging.CRITICAL)

SCHEME = "gs://"
AT_ONCE = 8  # files that are fetched side by side, each of which may take 128 MB of memory
_KEPT = ".kept.json"  # which version of each file a local folder holds


class RemoteError(ValueError):
    """A bucket cannot be used; the message is one line."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL instead of a local path."""
    return "://" in os.fspath(path)


def path_of(path: str | os.PathLike) -> Any:
    """Return the absolute `pathlib.Path` of a local path, or the `epath.Path` of a URL.

    Raises:
        RemoteError: a URL that is not gs://, or gcsfs is missing.
    """
    if not is_remote(path):
        return pathlib.Path(path).expanduser().absolute()
    filesystem(os.fspath(path))
    return epath.Path(path)


def filesystem(url: str) -> Any:
    """Return fsspec's file system of a URL, the same one that epath uses.

    Raises:
        RemoteError: it is not gs://, or gcsfs is missing.
    """
    if not url.startswith(SCHEME):
        raise RemoteError(
            f"{url}: only local paths and {SCHEME} buckets can be used; mount other storage"
        )
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError:
        raise RemoteError(f"{url} needs gcsfs: pip install gcsfs") from None
    # others write there, too
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    bucket = fsspec.filesystem("gcs", finalize_on_close=True)
    # A bucket has no folders to make. gcsfs would ask for the bucket itself, which those who may
    # read and write files often may not see.
    bucket.makedirs = bucket.mkdir = lambda *_, **__: None
    return bucket


@contextlib.contextmanager
def told(path: str | os.PathLike, problem: str = "cannot be read") -> Iterator[None]:
    """Turn what libraries raise about a bucket into a RemoteError; local errors pass."""
    try:
        yield
    except Exception as error:
        if not is_remote(path) or type(error).__module__.startswith("hexa_jax."):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such bucket or file, or it may not be seen"
        raise RemoteError(f"{os.fspath(path)} {problem}: {reason}") from error


def exists(path: Any) -> bool:
    """Return whether a file is there; an error of a bucket is raised, where epath says no."""
    if not is_remote(path):
        return path.is_file()
    with told(path):
        try:
            return filesystem(str(path)).info(str(path))["type"] == "file"
        except FileNotFoundError:
            return False


# of files, by name: bytes, and what tells one content from another
Versions = dict[str, tuple[int, str]]


def files(url: str) -> Versions:
    """Return all files below a folder of a bucket, by relative name; none if it does not exist."""
    bucket = filesystem(url)
    root = bucket._strip_protocol(url) + "/"
    with told(url, "cannot be listed"):
        found = bucket.find(root, detail=True)
    names = [name for name in found if name.startswith(root) and not name.endswith("/")]
    return {name.removeprefix(root): _version(found[name]) for name in names}


def _version(info: dict[str, Any]) -> tuple[int, str]:
    return info["size"], info.get("md5Hash") or info["etag"]


def fetch_file(url: str, cache: str) -> pathlib.Path:
    """Return a local copy of one file; see `fetch`."""
    folder, _, name = url.rpartition("/")
    with told(url):
        version = _version(filesystem(url).info(url))
    return fetch(folder, {name: version}, cache) / name


def fetch(url: str, wanted: Versions, cache: str) -> pathlib.Path:
    """Copy the `wanted` files of a folder to a disk, except those that are there already.

    Processes of one machine fetch one after another, so that the later ones find everything.

    Returns:
        The local folder, below `cache`.

    Raises:
        RemoteError: the files cannot be read, or do not fit on the disk.
    """
    folder = pathlib.Path(cache).expanduser().absolute() / url.removeprefix(SCHEME)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = folder / _KEPT
        kept = json.loads(known.read_text()) if known.is_file() else {}
        missing = [
            name
            for name, (size, version) in wanted.items()
            if kept.get(name) != [size, version]
            or not (folder / name).is_file()
            or (folder / name).stat().st_size != size
        ]
        needed, free = sum(wanted[name][0] for name in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise RemoteError(
                f"{url} does not fit: it needs {needed / 1e9:.1f} GB in {folder}, which has "
                f"{free / 1e9:.1f} GB; give another config.runtime.data_cache, or an empty one to "
                "read tfds data sets in place"
            )
        if missing:
            what = f"{len(missing)} files, {needed / 1e9:.3f} GB"
            print(f"fetching {what}, from {url} to {folder}", flush=True)
        while missing:  # a start that is cut off keeps the batches before
            batch, missing = missing[: 6 * AT_ONCE], missing[6 * AT_ONCE :]
            copy_files(url, folder, {name: wanted[name][0] for name in batch})
            kept |= {name: wanted[name] for name in batch}
            part = known.with_suffix(".part")
            part.write_text(json.dumps(kept))
            part.rename(known)
            print(f"fetched {len(batch)} files, {len(missing)} are left", flush=True)
    return folder


def copy_files(url: str, folder: pathlib.Path, sizes: Mapping[str, int]) -> None:
    """Copy files of a bucket's folder, given with their sizes, into a local one.

    Raises:
        RemoteError: one cannot be read, or has another size.
    """
    parts = {name: folder / f"{name}.part" for name in sizes}
    sources, targets = [f"{url}/{name}" for name in parts], [str(part) for part in parts.values()]
    with told(url):
        filesystem(url).get(sources, targets, batch_size=AT_ONCE)
    for name, part in parts.items():
        if (found := part.stat().st_size) != sizes[name]:
            raise RemoteError(f"{url}/{name} came with {found} bytes instead of {sizes[name]}")
        part.rename(folder / name)
