"""Find accelerators without JAX, and say what to install where JAX misses them."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax

GOOGLE = "0x1ae0"  # PCI vendor of TPUs
CUDA_13_DRIVER = 580  # the first NVIDIA driver on which CUDA 13 runs


class Accelerator(NamedTuple):
    """An accelerator that the machine has.

    Attributes:
        name: for a person: "NVIDIA GPU" or "TPU".
        extra: of jax, whose packages drive it: cuda12, cuda13 or tpu.
    """

    name: str
    extra: str


def find_accelerator(root: pathlib.Path = pathlib.Path("/")) -> Accelerator | None:
    """Return the machine's accelerator, or None.

    Args:
        root: of the file system whose /dev, /proc and /sys are looked at.
    """
    driver = _nvidia_driver(root)
    if driver is not None:
        return Accelerator("NVIDIA GPU", "cuda12" if 0 < driver < CUDA_13_DRIVER else "cuda13")
    if _has_tpu(root):
        return Accelerator("TPU", "tpu")
    return None


def _nvidia_driver(root: pathlib.Path) -> int | None:
    """Major version of the NVIDIA driver, 0 where it is not known; None without a GPU."""
    cards = [*root.glob("proc/driver/nvidia/gpus/*"), *root.glob("dev/nvidia[0-9]*")]
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    if cards:
        found = re.search(r"\s(\d{3,})\.\d+", text)
        return int(found[1]) if found else 0
    # Windows Subsystem for Linux shows the GPU through nvidia-smi only.
    if not (root / "dev/dxg").exists() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    major = told.strip().split(".")[0]
    return int(major) if major.isdecimal() else None


def _has_tpu(root: pathlib.Path) -> bool:
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        try:
            if vendor.read_text().strip() == GOOGLE:
                # Google's network cards have the same vendor; only TPUs come with these devices.
                return bool([*root.glob("dev/accel*"), *root.glob("dev/vfio/[0-9]*")])
        except OSError:
            continue
    return False


def unused_accelerator(
    accelerator: Accelerator | None,
    platform: str,
    environment: Mapping[str, str],
    plugins: Mapping[str, str],
) -> str:
    """Return a line about an accelerator that JAX does not use; empty where all is well.

    Args:
        accelerator: of the machine.
        platform: that JAX computes on: "cpu", "gpu" or "tpu".
        environment: variables of the process. Who chose the CPU there is not told.
        plugins: versions of jax's installed packages: "jax", "jax-cuda13-plugin", "libtpu".
    """
    if accelerator is None or platform != "cpu" or _chose_cpu(accelerator, environment):
        return ""
    package = "libtpu" if accelerator.extra == "tpu" else f"jax-{accelerator.extra}-plugin"
    present = f"this machine has {'an' if accelerator.name[0] == 'N' else 'a'} {accelerator.name}, but JAX sees only the CPU"
    install = (
        f"{sys.executable} -m pip install --upgrade 'jax[{accelerator.extra}]=={plugins['jax']}'"
    )
    if package not in plugins:
        return f"{present}: {install}"
    platforms = "tpu" if accelerator.extra == "tpu" else "cuda"
    ask = f"JAX_PLATFORMS={platforms} {sys.executable} -c 'import jax; jax.devices()'"
    return f"{present}, though {package} {plugins[package]} is installed: {ask} says why"


def _chose_cpu(accelerator: Accelerator, environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME") or ""
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    return platforms.lower() == "cpu" or (accelerator.extra != "tpu" and hidden in ("", "-1"))


def installed_plugins() -> dict[str, str]:
    """Return the versions of jax and of its installed packages for accelerators."""
    versions = {}
    for name in ("jax", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def accelerator_warning() -> str:
    """Return the line of `unused_accelerator` for this process; opens JAX's backend."""
    return unused_accelerator(
        find_accelerator(), jax.default_backend(), os.environ, installed_plugins()
    )


def devices_in_words(devices: list[jax.Device]) -> str:
    """Return "1 CPU device" or "8 devices (NVIDIA H100 80GB HBM3)"."""
    count, kind = len(devices), devices[0].device_kind
    what = "device" if count == 1 else "devices"
    return f"{count} CPU {what}" if devices[0].platform == "cpu" else f"{count} {what} ({kind})"
