"""The processes of a run: how they find each other, what they tell each other, and what only the first of them does.

All processes of a run execute the same program on the same values; each reads and places its own rows of every batch. Files
of the workdir are written by the first process and read by all, so the workdir must be on storage that all of them see: a shared
file system, or a bucket (storage/workdir_sync.py).
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # how long a process may be silent before the others give up
TPU_VM = "Cloud TPU"
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class DistributedError(ValueError):
    """Processes that cannot find each other; the message is one line."""


class Placement(NamedTuple):
    """Where a process stands: address host:port of the first process, how many there are, its number; None: not said."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialize(given: Placement, environment: Mapping[str, str] = os.environ) -> None:
    """Connect to the other processes, if there are any. Call it before anything touches a device.

    What the flags do not say is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and then from the
    launcher: srun, Open MPI's mpirun, GKE and Cloud TPU pods are recognised.

    Raises:
        DistributedError: half of what is needed is said, or the others do not answer.
    """
    place = _complete(given, environment)
    launched = launcher(environment)
    if place == Placement() and launched is None:
        return
    if None in place and launched is None:
        missing = [name for name, value in zip(Placement._fields, place, strict=True) if value is None]
        raise DistributedError(
            f"--{missing[0]} is missing: a run of several processes needs all of {', '.join(Placement._fields)}"
        )
    if place.num_processes == 1:
        return
    try:
        jax.distributed.initialize(
            place.coordinator, place.num_processes, place.process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError, TypeError) as error:
        if launched == TPU_VM and place == Placement() and isinstance(error, ValueError):
            return  # a TPU without the cloud's metadata, as in Colab: jax finds no others, so there are none
        raise DistributedError(
            f"cannot join the other processes at {place.coordinator or launched}: {_line(error)}"
        ) from None


def _complete(given: Placement, environment: Mapping[str, str]) -> Placement:
    """Flags, then variables."""
    coordinator, count, number = (environment.get(name) or None for name in VARIABLES)
    if launcher(environment) == "Open MPI":  # jax knows Open MPI 4 alone; both set these
        count = count or environment["OMPI_COMM_WORLD_SIZE"]
        number = number or environment["OMPI_COMM_WORLD_RANK"]
    values = []
    for name, said, variable in zip(Placement._fields[1:], given[1:], (count, number), strict=True):
        try:
            values.append(said if said is not None else None if variable is None else int(variable))
        except ValueError:
            raise DistributedError(f"{name}={variable!r} of the environment is no number") from None
    place = Placement(given.coordinator or coordinator, *values)
    if place.coordinator and not place.coordinator.rpartition(":")[2].isdigit():
        raise DistributedError(f"--coordinator={place.coordinator!r} must be HOST:PORT")
    if place.num_processes is not None and place.num_processes < 1:
        raise DistributedError(f"--num_processes={place.num_processes} must be positive")
    if None not in place[1:] and not 0 <= place.process_id < place.num_processes:  # type: ignore[operator]
        raise DistributedError(f"--process_id={place.process_id} must be 0 to {place.num_processes - 1}")  # type: ignore[operator]
    return place


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process together with others, by the variables and devices it left; None: nothing known."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "," in environment.get("TPU_PROCESS_ADDRESSES", ""):
        return "GKE"
    chips = any(pathlib.Path("/dev").glob("accel[0-9]*")) or pathlib.Path("/dev/vfio/0").exists()
    if chips and "TPU_SKIP_MDS_QUERY" not in environment and "TPU_WORKER_HOSTNAMES" not in environment:
        return TPU_VM
    return None


def is_main_process() -> bool:
    """Whether this process writes the files.

    Like `alone`, it opens no device in a process that `join` left alone: one that only starts other processes must leave the
    accelerator to them.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_single_process() -> bool:
    """Whether the run consists of this process."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def gather(tree: Any) -> Any:
    """Leaves as whole NumPy arrays, on every process; all processes call it."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def largest(values: np.ndarray) -> np.ndarray:
    """Element by element the largest of all processes' values, on every process; all processes call it."""
    if jax.process_count() == 1:
        return values
    return np.max(multihost_utils.process_allgather(values), axis=0)


def broadcast_from_main(value: int) -> int:
    """The first process's value, on all of them; all processes call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
