"""The kinds of sources: names, how they are opened, and their lines in the docs."""

import dataclasses
import difflib
import glob
import os
from collections.abc import Callable
from typing import NamedTuple

from hexa_jax.data.source import DataError, Source, StoredSource
from hexa_jax.storage.gcs import is_remote


@dataclasses.dataclass(frozen=True)
class Options:
    """What a config says of its sources besides the spec; each kind reads what concerns it.

    Attributes:
        labels: "auto", "folders" (the sub-folders of images are their classes) or "none".
        seed, image_size, num_examples: which shapes to draw.
        data_dir: where tfds data sets were prepared, and what relative paths start from.
        data_cache: local folder for indices and copies of what is in a bucket; empty: none.
        image_column, label_column: of tables; empty: found by their types and names.
        video_seconds: time between two frames of a video, in seconds.
    """

    labels: str = "auto"
    seed: int = 0
    image_size: int = 32
    num_examples: int = 10_000
    data_dir: str | None = None
    data_cache: str = ""
    image_column: str = ""
    label_column: str = ""
    video_seconds: float = 1.0

    def path(self, text: str) -> str:
        """Return a path of a spec as the local path it means.

        Raises:
            DataError: it lies in a bucket, from where this kind of source cannot read.
        """
        path = os.path.expanduser(text)
        if self.data_dir and not is_remote(path):
            path = os.path.join(os.path.expanduser(self.data_dir), path)
        if is_remote(path):
            raise DataError(
                f"{path}: images in a bucket are read as tfds data sets: pack them with "
                "python -m hexa_jax.prepare folder:DIR, and copy that there"
            )
        return path

    def files(self, pattern: str, what: str) -> list[str]:
        """Return the files that a glob pattern names, sorted.

        Args:
            pattern: with *, ?, [...] and ** for any folders; a folder stands for all files in it
                whose name ends as the kind's do, see `what`.
            what: of the kind's files, the ending of their names, such as ".tar".

        Raises:
            DataError: there is none; it names the nearest that there is.
        """
        path = self.path(pattern)
        if os.path.isdir(path):
            path = os.path.join(glob.escape(path), f"*{what}")
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if found:
            return found
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder) and not glob.has_magic(folder):
            raise DataError(f"no file {path}: the folder {folder} does not exist")
        beside = glob.glob(os.path.join(glob.escape(folder), "*")) if os.path.isdir(folder) else []
        names = sorted(os.path.basename(name) for name in beside)
        near = difflib.get_close_matches(os.path.basename(path), names, n=1, cutoff=0.5)
        raise DataError(f"no file {path}" + (f"; did you mean {near[0]}?" if near else ""))


class Kind(NamedTuple):
    """A kind of source.

    Attributes:
        usage: how a spec of it is written, such as "tar:GLOB".
        summary: what it reads, for the table in docs/data.md.
        open: gives the source for what follows the colon; DataError in one line otherwise.
        suffixes: endings of the files by which a bare path is recognized as being of this kind.
        paths: whether what follows the colon is a path, a pattern of paths, or several with commas.
    """

    usage: str
    summary: str
    open: Callable[[str, Options], Source]
    suffixes: tuple[str, ...] = ()
    paths: bool = False


SOURCES: dict[str, Kind] = {}


def register(
    name: str,
    open_source: Callable[[str, Options], Source],
    *,
    usage: str,
    summary: str,
    suffixes: tuple[str, ...] = (),
    paths: bool = False,
) -> None:
    """Make a kind of source known to configs: `config.data.source = "NAME:..."` opens it.

    Args:
        name: what stands before the colon.
        open_source: takes what follows the colon, and the options.
        usage, summary, suffixes, paths: see `Kind`.

    Raises:
        ValueError: another kind has the name, or it holds a colon or a slash.
    """
    kind = Kind(usage, summary, open_source, suffixes, paths)
    if not name or not name.isidentifier():
        raise ValueError(f"{name!r} is no name for a kind of source: letters, digits and _")
    if name in SOURCES and SOURCES[name] != kind:
        raise ValueError(f"there is a kind of source named {name!r} already: {SOURCES[name].usage}")
    SOURCES[name] = kind


def open_spec(spec: str, options: Options) -> Source:
    """Return the source that a config's string names.

    Args:
        spec: KIND:WHERE, or the path of a folder or file whose ending tells the kind.
        options: of the config.

    Raises:
        DataError: nothing usable is there; one line says what and what to do.
    """
    kind, _, rest = spec.partition(":")
    if not (kind in SOURCES and (rest or SOURCES[kind].usage.startswith(f"{kind}["))):
        kind, rest = _kind_of_path(spec, options), spec
    if kind:
        source = SOURCES[kind].open(rest, options)
        if options.labels == "none" and isinstance(source, StoredSource):
            source.forget_labels()
        return source
    raise DataError(unknown_source(spec))


def unknown_source(spec: str) -> str:
    """Return one line about a spec of no known kind: the nearest kind, and all there are."""
    kind, colon, rest = spec.partition(":")
    near = difflib.get_close_matches(kind, list(SOURCES), n=1, cutoff=0.6) if colon else []
    hint = f"; did you mean {near[0]}:{rest}?" if near and near[0] != kind else ":"
    known = ", ".join(each.usage for each in SOURCES.values())
    return f"unknown data source {spec!r}{hint} use the path of a folder or file, or one of {known}"


def absolute_spec(spec: str) -> str:
    """Return a spec whose paths do not depend on the folder that a program is started in."""
    kind, colon, rest = spec.partition(":")
    if colon and kind in SOURCES:
        return f"{kind}:{_absolute(rest)}" if SOURCES[kind].paths else spec
    return spec if spec in SOURCES and not os.path.exists(spec) else _absolute(spec)


def _absolute(paths: str) -> str:
    parts = [paths] if os.path.exists(os.path.expanduser(paths)) else paths.split(",")
    parts = [part.strip() if len(parts) > 1 else part for part in parts]
    return ",".join(
        part if is_remote(part) else os.path.abspath(os.path.expanduser(part)) for part in parts
    )


def _kind_of_path(spec: str, options: Options) -> str:
    """Return the kind of a bare path; empty where nothing is there or it is unclear."""
    if not spec or is_remote(spec):
        return ""
    first = options.path(spec.split(",")[0])
    if os.path.isdir(first):
        return "folder"
    ending = os.path.splitext(spec)[1].lower()
    there = os.path.exists(options.path(spec)) or bool(
        glob.glob(options.path(spec), recursive=True)
    )
    return next((name for name, kind in SOURCES.items() if there and ending in kind.suffixes), "")
