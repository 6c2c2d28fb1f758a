"""What a compiled program says of itself: memory, collectives, arithmetic, a TPU's cycles, a GPU's kernels."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from hexa_jax.training.memory import needed
from launch import kernels
from launch.gpu_topology import Gpu
from launch.hlo import BYTES, parse

COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CHANNEL = re.compile(r"channel_id=(\d+)")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
WHILE = re.compile(r"\bwhile\(.*body=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLED = re.compile(
    r"(?:to_apply|called_computations=\{|branch_computations=\{|true_computation|false_computation)=?%?([\w.\-]+)"
)
FULL = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", re.IGNORECASE)
# of a GPU's memory, which jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
JAX_SHARE = 0.75
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Collective(NamedTuple):
    """One operand of a collective: its kind, dtype, number of elements, and whether it runs inside a loop."""

    kind: str
    dtype: str
    elements: int
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of a TPU chip: bfloat16 FLOP/s, memory bandwidth in bytes/s, clock in Hz, memory in bytes."""

    flops: float
    bandwidth: float
    clock: float
    memory: float


# cloud.google.com/tpu/docs/system-architecture-tpu-vm; clock = FLOP/s over 2 x 128 x 128 per matrix
# unit and cycle.
CHIPS = {
    "v4": Chip(275e12, 1200e9, 1.05e9, 32 * 2**30),
    "v5e": Chip(197e12, 819e9, 1.5e9, 16 * 2**30),
    "v5p": Chip(459e12, 2765e9, 1.75e9, 95 * 2**30),
    "v6e": Chip(918e12, 1640e9, 1.75e9, 32 * 2**30),
}


def collectives(hlo: str) -> list[Collective]:
    """Each operand of each collective. One that a compiler copied into several computations (a peeled loop) counts once.

    Copies are told by their channel and shapes; alone, a channel says nothing: all reductions of a
    shard_map share one.
    """
    bodies = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", hlo))
    by_place: dict[tuple, dict[str, list[Collective]]] = {}
    for computation, line in _lines(hlo):
        match = COLLECTIVE.search(line)
        if not match:
            continue
        channel = CHANNEL.search(line)
        operands = [
            Collective(
                match[2],
                dtype,
                math.prod(int(n) for n in shape.split(",") if n),
                computation in bodies,
            )
            for dtype, shape in SHAPE.findall(match[1])
        ]
        key = (match[2], match[1], channel[1] if channel else line)
        by_place.setdefault(key, {}).setdefault(computation, []).extend(operands)
    return [one for places in by_place.values() for one in max(places.values(), key=len)]


def summed(found: list[Collective]) -> dict[str, dict[str, int]]:
    """{"all-reduce f32": {"count", "bytes"}}; operands of one element are counted with the rest."""
    sums: dict[str, dict[str, int]] = {}
    for one in found:
        entry = sums.setdefault(f"{one.kind} {one.dtype}", {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += one.elements * BYTES.get(one.dtype, 4)
    return sums


def estimated_cycles(hlo: str) -> int:
    """The TPU compiler's estimates added up; a loop's body counts as often as it is known to run."""
    own: dict[str, int] = {}
    inner: dict[str, list[tuple[str, int]]] = {}
    entry = ""
    for computation, line in _lines(hlo):
        if line.startswith("ENTRY"):
            entry = computation
        own.setdefault(computation, 0)
        inner.setdefault(computation, [])
        loop = WHILE.search(line)
        if loop:
            trips = TRIPS.search(line)
            inner[computation].append((loop[1], int(trips[1]) if trips else 1))
            continue  # its own estimate, where it has one, is that of its body
        cycles = CYCLES.search(line)
        own[computation] += int(cycles[1]) if cycles else 0
        if not cycles and (called := CALLED.search(line)):
            inner[computation].append((called[1], 1))

    def total(computation: str) -> int:
        return own.get(computation, 0) + sum(
            times * total(name) for name, times in inner.get(computation, [])
        )

    return total(entry)


def describe(compiled: Any) -> dict[str, Any]:
    """Numbers of a program compiled by jax, per chip: bytes, FLOPs, cycles and collectives."""
    hlo, costs, memory = (
        compiled.as_text(),
        compiled.cost_analysis() or {},
        compiled.memory_analysis(),
    )
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if not peak:
        peak = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        peak += memory.temp_size_in_bytes
    return {
        "fits": True,
        "peak_bytes": int(peak),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "flops": float(costs.get("flops", 0)),
        "bytes_accessed": float(costs.get("bytes accessed", 0)),
        "estimated_cycles": estimated_cycles(hlo),
        "collectives": summed(collectives(hlo)),
    }


def describe_on_gpu(compiled: Any, gpu: Gpu, package: str) -> dict[str, Any]:
    """Return the numbers of a program compiled for GPUs, per GPU.

    Args:
        compiled: by jax.
        gpu: what it is compiled for.
        package: the folder whose lines are ours.

    Returns:
        "fits" (in the share of the memory that jax takes by itself), "peak_bytes",
        "argument_bytes", "temporary_bytes", "limit_bytes", "collectives", "warnings", and what
        `kernels.summary` returns. The scratch memory of convolutions is not among the bytes: their
        algorithms are chosen on the GPU.
    """
    text, need, memory = compiled.as_text(), needed(compiled, "gpu"), compiled.memory_analysis()
    program = parse(text)
    limit = int(JAX_SHARE * gpu.memory)
    return {
        "fits": need.total <= limit,
        "peak_bytes": need.total,
        "limit_bytes": limit,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temporary_bytes": need.temporaries,
        "collectives": kernels.collectives_of(program),
        "warnings": kernels.warnings_of(program, package),
        **kernels.summary(kernels.kernels_of(program, package), gpu.peaks),
    }


def too_large(message: str) -> dict[str, Any] | None:
    """What a failed compilation says of memory; None where it failed for another reason."""
    match = FULL.search(message)
    if match is None:
        return None
    used, limit = (float(match[i]) * UNITS[match[i + 1].upper()] for i in (1, 3))
    return {"fits": False, "peak_bytes": int(used), "limit_bytes": int(limit)}


def microbatches_that_fit(
    now: int, peak: float, fixed: float, limit: float, allowed: list[int]
) -> int | None:
    """The smallest allowed number of microbatches with which a step should fit, None if none does.

    Args:
        now: microbatches of the compiled step.
        peak: bytes it needs.
        fixed: bytes of state and batch, which microbatches do not change.
        limit: bytes of a chip.
        allowed: numbers that the layout accepts.
    """
    if fixed >= limit:
        return None
    needed = now * (peak - fixed) / (0.95 * limit - fixed)
    return next((number for number in sorted(allowed) if number >= needed), None)


def _lines(hlo: str) -> Iterator[tuple[str, str]]:
    """(computation, line) of the text."""
    computation = ""
    for line in hlo.splitlines():
        header = HEADER.match(line)
        if header:
            computation = header[2]
        yield computation, line
