"""Account for each kernel of a GPU program: what it does, bytes to and from memory, FLOPs, and the line it comes from.

Each kernel reads its operands from memory once and writes its result once; a loop's kernels count
as often as it runs. An operand of which only slices are taken counts as those slices, one that is
updated in place as the update. Caches keep some of it from memory and some kernels read more than
once, so bytes are a count and not a measurement.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from launch.hlo import Array, Computation, Instruction, Program

FORWARD, FILTER, INPUT = (
    "convolution " + role for role in ("forward", "filter gradient", "input gradient")
)
PRODUCT, SCATTER, SORT, POOL, REDUCE = "matrix product", "scatter", "sort", "pooling", "reduction"
MOVE, GATHER, ELEMENTWISE, COLLECTIVE, OTHER = (
    "copy or transpose",
    "gather or update",
    "elementwise",
    "collective",
    "other",
)
CONVOLUTIONS = (FORWARD, FILTER, INPUT)
KINDS = (
    *CONVOLUTIONS,
    PRODUCT,
    SCATTER,
    SORT,
    POOL,
    REDUCE,
    MOVE,
    GATHER,
    ELEMENTWISE,
    COLLECTIVE,
    OTHER,
)
LARGEST = 20
# of a map that a warning is worth; no filter of a ResNet-50 has as many
ACTIVATION_BYTES = 16 * 2**20
SMALL_BYTES = 2**20  # a kernel that moves less takes as long as its launch

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
}
_FREE |= {"opt-barrier", "optimization-barrier", "add-dependency", "domain", "get-dimension-size"}
_MOVES = {
    "copy",
    "transpose",
    "reverse",
    "reshape",
    "concatenate",
    "pad",
    "broadcast",
    "iota",
    "slice",
}
_PLAIN = _MOVES | _FREE | {"convert", "select", "compare", "copy-start", "copy-done"}
_HOST = {"send", "recv", "infeed", "outfeed"}
_TARGETS = {
    "__cudnn$convForward": FORWARD,
    "__cudnn$convForwardGraph": FORWARD,
    "__cudnn$convBiasActivationForward": FORWARD,
    "__cudnn$convBackwardFilter": FILTER,
    "__cudnn$convBackwardInput": INPUT,
}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_WINDOW = re.compile(r"size=([\dx]+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of the program, or one that a loop runs several times.

    Attributes:
        name: of the instruction.
        kind: one of KINDS.
        times: how often it runs in a program.
        read: bytes of one run.
        written: bytes of one run.
        products: FLOPs of convolutions and matrix products of one run, a multiplication and an
            addition as two.
        dtype: of the products' operands; "f32 highest" where they may not be rounded to TF32.
        others: FLOPs besides, one for each element of each operation.
        result: shapes.
        line: "models/norm.py:41", or empty.
        path: modules and operation, such as "layer1_0/bn2/mul"; "backward: " before it in a
            gradient.
    """

    name: str
    kind: str
    times: int
    read: int
    written: int
    products: float
    dtype: str
    others: float
    result: str
    line: str
    path: str

    @property
    def bytes(self) -> int:
        """Of all runs."""
        return self.times * (self.read + self.written)

    @property
    def flops(self) -> float:
        """Of all runs."""
        return self.times * (self.products + self.others)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What a device does in a second at most.

    Attributes:
        bandwidth: bytes/s to and from memory.
        products: {dtype: FLOP/s of convolutions and matrix products}; "f32" with TF32.
        others: FLOP/s in float32 outside of tensor cores.
    """

    bandwidth: float
    products: dict[str, float]
    others: float

    def seconds(self, kernel: Kernel) -> tuple[float, float]:
        """Return the least time of all runs of a kernel by memory and by arithmetic."""
        products = kernel.products / self.products.get(kernel.dtype, self.others)
        return kernel.bytes / self.bandwidth, kernel.times * (
            products + kernel.others / self.others
        )


def kernels_of(program: Program, package: str = "") -> list[Kernel]:
    """Return the kernels of the entry computation and of what it calls, in order.

    Args:
        program: parsed HLO.
        package: the folder whose lines are ours.
    """
    steps = _steps(program, program.computations[program.entry], 1)
    return [_kernel(program, computation, one, times, package) for computation, one, times in steps]


def summary(kernels: Iterable[Kernel], peaks: Peaks) -> dict[str, Any]:
    """Return what is stored of a program's kernels.

    Returns:
        "bytes", "flops"; "memory_ms" and "flops_ms" of all, and "floor_ms", the sum over kernels of
        the longer of both; "kernels" and "small_kernels" (those that move less than a MiB), counted
        by runs; "by_kind" {kind: {"count", "bytes", "flops", "floor_ms"}}; "largest", the 20 that
        move most.
    """
    kernels = list(kernels)
    times = [peaks.seconds(kernel) for kernel in kernels]
    by_kind: dict[str, dict[str, float]] = {}
    for kernel, pair in zip(kernels, times, strict=True):
        entry = by_kind.setdefault(
            kernel.kind, {"count": 0, "bytes": 0, "flops": 0.0, "floor_ms": 0.0}
        )
        entry["count"] += kernel.times
        entry["bytes"] += kernel.bytes
        entry["flops"] += kernel.flops
        entry["floor_ms"] += 1000 * max(pair)
    largest = sorted(kernels, key=lambda kernel: kernel.bytes, reverse=True)[:LARGEST]
    return {
        "bytes": sum(kernel.bytes for kernel in kernels),
        "flops": sum(kernel.flops for kernel in kernels),
        "memory_ms": round(1000 * sum(memory for memory, _ in times), 3),
        "flops_ms": round(1000 * sum(arithmetic for _, arithmetic in times), 3),
        "floor_ms": round(1000 * sum(max(pair) for pair in times), 3),
        "kernels": sum(kernel.times for kernel in kernels),
        "small_kernels": sum(
            kernel.times for kernel in kernels if kernel.read + kernel.written < SMALL_BYTES
        ),
        "by_kind": {
            kind: by_kind[kind] | {"floor_ms": round(by_kind[kind]["floor_ms"], 3)}
            for kind in KINDS
            if kind in by_kind
        },
        "largest": [
            {"kind": one.kind, "times": one.times, "bytes": one.bytes, "flops": one.flops}
            | {"result": one.result, "line": one.line, "path": one.path}
            for one in largest
        ],
    }


def collectives_of(program: Program) -> dict[str, dict[str, int]]:
    """Return {"all-reduce f32": {"count": operations of a run, "bytes": of their results on one device}}."""
    sums: dict[str, dict[str, int]] = {}
    for computation, one, times in _steps(program, program.computations[program.entry], 1):
        if one.opcode.startswith(_COLLECTIVES):
            kind = (
                f"{one.opcode.removesuffix('-start')} {computation.operand(one, 0).arrays[0].dtype}"
            )
            entry = sums.setdefault(kind, {"count": 0, "bytes": 0})
            entry["count"] += times
            entry["bytes"] += times * sum(array.bytes for array in _received(one))
    return sums


def warnings_of(program: Program, package: str = "") -> list[str]:
    """Return one line for each pattern of a program that is slow on GPUs, with how often it is there and where first."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    convolutions = [pair for pair in _instructions(program) if _is_convolution(pair[1])]
    halves = any(_operand_dtype(*pair) == "bf16" for pair in convolutions)
    for computation, one in convolutions:
        place = program.line(one, package) or one.name
        if halves and _operand_dtype(computation, one) == "f32":
            found["float32 convolutions in a bfloat16 program"].append(place)
        if not _is_nhwc(one):
            found["convolutions outside NHWC"].append(place)
    for computation, one in _instructions(program):
        place = program.line(one, package) or one.name
        target = one.attribute("custom_call_target")
        if one.opcode == "scatter" and "unique_indices=true" not in one.rest:
            found["scatters with atomic additions"].append(place)
        if one.opcode == "sort" or "RadixSort" in target:
            found["sorts"].append(place)
        if one.opcode in _HOST or "callback" in target:
            found["transfers to or from the host"].append(place)
        if _moves_activation(computation, one):
            found["layout copies of activations"].append(place)
    return [
        f"{len(places)} {what}: {', '.join(dict.fromkeys(places))}"[:300]
        for what, places in found.items()
    ]


# ---- Kernels -------------------------------------------------------------------------------------


def _steps(
    program: Program, computation: Computation, times: int
) -> Iterator[tuple[Computation, Instruction, int]]:
    """What runs on the device, and how often; of a conditional the branch that moves most."""
    for one in computation.instructions.values():
        if one.opcode == "while":
            trips = _TRIPS.search(one.rest)
            body = program.computations[one.attribute("body")]
            yield from _steps(program, body, times * (int(trips[1]) if trips else 1))
        elif one.opcode == "conditional":
            branches = [
                list(_steps(program, program.computations[name], times)) for name in one.called
            ]
            yield from max(branches, key=lambda branch: _moved(program, branch), default=[])
        elif one.opcode in ("call", "async-start"):
            for name in one.called:
                yield from _steps(program, program.computations[name], times)
        elif one.opcode not in _FREE and not one.opcode.endswith(("-done", "-update")):
            yield computation, one, times


def _moved(program: Program, steps: list[tuple[Computation, Instruction, int]]) -> int:
    return sum(
        times * (_read(program, computation, one) + _written(program, computation, one))
        for computation, one, times in steps
    )


def _kernel(
    program: Program, computation: Computation, one: Instruction, times: int, package: str
) -> Kernel:
    inner = _inner(program, one)
    work = (
        [(inner, step) for step in inner.instructions.values()] if inner else [(computation, one)]
    )
    products = [(pair, flops) for pair in work if (flops := _products(*pair))]
    dtype = _precision(*products[0][0]) if products else ""
    kind = _kind(program, computation, one)
    others = sum(_others(*pair) for pair in work if not _products(*pair))
    line, path = _origin(program, inner, one, package)
    return Kernel(
        name=one.name,
        kind=kind,
        times=times,
        read=_read(program, computation, one),
        written=_written(program, computation, one),
        products=float(sum(flops for _, flops in products)),
        dtype=dtype,
        others=float(others),
        result=", ".join(str(array) for array in one.arrays if array.elements)[:160],
        line=line,
        path=path,
    )


def _inner(program: Program, one: Instruction) -> Computation | None:
    """The computation that a fusion fuses, or one that is started and waited for later."""
    is_fusion = one.opcode in ("fusion", "fusion-start")
    return program.computations[one.called[0]] if is_fusion and one.called else None


def _kind(program: Program, computation: Computation, one: Instruction) -> str:
    inner = _inner(program, one)
    target = one.attribute("custom_call_target")
    if target in _TARGETS:
        kind = _TARGETS[target]
        # The gradient of a 1x1 convolution's input is one that goes forward.
        return INPUT if kind == FORWARD and _is_backward(one) else kind
    if "gemm" in target or "matmul" in target:
        return PRODUCT
    if "Sort" in target or "TopK" in target:
        return SORT
    if one.opcode.startswith(_COLLECTIVES):
        return COLLECTIVE
    opcodes = {step.opcode for step in inner.instructions.values()} if inner else {one.opcode}
    if "convolution" in opcodes:
        return INPUT if _is_backward(one) else FORWARD
    choices = (
        ({"dot"}, PRODUCT),
        ({"scatter"}, SCATTER),
        ({"sort", "topk"}, SORT),
        ({"reduce-window", "select-and-scatter"}, POOL),
        ({"reduce"}, REDUCE),
        ({"gather", "dynamic-slice", "dynamic-update-slice"}, GATHER),
    )
    for some, kind in choices:
        if opcodes & some:
            return kind
    if opcodes <= _FREE | _MOVES | {"convert", "copy-start"}:
        return MOVE
    return OTHER if one.opcode == "custom-call" else ELEMENTWISE


def _origin(
    program: Program, inner: Computation | None, one: Instruction, package: str
) -> tuple[str, str]:
    """Line and path of a kernel: of its own metadata, or of the largest fused instruction that has some."""
    steps = (
        sorted(inner.instructions.values(), key=lambda step: step.bytes, reverse=True)
        if inner
        else []
    )
    line = next((line for step in (one, *steps) if (line := program.line(step, package))), "")
    name = next((step.op_name for step in (one, *steps) if "/" in step.op_name), "")
    parts = [
        part
        for part in name.split("/")
        if not re.fullmatch(r".*\(.*\)|while|body|cond|branch_\d+_fun|.*\..*", part)
    ]
    return line, ("backward: " if "transpose(" in name else "") + "/".join(parts[-4:])


def _is_backward(one: Instruction) -> bool:
    return "transpose(" in one.op_name


# ---- Bytes ---------------------------------------------------------------------------------------


def _read(program: Program, computation: Computation, one: Instruction) -> int:
    """Bytes that one run of a kernel reads; an operand that is given twice is read once."""
    inner, sizes = _inner(program, one), dict[str, int]()
    for index, name in enumerate(one.operands):
        source = computation.source(name)
        if source.opcode == "constant" and source.elements <= 1:
            continue
        if inner is None:
            size = _used(computation, one, index, source.bytes)
        elif index in inner.parameters:
            size = _used_inside(inner, inner.parameters[index])
        else:
            size = source.bytes
        sizes[source.name] = max(sizes.get(source.name, 0), size)
    return sum(sizes.values())


def _used(computation: Computation, one: Instruction, index: int, full: int) -> int:
    """Bytes that one instruction needs of an operand of `full` bytes."""
    if index == 0 and one.opcode in ("slice", "dynamic-slice", "gather"):
        return min(one.bytes, full)
    if index == 0 and one.opcode == "dynamic-update-slice":  # in place
        return 0
    return full


def _used_inside(inner: Computation, parameter: Instruction) -> int:
    """Bytes that a fusion needs of a parameter."""
    total, waiting = 0, [parameter]
    while waiting:
        source = waiting.pop()
        for user in inner.users.get(source.name, []):
            if user.opcode == "bitcast":
                waiting.append(user)
                continue
            for index, name in enumerate(user.operands):
                if name == source.name:
                    total += _used(inner, user, index, parameter.bytes)
    return min(total, parameter.bytes)


def _written(program: Program, computation: Computation, one: Instruction) -> int:
    """Bytes that one run of a kernel writes."""
    inner = _inner(program, one)
    if inner is None:
        return _update(computation, one)
    root = inner.root
    results = (
        [inner.source(name) for name in root.operands]
        if root.opcode == "tuple"
        else [inner.source(root.name)]
    )
    return sum(_update(inner, result) for result in results)


def _update(computation: Computation, result: Instruction) -> int:
    if result.opcode == "dynamic-update-slice":
        return computation.operand(result, 1).bytes
    if result.opcode.startswith(_COLLECTIVES):
        return sum(array.bytes for array in _received(result))
    return result.bytes


def _received(one: Instruction) -> tuple[Array, ...]:
    """What a collective results in; the start of an asynchronous one has its operands before that."""
    sent = len(one.operands)
    return (
        one.arrays[sent : 2 * sent]
        if one.opcode.endswith("-start") and len(one.arrays) > sent
        else one.arrays
    )


# ---- FLOPs ---------------------------------------------------------------------------------------


def _products(computation: Computation, one: Instruction) -> float:
    """FLOPs of a convolution or a matrix product, 0 for anything else."""
    target = one.attribute("custom_call_target")
    if _is_convolution(one):
        kind = _TARGETS.get(target, FORWARD)
        result = one.arrays[0]
        first, second = (computation.operand(one, index).arrays[0] for index in (0, 1))
        # Whatever is sought, each output pixel meets each number of the filter once.
        outputs, weights = {
            FORWARD: (result, second),
            FILTER: (second, result),
            INPUT: (first, second),
        }[kind]
        channels = outputs.dims[_labels(one)[2].index("f")]
        return 2.0 * outputs.elements / channels * weights.elements
    if one.opcode == "dot":
        left = computation.operand(one, 0).arrays[0]
        contracted = [
            int(axis) for axis in one.attribute("lhs_contracting_dims").split(",") if axis
        ]
        return 2.0 * one.elements * math.prod(left.dims[axis] for axis in contracted)
    if "gemm" in target or "matmul" in target:
        left = computation.operand(one, 0).arrays[0]
        listed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)
        contracted = [int(axis) for axis in re.findall(r"\d+", listed[1] if listed else "")]
        return 2.0 * one.arrays[0].elements * math.prod(left.dims[axis] for axis in contracted)
    return 0.0


def _precision(computation: Computation, one: Instruction) -> str:
    dtype = _operand_dtype(computation, one)
    return f"{dtype} highest" if "highest" in one.attribute("operand_precision") else dtype


def _others(computation: Computation, one: Instruction) -> float:
    """FLOPs of an instruction that is no product: one an element of the result, or of what is reduced."""
    if (
        one.opcode in _PLAIN
        or one.opcode in ("fusion", "fusion-start", "custom-call")
        or one.opcode.startswith(_COLLECTIVES)
    ):
        return 0.0
    if one.opcode == "reduce":
        half = len(one.operands) // 2
        return float(sum(computation.operand(one, index).elements for index in range(half)))
    if one.opcode == "reduce-window":
        size = _WINDOW.search(one.rest)
        return float(
            one.elements * math.prod(int(side) for side in (size[1] if size else "1").split("x"))
        )
    if one.opcode in ("scatter", "dynamic-update-slice", "dynamic-slice", "gather", "sort", *_HOST):
        return 0.0
    return float(one.arrays[0].elements) if one.arrays and one.arrays[0].dtype[0] in "fb" else 0.0


# ---- Patterns ------------------------------------------------------------------------------------


def _instructions(program: Program) -> Iterator[tuple[Computation, Instruction]]:
    for computation in program.computations.values():
        for one in computation.instructions.values():
            yield computation, one


def _is_convolution(one: Instruction) -> bool:
    return one.opcode == "convolution" or one.attribute("custom_call_target") in _TARGETS


def _operand_dtype(computation: Computation, one: Instruction) -> str:
    return computation.operand(one, 0).arrays[0].dtype


@functools.lru_cache(maxsize=256)
def _split_labels(labels: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels)
    if match is None:
        raise ValueError(f"not the labels of a convolution: {labels!r}")
    return match[1], match[2], match[3]


def _labels(one: Instruction) -> tuple[str, str, str]:
    """Labels of input, filter and output, such as "b01f", "o01i", "b01f"."""
    return _split_labels(one.attribute("dim_labels"))


def _is_nhwc(one: Instruction) -> bool:
    """Whether channels are neighbors in memory, by the map that the instruction makes (the filter, in its gradient)."""
    result = one.arrays[0]
    is_filter = _TARGETS.get(one.attribute("custom_call_target")) == FILTER
    labels = _labels(one)[1] if is_filter else _labels(one)[2]
    return labels[result.minor] == ("i" if is_filter else "f")


def _moves_activation(computation: Computation, one: Instruction) -> bool:
    """Whether an instruction, fused or not, makes other numbers of a large map neighbors in memory."""
    if (
        one.opcode not in ("copy", "transpose")
        or len(one.arrays) != 1
        or one.bytes < ACTIVATION_BYTES
    ):
        return False
    before, after = (
        _order_in_memory(computation.operand(one, 0).arrays[0]),
        _order_in_memory(one.arrays[0]),
    )
    if one.opcode == "transpose":
        order = [int(axis) for axis in one.attribute("dimensions").split(",") if axis]
        after = [order[axis] for axis in after]
    return len(one.arrays[0].dims) >= 4 and before[-1:] != after[-1:]


def _order_in_memory(array: Array) -> list[int]:
    """Dimensions from major to minor, those of size 1 left out."""
    layout = array.layout or tuple(reversed(range(len(array.dims))))
    return [axis for axis in reversed(layout) if array.dims[axis] > 1]
