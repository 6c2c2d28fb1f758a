"""Write the weights of a run for other libraries.

hexa export W --format=FORMAT --output=PATH

W           workdir of a pre-training run, or a weights file
--format    python -m hexa_jax.export --help says what each is
--output    the file or folder
"""

import sys

from hexa_jax import export


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\n{export.__doc__}")
        return 0
    if not argv or argv[0].startswith("-"):
        print(
            "hexa export: W is missing: a workdir or a weights file; see hexa export --help",
            file=sys.stderr,
        )
        return 2
    return export.main([f"--checkpoint={argv[0]}", *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
