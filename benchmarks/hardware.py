"""Where and with what a benchmark ran, public peaks of accelerators, and the file that keeps results."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """Public figures of one accelerator: dense FLOP/s by precision, and bytes/s of its memory."""

    bfloat16: float
    # with TensorFloat-32 products, which both XLA and cuDNN use for float32 convolutions
    float32: float
    bandwidth: float


# NVIDIA's data sheets, figures without sparsity. The first name that a device's own begins with
# counts.
PEAKS = {
    "NVIDIA H200 NVL": Peak(835e12, 418e12, 4.8e12),
    "NVIDIA H200": Peak(989e12, 494e12, 4.8e12),
    "NVIDIA H100 PCIe": Peak(756e12, 378e12, 2.0e12),
    "NVIDIA H100 NVL": Peak(835e12, 418e12, 3.9e12),
    "NVIDIA H100": Peak(989e12, 494e12, 3.35e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 156e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 156e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 156e12, 1.935e12),
    "NVIDIA A100": Peak(312e12, 156e12, 2.039e12),
}


def peak_of(device_kind: str) -> Peak | None:
    """The public figures of a device, by the name that the driver gives it; None where there are none."""
    return next((peak for name, peak in PEAKS.items() if device_kind.startswith(name)), None)


def surroundings(
    argv: list[str], packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax")
) -> dict[str, Any]:
    """Host, versions, date, commit and command, for a row."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", os.path.relpath(argv[0]), *argv[1:]]),
        "commit": _commit(),
        "host": {"machine": platform.machine(), "system": platform.system(), "cores": _cores()},
        "versions": versions,
    }


def add_rows(path: pathlib.Path | None, rows: list[dict[str, Any]]) -> None:
    """Append rows to the JSON list in a file, which need not exist; ValueError where it holds something else."""
    if path is None:
        return
    before = json.loads(path.read_text()) if path.exists() else []
    if not isinstance(before, list):
        raise ValueError("no JSON list")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps([*before, *rows], indent=1) + "\n")
    draft.replace(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    folder = pathlib.Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        print("no commit is known here: rows will not name one", file=sys.stderr)
        return None
    return found.stdout.strip()
