"""Read the text of a compiled program: its computations, instructions, shapes, and the lines of code they come from.

Only what accounting needs is kept (launch/kernels.py); XLA's own parser is not among jax's public
names.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1,
    "s4": 1,
    "u4": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "c64": 8,
    "c128": 16,
    "token": 0,
    "opaque": 0,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ATTRIBUTE = r"\b{}=(%?[\w.\->]+|\{{[^}}]*\}}|\"[^\"]*\")"
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_LINE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclasses.dataclass(frozen=True)
class Array:
    """The dtype, dimensions and layout (minor to major, empty where none is written) of one array."""

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """How much memory it takes, padding of layouts left out."""
        return self.elements * BYTES.get(self.dtype, 4)

    @property
    def minor(self) -> int:
        """The dimension whose neighbors are neighbors in memory; the last where no layout is written."""
        return self.layout[0] if self.layout else len(self.dims) - 1

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        opcode: "fusion", "custom-call", "add" and so on.
        arrays: of the result; a tuple's leaves from left to right.
        operands: names.
        rest: what follows the operands: attributes, metadata, backend_config.
        is_root: whether it is the computation's result.
        number: of a parameter, else -1.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool = False
    number: int = -1

    @property
    def bytes(self) -> int:
        """Of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def elements(self) -> int:
        """Of the result."""
        return sum(array.elements for array in self.arrays)

    def attribute(self, name: str) -> str:
        """Return the value of `name=value` without quotes, braces or a percent sign; empty where there is none."""
        match = re.search(_ATTRIBUTE.format(name), self.rest)
        return match[1].strip('{}"').replace("%", "") if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that a fusion, call, conditional or asynchronous start runs."""
        names: list[str] = []
        for key in ("calls", "to_apply", "branch_computations", "called_computations"):
            names += [name.strip() for name in self.attribute(key).split(",") if name.strip()]
        names += [
            self.attribute(key)
            for key in ("true_computation", "false_computation")
            if self.attribute(key)
        ]
        return tuple(names)

    @property
    def op_name(self) -> str:
        """The path of jax's transformations and of modules, such as "jit(step)/transpose(jvp(Network))/conv1/mul"."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The result; the last instruction where none is marked."""
        marked = [one for one in self.instructions.values() if one.is_root]
        return marked[0] if marked else list(self.instructions.values())[-1]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """{number: parameter}."""
        return {one.number: one for one in self.instructions.values() if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """{name: instructions that have it as an operand}."""
        users: dict[str, list[Instruction]] = {}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                users.setdefault(operand, []).append(one)
        return users

    def operand(self, one: Instruction, index: int) -> Instruction:
        """Return an operand's instruction."""
        return self.instructions[one.operands[index]]

    def source(self, name: str) -> Instruction:
        """Return the instruction behind bitcasts."""
        one = self.instructions[name]
        while one.opcode == "bitcast":
            one = self.operand(one, 0)
        return one


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that runs.
        stacks: {stack frame: [(file, line)], innermost first}.
    """

    computations: dict[str, Computation]
    entry: str
    stacks: dict[int, list[tuple[str, int]]]

    def line(self, one: Instruction, package: str) -> str:
        """Return "models/norm.py:41", the innermost line in the folder `package` that an instruction comes from.

        Empty where it has no metadata, or nothing of the package in them.
        """
        frame, line = _FRAME.search(one.rest), _LINE.search(one.rest)
        places = self.stacks.get(int(frame[1]), []) if frame else []
        places = [*places, (line[1], int(line[2]))] if line else places
        folder = package.rstrip("/") + "/"
        return next(
            (f"{file.removeprefix(folder)}:{at}" for file, at in places if file.startswith(folder)),
            "",
        )


def parse(text: str) -> Program:
    """Return the program of an HLO text, as `compiled.as_text()` writes it.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    instructions: dict[str, Instruction] | None = None
    entry = table = ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            table, instructions = "", {}
            computations[header[2]] = Computation(header[2], instructions)
            entry = header[2] if header[1] else entry
        elif instructions is not None and (one := _instruction(line)):
            instructions[one.name] = one
        elif line in tables:
            table = line
        elif table and (row := re.match(r"(\d+) (.*)", line)):
            tables[table][int(row[1])] = row[2]
    if not entry:
        raise ValueError("the text has no entry computation")
    return Program(computations, entry, _stacks(tables))


def arrays_of(shape: str) -> tuple[Array, ...]:
    """Return the arrays of a shape's text; several of a tuple."""

    def numbers(text: str | None) -> tuple[int, ...]:
        return tuple(int(number) for number in (text or "").split(",") if number)

    return tuple(
        Array(dtype, numbers(dims), numbers(layout))
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    begin = match.end()
    end = _closing(line, begin) if line[begin] == "(" else line.index(" ", begin)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    is_parameter = opcode[1] == "parameter"
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        arrays=arrays_of(line[begin:end]),
        operands=() if is_parameter else tuple(_NAME.findall(inside)),
        rest=line[close:],
        is_root=bool(match[1]),
        number=int(inside) if is_parameter else -1,
    )


def _closing(line: str, begin: int) -> int:
    """Return the position after the bracket that closes the one at `begin`."""
    depth = 0
    for position in range(begin, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0:
            return position + 1
    return len(line)


def _stacks(tables: dict[str, dict[int, str]]) -> dict[int, list[tuple[str, int]]]:
    """Return {frame: [(file, line)]}, innermost first, of the tables in a text's head."""

    def field(row: str, name: str) -> int:
        match = re.search(rf"\b{name}=(\d+)", row)
        return int(match[1]) if match else 0

    def frames(number: int) -> Iterator[tuple[str, int]]:
        while number in tables["StackFrames"]:
            row = tables["StackFrames"][number]
            location = tables["FileLocations"].get(field(row, "file_location_id"), "")
            yield (
                tables["FileNames"].get(field(location, "file_name_id"), "").strip('"'),
                field(location, "line"),
            )
            # written one too high: a frame without a parent has 1
            parent = field(row, "parent_frame_id") - 1
            number = parent if parent < number else 0

    return {number: list(frames(number)) for number in tables["StackFrames"]}
