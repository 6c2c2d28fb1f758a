"""What one reads to follow a training step: the package's functions that tracing it calls, in the order of their calls.

    python benchmarks/walk.py --config=configs/hexa_moco.py [--list] [--config.key=value ...]

Prints files, functions, lines (a function counts once, with its docstring; what a class or module
says outside of the called functions does not count), and how often the reader turns to another
file: a call into a file other than the caller's, each pair of functions once. Functions below
`models/` and `data/` are the network and the augmentation, which a walk through the objective takes
for granted; they are counted apart.
"""

import inspect
import pathlib
import sys
from types import CodeType, FrameType
from typing import Any

import jax

import hexa_jax
from hexa_jax.cli.command import parse_command
from hexa_jax.training.factory import make_trainer

PACKAGE = pathlib.Path(hexa_jax.__file__).parent
APART = ("models", "data")


class Walk:
    """A profiler that notes which of the package's functions are called, and from which file."""

    def __init__(self) -> None:
        self.functions: dict[CodeType, int] = {}
        self.turns: set[tuple[CodeType, CodeType]] = set()
        self._stack: list[CodeType] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(f"{PACKAGE}/"):
            return
        if event == "call":
            if code not in self.functions:
                self.functions[code] = len(inspect.getsourcelines(code)[0])
            if self._stack and self._stack[-1].co_filename != code.co_filename:
                self.turns.add((self._stack[-1], code))
            self._stack.append(code)
        elif event == "return" and self._stack:
            self._stack.pop()


def outermost(functions: dict[CodeType, int]) -> dict[CodeType, int]:
    """Without functions that stand inside of others: their lines are part of those."""

    def inside(code: CodeType) -> bool:
        return any(
            other is not code
            and other.co_filename == code.co_filename
            and other.co_firstlineno <= code.co_firstlineno < other.co_firstlineno + lines
            for other, lines in functions.items()
        )

    return {code: lines for code, lines in functions.items() if not inside(code)}


def apart(code: CodeType) -> bool:
    """Whether a function belongs to the network or the augmentation."""
    return pathlib.Path(code.co_filename).relative_to(PACKAGE).parts[0] in APART


def main(argv: list[str]) -> None:
    """Trace a step and print the walk."""
    listed = "--list" in argv
    config = parse_command(
        [word for word in argv if word != "--list"] + ["--workdir=unused"]
    ).config
    trainer = make_trainer(config, 8 * config.batch_size, jax.devices()[:1])
    shapes = trainer.state_shapes(), trainer.batch_shapes(), None
    walk = Walk()
    with jax.set_mesh(trainer.mesh):
        sys.setprofile(walk)
        jax.make_jaxpr(trainer.train_step)(*shapes)
        sys.setprofile(None)
    functions = outermost(walk.functions)
    for name, chosen in (
        ("step, objective, method and view", {c: n for c, n in functions.items() if not apart(c)}),
        ("network and augmentation", {c: n for c, n in functions.items() if apart(c)}),
    ):
        files = {code.co_filename for code in chosen}
        turns = sum(apart(code) == apart(next(iter(chosen))) for _, code in walk.turns)
        print(
            f"{name}: {len(files)} files, {len(chosen)} functions, {sum(chosen.values())} lines, "
            f"{turns} turns"
        )
        for code, lines in chosen.items() if listed else ():
            path = pathlib.Path(code.co_filename).relative_to(PACKAGE.parent)
            print(f"  {path}:{code.co_firstlineno} {code.co_qualname} {lines}")


if __name__ == "__main__":
    main(sys.argv)
