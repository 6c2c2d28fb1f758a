"""Command line: `hexa report WORKDIR [WORKDIR ...] [--output=comparison.html]`.

The page of a run, or one page about several: settings that differ, results, curves over each other.
"""

from hexa_jax.report import __main__ as report


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    return report.main(argv)
