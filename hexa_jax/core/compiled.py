"""Keep compiled programs between starts: compiling a large step takes minutes."""

import hashlib
import os
import pathlib
import platform
import sys

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
FOLDER = pathlib.Path("~/.cache/hexa_jax/compiled")


def keep_compiled_programs() -> None:
    """Set JAX's compilation cache for this process and its children, unless it is set.

    Programs for another kind of CPU could not run here, so each kind has a folder of its own: a
    home directory may be shared by different machines.
    """
    if VARIABLE in os.environ:
        return
    folder = str(FOLDER.expanduser() / _kind_of_cpu())
    os.environ[VARIABLE] = folder
    if "jax" in sys.modules:  # it has read the variable already
        import jax

        jax.config.update("jax_compilation_cache_dir", folder)


def _kind_of_cpu(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """A name that two machines share only if their CPUs have the same instructions."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    features = next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
