"""Where examples come from: one module per kind, and their registry. No TensorFlow."""

from typing import Any

from hexa_jax.data.source import DataError, Source
from hexa_jax.data.sources.registry import SOURCES, Options, absolute_spec, open_spec, register

# Each module registers its kind; messages and the docs list them in this order.
from hexa_jax.data.sources.folder import FolderSource  # isort: skip
from hexa_jax.data.sources.arrays import ArraySource, load_arrays  # isort: skip
from hexa_jax.data.sources import list_file as _list_file  # noqa: F401  # isort: skip
from hexa_jax.data.sources import tar as _tar  # noqa: F401  # isort: skip
from hexa_jax.data.sources import parquet as _parquet  # noqa: F401  # isort: skip
from hexa_jax.data.sources import huggingface as _huggingface  # noqa: F401  # isort: skip
from hexa_jax.data.sources.tfds import TfdsSource  # isort: skip
from hexa_jax.data.sources import video as _video  # noqa: F401  # isort: skip
from hexa_jax.data.sources import shapes as _shapes  # noqa: F401  # isort: skip

__all__ = [
    "SOURCES", "ArraySource", "DataError", "FolderSource", "Options", "Source", "TfdsSource", "absolute_spec", "load_arrays",
    "make_source", "register",
]  # fmt: skip


def make_source(spec: str, **options: Any) -> Source:
    """Return the source that a config's string names.

    Args:
        spec: KIND:WHERE with one of `SOURCES`, or the path of a folder or file whose kind is clear.
        options: see `Options`.

    Raises:
        DataError: nothing usable is there; one line says what and what to do.
    """
    return open_spec(spec, Options(**options))
