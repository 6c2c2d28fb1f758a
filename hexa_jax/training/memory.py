"""Check that a training step fits its devices, and turn memory that runs out into one line.

XLA lays out a program's memory when it compiles: arguments, outputs, and one block of temporaries.
So it is known before data are read whether a step fits. On a CPU the block is allocated whole when
the step begins, and convolutions take scratch memory besides.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.pipeline import read_or_replace, tolerated
from hexa_jax.data.source import Source
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import Layout
from hexa_jax.training.step import CompiledSteps, Trainer

CGROUPS, OWN_CGROUP = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/proc/self/cgroup")
MEMINFO = pathlib.Path("/proc/meminfo")
# What convolutions on a CPU take besides the block of temporaries, as a share of it: 0.24 to 0.26
# were measured for ResNets with batches of 128 and 512 images; tests/training/test_memory.py
# measures again.
CPU_SCRATCH = 0.25
LEAST_GROUP = 8  # rows whose BatchNorm statistics are still worth something
SMALLER = "a smaller --config.batch_size or --config.data.crop_size"


class Need(NamedTuple):
    """Bytes that a compiled program occupies on each device.

    Attributes:
        fixed: arguments and outputs, those that share memory counted once.
        temporaries: what it holds in between, most of it activations.
    """

    fixed: int
    temporaries: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.fixed + self.temporaries


def compile_ahead(
    config: ConfigDict, trainer: Trainer, steps: CompiledSteps, source: Source
) -> CompiledSteps:
    """Compile the training step from its shapes alone, and check that it fits the devices' memory.

    Args:
        config: of the run.
        trainer: what computes; its mesh is the current one.
        steps: from `trainer.compile()`.
        source: the training examples. Nothing of it is read, except one image where all of them are
            to live on the device, for their size.

    Returns:
        The steps with the compiled program in place of `train`, which so is compiled once.

    Raises:
        ConfigError: it does not fit; one line with settings that would.
        DataError: the one image cannot be read.
    """
    mesh, layout = trainer.mesh, trainer.objective.layout
    what, device = described(config, layout), mesh.local_devices[0]
    patience = "; takes minutes on a CPU" if device.platform == "cpu" else ""
    log(f"compiling the training step: {what}{patience}")
    try:
        compiled = lowered(config, trainer, steps, source).compile()
    except jax.errors.JaxRuntimeError as error:
        # The compilers of accelerators refuse a program that is larger than their memory.
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"a training step of {what} does not fit the memory of {device.device_kind}: use "
            f"--config.runtime.microbatches=N, or {SMALLER} ({first_line(error)})"
        ) from None
    if config.runtime.check_memory:
        need, room = needed(compiled, device.platform), available(mesh)
        # All processes stop, or none does: the others would wait for one that has stopped.
        short = processes.largest(np.array([room is not None and need.total > room], np.int32))
        if short[0]:
            raise too_large(config, trainer, need, room)
    return steps._replace(train=compiled)


def lowered(
    config: ConfigDict, trainer: Trainer, steps: CompiledSteps, source: Source
) -> jax.stages.Lowered:
    """Lower the training step from its shapes; reads one image where all are to live on the device.

    Raises:
        DataError: that image cannot be read.
    """
    data = None
    if config.data.on_device:
        failures = tolerated(config.data.max_bad_fraction, len(source))
        image, _, _ = read_or_replace(source, 0, failures)
        whole = NamedSharding(trainer.mesh, PartitionSpec())
        data = jax.ShapeDtypeStruct((len(source), *image.shape), np.uint8, sharding=whole)
    return steps.train.lower(
        trainer.state_shapes(), trainer.batch_shapes(config.data.on_device), data
    )


def too_large(config: ConfigDict, trainer: Trainer, need: Need, room: int | None) -> ConfigError:
    """Return the error about a step that does not fit, with settings that would."""
    layout = trainer.objective.layout
    remedy = _remedy(layout, need, gradient_bytes(trainer), room or need.total)
    return ConfigError(
        f"a training step of {described(config, layout)} needs {in_words(need.total)} and there "
        "are "
        f"{place(trainer.mesh, room)}: {remedy}; "
        "--config.runtime.check_memory=False tries it all the same"
    )


def gradient_bytes(trainer: Trainer) -> int:
    """Return the bytes of two sets of gradients: their sum, and the one that is added to it."""
    leaves = jax.tree.leaves(trainer.state_shapes().params)
    return 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def needed(compiled: Any, platform: str) -> Need:
    """What a program that jax compiled for a platform ("cpu", "gpu") occupies on each device."""
    memory = compiled.memory_analysis()
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    scratch = CPU_SCRATCH if platform == "cpu" else 0.0
    return Need(int(fixed), int(memory.temp_size_in_bytes * (1 + scratch)))


def available(mesh: Mesh) -> int | None:
    """Bytes that each device of this process may take, None where nobody knows.

    A CPU's are those free on the machine or in its control group, shared by all CPU devices of this
    process.
    """
    devices = mesh.local_devices
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        known = [int(limit) for limit in limits if limit]
        return min(known) if known else None
    rooms = [room for room in (machine_room(), cgroup_room()) if room is not None]
    return min(rooms) // len(devices) if rooms else None


def machine_room(meminfo: pathlib.Path = MEMINFO) -> int | None:
    """Bytes that a new program could have without swapping; all of it where none is told."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def cgroup_room(root: pathlib.Path = CGROUPS, own: pathlib.Path = OWN_CGROUP) -> int | None:
    """Bytes left under the memory limits of this process's control groups; None without any.

    Containers and SLURM set such limits.

    Args:
        root: where control groups are mounted.
        own: the file that names those of this process.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    rooms = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":  # version 2
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # version 1
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        # A parent's limit holds for its children. In a container the path may be one of the host's,
        # and only the mounted root is there.
        for folder in (group, *group.parents):
            if (room := _room_of(folder, *names)) is not None:
                rooms.append(room)
            if folder == base:
                break
    return min(rooms) if rooms else None


def _room_of(folder: pathlib.Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit minus usage of one control group, cached files left out; None without a limit."""
    try:
        allowed = int((folder / limit).read_text())  # "max" is no number
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(allowed - max(used - int(stat.get(reclaimable, 0)), 0), 0)


# ---- What to do instead --------------------------------------------------------------------------


def microbatches_that_fit(
    layout: Layout,
    need: Need,
    gradients: int,
    room: int,
) -> tuple[Layout, bool] | None:
    """The layout with the fewest microbatches with which a step should fit.

    Temporaries are taken to shrink with the rows of a microbatch, except for the sum of gradients
    and the one that is added to it; a tenth of the room is left for what this misses.

    Args:
        layout: of the step that does not fit.
        need: what that step needs.
        gradients: bytes of two sets of gradients.
        room: bytes of a device.

    Returns:
        The layout, and whether BatchNorm groups and CutMix blocks are as they were. Where
        microbatches cannot hold them, they are made as large as the microbatch allows, which is
        another run. None where nothing would fit.
    """
    kept = min(gradients, need.temporaries)
    least, other = min(LEAST_GROUP, layout.bn_group_size), None
    for number in range(layout.microbatches + 1, layout.batch_size + 1):
        if layout.batch_size % (number * layout.num_devices):
            continue
        estimate = need.fixed + kept + (need.temporaries - kept) * layout.microbatches / number
        if estimate > 0.9 * room:
            continue
        finer = dataclasses.replace(layout, microbatches=number)
        if _legal(finer):
            return finer, True
        group = math.gcd(layout.bn_group_size, finer.rows)
        block = math.gcd(layout.cutmix_block, finer.rows) if layout.cutmix_block else 0
        if other is None and group >= least:
            smaller = dataclasses.replace(finer, bn_group_size=group, cutmix_block=block)
            other = smaller if _legal(smaller) else None
    return None if other is None else (other, False)


def _legal(layout: Layout) -> bool:
    try:
        layout.check()
    except ValueError:
        return False
    return True


def _remedy(layout: Layout, need: Need, gradients: int, room: int) -> str:
    found = microbatches_that_fit(layout, need, gradients, room)
    if found is None:
        return f"use {SMALLER}, or a smaller --config.model.backbone"
    finer, same = found
    settings = f"--config.runtime.microbatches={finer.microbatches}"
    if same:
        return f"{settings} should do (an estimate), or {SMALLER}"
    for name in ("bn_group_size", "cutmix_block"):
        if getattr(finer, name) != getattr(layout, name):
            settings += f" --config.{name}={getattr(finer, name)}"
    return f"{settings} should do (an estimate, and other BatchNorm statistics), or {SMALLER}"


# ---- Memory that runs out later ------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text


def out_of_memory(error: BaseException, config: ConfigDict) -> str:
    """One line about memory that ran out in a task, with the settings that need less."""
    if config.task == "pretrain":
        found = (
            " (0 finds N before the first step)"
            if config.runtime.microbatches
            else " above what 0 found"
        )
        settings = f"--config.runtime.microbatches=N{found}, or {SMALLER}"
    else:
        names = ("batch_size", "runtime.batch_size", "data.crop")
        known = [f"--config.{name}" for name in names if _has(config, name)]
        settings = f"a smaller {' or '.join(known)}"
    return f"out of memory: use {settings} ({first_line(error)})"


def in_words(size: float) -> str:
    """Bytes for a person: "108.3 GB", "250 MB", "3 kB"."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _has(config: ConfigDict, name: str) -> bool:
    for part in name.split("."):
        if part not in config:
            return False
        config = config[part]
    return True


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def described(config: ConfigDict, layout: Layout) -> str:
    """The size of a step in words: "ResNet-50, 224 pixels, 256 images"."""
    pixels = " and ".join(str(size) for size in config.data.crop_size)
    name = config.model.backbone.replace("resnet", "ResNet-")
    parts = layout.microbatches
    split = f" in {parts} microbatches" if parts > 1 else ""
    return f"{name}, {pixels} pixels, {config.batch_size} images{split}"


def place(mesh: Mesh, room: int | None) -> str:
    """How much memory there is, and where."""
    device, count = mesh.local_devices[0], len(mesh.local_devices)
    amount = "less" if room is None else in_words(room)
    if device.platform != "cpu":
        return f"{amount} on a device ({device.device_kind})"
    for_whom = "it" if count == 1 else f"each of {count} CPU devices"
    return f"{amount} free for {for_whom}"
