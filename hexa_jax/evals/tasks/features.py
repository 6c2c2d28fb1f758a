"""config.task = "features": write pooled features, labels and names of any images."""

import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.tasks.labelled import Extractor, open_backbone, open_split
from hexa_jax.storage.workdir import write_json


def features(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Write `features.npz` or `features.parquet`.

    Features float32 [N, F], labels int32 [N] (-1: none), names, and `readable` bool [N]: where it
    is False, the file could not be read, and its row is that of a black image.

    Raises:
        ConfigError: an unknown format, or pyarrow is missing.
    """
    if config.format not in ("npz", "parquet"):
        also = "; hexa embed writes .csv, too" if config.format == "csv" else ""
        raise ConfigError(
            f"config.format={config.format!r} is not known: use one of npz, parquet{also}"
        )
    backbone = open_backbone(config)
    source = open_split(config, backbone, "source", labelled=False)
    found = Extractor(config, backbone, workdir / "parts")(source, "features")
    names = np.array([str(source.name(index)) for index in range(len(source))])
    path = workdir / f"features.{config.format}"
    if config.format == "npz":
        np.savez(
            path, features=found.values, labels=found.labels, names=names, readable=found.known
        )
    else:
        _parquet(path, found.values, found.labels, names, found.known)
    results = {
        "images": len(source),
        "unreadable_images": int(np.sum(~found.known)),
        "feature_dim": found.values.shape[1],
        "pretraining_step": backbone.step,
    }
    write_json(workdir / "result.json", results)
    log(f"{len(source)} x {found.values.shape[1]} features: {path}")
    return results


def _parquet(
    path: pathlib.Path, values: np.ndarray, labels: np.ndarray, names: np.ndarray, known: np.ndarray
) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            "config.format='parquet' needs pyarrow: pip install pyarrow, or use npz"
        ) from None
    width = values.shape[1]
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), width)
    table = {"name": names, "label": labels, "readable": known, "feature": column}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
