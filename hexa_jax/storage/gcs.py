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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# epath would ask TensorFlow for gs:// wherever that is installed.
os.environ["EPATH_USE_TF"] = "false"
from etils import epath

from hexa_jax.core.console import with_aliases

for _name in ("gcsfs", "google.auth"):
    # they log tracebacks of what arrives here as exceptions
    logging.getLogger(_name).setLevel(logging.CRITICAL)

SCHEME = "gs://"
AT_ONCE = 8  # files that are fetched side by side
_KEPT = ".kept.json"  # which version of each file a local folder holds


class RemoteError(ValueError):
    """A bucket that cannot be used; the message is one line."""


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
    """fsspec's file system of a URL: the very one that epath uses.

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
    # A bucket has no folders to make. gcsfs would ask for the bucket itself, which who may read and
    # write files often may not.
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
        missing = "no such bucket or file, or it may not be seen"
        reason = (
            missing if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:300]
        )
        raise RemoteError(
            f"{os.fspath(path)} {problem}: {reason or type(error).__name__}"
        ) from error


def exists(path: Any) -> bool:
    """Whether a file is there; in a bucket, unlike `epath`'s, an error is not taken for a no."""
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
    """All files below a folder of a bucket, by relative name; none where there is no folder."""
    bucket = filesystem(url)
    root = bucket._strip_protocol(url)
    with told(url, "cannot be listed"):
        found = {
            name[len(root) + 1 :]: info for name, info in bucket.find(root, detail=True).items()
        }
    return {name: _version(info) for name, info in found.items() if name and not name.endswith("/")}


def _version(info: dict[str, Any]) -> tuple[int, str]:
    return info["size"], info.get("md5Hash") or info["etag"]


def fetch_file(url: str, cache: str) -> pathlib.Path:
    """A local copy of one file; see `fetch`."""
    folder, _, name = url.rpartition("/")
    with told(url):
        version = _version(filesystem(url).info(url))
    return fetch(folder, {name: version}, cache) / name


def fetch(url: str, wanted: Versions, cache: str) -> pathlib.Path:
    """Copy a folder's files below `cache`; those that are there from before are not read again.

    Processes of one machine fetch one after another, so that the later ones find everything.

    Raises:
        RemoteError: they cannot be read, or do not fit on the disk.
    """
    folder = pathlib.Path(cache).expanduser().absolute() / url.removeprefix(SCHEME)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = folder / _KEPT
        kept = json.loads(known.read_text()) if known.is_file() else {}
        missing = [
            name
            for name in wanted
            if kept.get(name) != list(wanted[name]) or not _whole(folder, name, wanted)
        ]
        needed, free = sum(wanted[name][0] for name in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise RemoteError(
                f"{url} does not fit: it needs {needed / 1e9:.1f} GB in {folder}, which has "
                f"{free / 1e9:.1f} GB; "
                "give another config.runtime.data_cache, or an empty one to read tfds data sets in "
                "place"
            )
        if missing:
            print(
                f"fetching {len(missing)} files, {needed / 1e9:.3f} GB, from {url} to {folder}",
                flush=True,
            )
        for number, name in enumerate(
            copies(url, folder, {name: wanted[name][0] for name in missing}), 1
        ):
            kept[name] = wanted[name]
            part = known.with_suffix(".part")
            part.write_text(json.dumps(kept))
            part.rename(known)
            if number % 50 == 0:
                print(f"fetched {number} of {len(missing)} files", flush=True)
    return folder


def _whole(folder: pathlib.Path, name: str, wanted: Versions) -> bool:
    return (folder / name).is_file() and (folder / name).stat().st_size == wanted[name][0]


def copies(url: str, folder: pathlib.Path, sizes: Mapping[str, int]) -> Iterator[str]:
    """Copy files of a bucket's folder into a local one, some side by side.

    Yields the name of each that is there, whole.
    """
    bucket = filesystem(url)

    def copy(name: str) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with told(f"{url}/{name}"):
            bucket.get_file(f"{url}/{name}", str(part))
        if (found := part.stat().st_size) != sizes[name]:
            raise RemoteError(f"{url}/{name} came with {found} bytes instead of {sizes[name]}")
        part.rename(path)
        return name

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(copy, sizes)


def counterpart(path: str | os.PathLike) -> Any:
    """Return where a path really is: in the bucket if it is in the mirror of one."""
    return path_of(with_aliases(os.fspath(path)))
