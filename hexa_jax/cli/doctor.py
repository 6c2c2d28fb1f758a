"""Show devices, memory and versions, and say what is wrong with them and what mends it.

hexa doctor

Exit codes: 0 nothing is wrong, 1 something is.
"""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys

import jax

import hexa_jax
from hexa_jax.parallel.hardware import accelerator_warning, devices_in_words, find_accelerator
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.training.memory import available, in_words

NEEDED = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "opencv-python-headless",
    "scikit-learn", "matplotlib",
)  # fmt: skip
# Packages that some commands need, and what for.
OPTIONAL = {
    "torch": ".pth files",
    "timm": "its pretrained weights",
    "onnx": "export to ONNX",
    "pyarrow": "parquet files",
    "gcsfs": "Google Cloud Storage",
    "tensorboard": "looking at W/tensorboard",
}
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm below which worker processes may run out of it
DISK = 2 << 30  # bytes on the disk of the current folder: a few checkpoints


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    if argv:
        print(f"hexa doctor: unexpected {argv[0]!r}; it takes no words", file=sys.stderr)
        return 2
    mesh = make_mesh(jax.local_devices())
    accelerator, room = find_accelerator(), available(mesh)
    rows = {
        "hexa_jax": f"{hexa_jax.__version__} in {pathlib.Path(hexa_jax.__file__).parent}",
        "Python": f"{platform.python_version()} in {sys.prefix}, {platform.platform()}",
        "devices": devices_in_words(jax.devices()),
        "accelerator": accelerator.name if accelerator else "none found",
        "memory": "unknown" if room is None else f"{in_words(room)} free for each device",
        "CPU cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "packages": _versions(NEEDED),
        "optional": _versions(OPTIONAL) or "none",
        "compiled programs": jax.config.jax_compilation_cache_dir
        or "not kept: each start compiles anew",
    }
    for name, value in rows.items():
        print(f"{name:18} {value}")
    problems = find_problems()
    for problem in problems:
        print(f"PROBLEM            {problem}")
    if not problems:
        print("nothing is wrong")
    return 1 if problems else 0


def find_problems() -> list[str]:
    """Return one line, with a remedy, for each thing that is wrong on this machine."""
    missing = [name for name in NEEDED if _version(name) is None]
    problems = (
        [f"not installed: {sys.executable} -m pip install {' '.join(missing)}"] if missing else []
    )
    problems += [accelerator_warning()]
    shared = pathlib.Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < SHARED_MEMORY:
        size = in_words(shutil.disk_usage(shared).total)
        problems.append(
            f"/dev/shm has {size}, through which worker processes send images: in Docker, "
            "--shm-size=8g; "
            "or --config.runtime.workers=0"
        )
    if (free := shutil.disk_usage(".").free) < DISK:
        problems.append(
            f"the disk of this folder has {in_words(free)} left, too little for checkpoints"
        )
    if not os.access(".", os.W_OK):
        problems.append("this folder cannot be written to: give a --workdir elsewhere")
    return [problem for problem in problems if problem]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(names: tuple[str, ...] | dict[str, str]) -> str:
    found = {name: _version(name) for name in names}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
