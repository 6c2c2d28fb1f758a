"""The processes of a run: how they connect, and what they tell each other.

All processes execute the same program on the same values; each reads its own rows of every batch
and puts them on its devices. The first process writes the files of the workdir and all read them,
so the workdir is on storage that all see: a shared file system, or a bucket
(storage/workdir_sync.py).
"""

import os
import pathlib
import sys
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
    """The place of a process in a run; None: not given.

    Attributes:
        coordinator: address HOST:PORT of the first process.
        num_processes: number of processes.
        process_id: number of this process, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialize(given: Placement, environment: Mapping[str, str] = os.environ) -> None:
    """Connect to the other processes, if there are any, before anything touches a device.

    What the flags do not give comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, then from the launcher: srun, Open MPI's mpirun, GKE and Cloud TPU pods are
    recognized.

    Raises:
        DistributedError: a part of the placement is missing, or the others do not answer.
    """
    place = _complete(given, environment)
    launched = launcher(environment)
    if place == Placement() and launched is None:
        return
    if None in place and launched is None:
        missing = [
            name for name, value in zip(Placement._fields, place, strict=True) if value is None
        ]
        raise DistributedError(
            f"--{missing[0]} is missing: a run of several processes needs all of "
            f"{', '.join(Placement._fields)}"
        )
    if place.num_processes == 1:
        return
    if place.coordinator:
        print(
            f"process {place.process_id} of {place.num_processes}: waiting for the others at "
            f"{place.coordinator}",
            file=sys.stderr,
            flush=True,
        )
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        if launched == TPU_VM and place == Placement() and isinstance(error, ValueError):
            # A TPU without the cloud's metadata, as in Colab: jax finds no other processes.
            return
        raise DistributedError(
            f"cannot join the other processes at {place.coordinator or launched}: {_line(error)}"
        ) from None


def _complete(given: Placement, environment: Mapping[str, str]) -> Placement:
    """Fill what the flags leave open from environment variables, and check the result."""
    coordinator, count, number = (environment.get(name) or None for name in VARIABLES)
    # jax recognizes Open MPI 4 only; version 5 sets these variables, too.
    if launcher(environment) == "Open MPI":
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
    own, total = place.process_id, place.num_processes
    if own is not None and total is not None and not 0 <= own < total:
        raise DistributedError(f"--process_id={own} must be 0 to {total - 1}")
    return place


def launcher(environment: Mapping[str, str]) -> str | None:
    """Name what started this process together with others, or None if nothing did.

    Launchers are told by the environment variables and devices that they leave.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "," in environment.get(
        "TPU_PROCESS_ADDRESSES", ""
    ):
        return "GKE"
    chips = any(pathlib.Path("/dev").glob("accel[0-9]*")) or pathlib.Path("/dev/vfio/0").exists()
    if (
        chips
        and "TPU_SKIP_MDS_QUERY" not in environment
        and "TPU_WORKER_HOSTNAMES" not in environment
    ):
        return TPU_VM
    return None


def is_main_process() -> bool:
    """Return whether this process writes the files.

    Neither this nor `is_single_process` opens a device in a process that is not distributed: a
    parent that only starts others must leave the accelerator to them.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_single_process() -> bool:
    """Return whether this process is the whole run."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def gather(tree: Any) -> Any:
    """Return a tree of whole NumPy arrays on every process; all processes must call it."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def largest(values: np.ndarray) -> np.ndarray:
    """Return the element-wise maximum over processes; all processes must call it."""
    if jax.process_count() == 1:
        return values
    return np.max(multihost_utils.process_allgather(values), axis=0)


def broadcast_from_main(value: int) -> int:
    """Return the first process's value on every process; all processes must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
