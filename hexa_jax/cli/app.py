"""Pre-train an image backbone on your own images, and use it.

hexa pretrain IMAGES --workdir=W     chooses all settings from the images and the device
hexa pretrain IMAGES --dry-run       shows them, and the time that they take, and stops
hexa COMMAND --help                  what a command takes

"""

import difflib
import importlib
import sys
from typing import NamedTuple

from hexa_jax.core.compiled import keep_compiled_programs


class Command(NamedTuple):
    """A command: the module with its `main(argv) -> exit code`, and a line of help."""

    module: str
    summary: str


COMMANDS = {
    "pretrain": Command("hexa_jax.cli.pretrain", "pre-train a backbone on a folder of images"),
    "embed": Command(
        "hexa_jax.cli.embed", "write one row per image: embedding, cluster, nearest neighbors"
    ),
    "explore": Command("hexa_jax.cli.explore", "write one page to look through a collection"),
    "evaluate": Command(
        "hexa_jax.cli.evaluate", "measure a backbone: kNN, linear probe, transfer and others"
    ),
    "export": Command("hexa_jax.cli.export", "write the weights for other libraries"),
    "report": Command(
        "hexa_jax.cli.report", "write the report of a run, or of several on one page"
    ),
    "recipes": Command("hexa_jax.cli.recipes", "list the recipes, one line each"),
    "doctor": Command(
        "hexa_jax.cli.doctor", "show devices and versions, and what is wrong with them"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        argv: the words after `hexa`; by default those that the process was started with.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    name, *rest = words
    if name == "--version":
        import hexa_jax

        print(f"hexa_jax {hexa_jax.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(
            f"hexa: unknown command {name!r}{hint} (hexa --help lists the commands)",
            file=sys.stderr,
        )
        return 2
    keep_compiled_programs()
    return importlib.import_module(COMMANDS[name].module).main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"    hexa {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return f"{__doc__.strip()}\n\n" + "\n".join(lines) + "\n\nhexa --version prints the version."
