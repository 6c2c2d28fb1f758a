"""Command line: `python -m hexa_jax.report WORKDIR [WORKDIR ...] [--output=comparison.html]`.

Writes one page about several pre-training runs: their settings that differ, results, and curves
over each other. A run also writes a page of its own with pictures, WORKDIR/report/index.html, after
each epoch; with one workdir and no --output the command only says where that is.

Exit codes: 0 the page was written, 2 a mistake in the command.
"""

import pathlib
import sys

from hexa_jax.core.arguments import Parser
from hexa_jax.report.comparison import write_comparison
from hexa_jax.storage.workdir import WorkdirError


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    parser = Parser("hexa_jax.report", WorkdirError)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path)
    try:
        known = parser.parse_args(argv)
        own = known.workdirs[0] / "report" / "index.html"
        if len(known.workdirs) == 1 and known.output is None and own.is_file():
            print(own)
            return 0
        output = known.output or pathlib.Path("comparison.html")
        write_comparison(known.workdirs, output)
    except WorkdirError as error:
        print(f"hexa_jax.report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        print(f"hexa_jax.report: {reason}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
