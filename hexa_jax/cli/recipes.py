"""List the recipes, one line each: what --recipe and --config take.

hexa recipes [WORD]

WORD    only recipes whose name or line holds it

Arguments of a recipe follow a colon, as in deepcluster_v2:epochs=800; its file says which there
are.
"""

import sys

from hexa_jax.core.recipes import FOLDER, recipe_names, summary


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    if len(argv) > 1 or any(word.startswith("-") for word in argv):
        print(f"hexa recipes: unexpected {argv[-1]!r}; see hexa recipes --help", file=sys.stderr)
        return 2
    lines = {name: summary(name) for name in recipe_names()}
    shown = {
        name: line
        for name, line in lines.items()
        if not argv or argv[0].lower() in f"{name} {line}".lower()
    }
    if not shown:
        print(f"hexa recipes: no recipe mentions {argv[0]!r}", file=sys.stderr)
        return 2
    width = max(map(len, shown))
    for name, line in shown.items():
        print(f"{name:{width}}  {line}")
    print(f"\nfiles: {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
