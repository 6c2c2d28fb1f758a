"""Command line: `python -m hexa_jax.experiments.health_ranking WORKDIR [WORKDIR ...]`.

Tells how measures without labels rank finished runs: Spearman's correlation of each measure of
`hexa_jax.evals.health` with an accuracy, over the runs. 1: the measure puts the runs into the same
order as the accuracy does; 0: it says nothing; -1: the reverse order.

--target=knn_accuracy  the accuracy, a number of result.json (linear_accuracy, ...)
--measure              measure health at the newest checkpoint of runs that logged none; what is
                       found is kept in --output beside the table, so a second start goes on
--images=1024          for --measure: images of the sample
--output=FILE.md       write the table there, too

Exit codes: 0 done, 2 a mistake in the command.
"""

import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import scipy.stats
from ml_collections import ConfigDict

from hexa_jax.checkpoint.checkpointer import CheckpointError
from hexa_jax.core.arguments import Parser
from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import DataError
from hexa_jax.evals.health import HIGHER_IS_BETTER
from hexa_jax.report.record import read_record
from hexa_jax.storage.workdir import Finished, WorkdirError
from hexa_jax.training.load_run import load_run
from hexa_jax.training.online_health import make_sample

FEWEST = 4  # runs below which a correlation says nothing


class Ranking(NamedTuple):
    """How a measure ranks runs.

    Attributes:
        name: of the measure.
        correlation: Spearman's, with the sign turned where lower is better; NaN for equal values.
        p_value: two-sided, of no correlation.
        runs: that have the measure.
    """

    name: str
    correlation: float
    p_value: float
    runs: int


def rank(measures: Sequence[Mapping[str, float]], accuracies: Sequence[float]) -> list[Ranking]:
    """Return a ranking for each measure that at least FEWEST runs have.

    Args:
        measures: of each run, by name.
        accuracies: of each run.
    """
    found = []
    for name, higher in HIGHER_IS_BETTER.items():
        pairs = [
            (own[name] if higher else -own[name], accuracy)
            for own, accuracy in zip(measures, accuracies, strict=True)
            if name in own
        ]
        if len(pairs) < FEWEST:
            continue
        values, targets = zip(*pairs, strict=True)
        if len(set(values)) == 1 or len(set(targets)) == 1:
            found.append(Ranking(name, math.nan, math.nan, len(pairs)))
            continue
        result = scipy.stats.spearmanr(values, targets)
        found.append(Ranking(name, float(result.statistic), float(result.pvalue), len(pairs)))
    return found


def table(rankings: Sequence[Ranking], target: str) -> str:
    """Return the rankings in Markdown."""
    lines = [f"| measure | Spearman with {target} | p | runs |", "|---|---|---|---|"]
    for ranking in rankings:
        same = math.isnan(ranking.correlation)
        numbers = (
            "equal values | -" if same else f"{ranking.correlation:+.2f} | {ranking.p_value:.2g}"
        )
        lines.append(f"| {ranking.name} | {numbers} | {ranking.runs} |")
    return "\n".join(lines) + "\n"


def measure_run(workdir: pathlib.Path, images: int) -> dict[str, float]:
    """Return the measures of a run at its newest checkpoint, by the statistics saved with it."""
    run = load_run(workdir)
    config = ConfigDict(run.config.to_dict())
    config.health = ConfigDict({"every_epochs": 1, "images": images})
    sample = make_sample(config, run.source, run.trainer)
    if sample is None:
        return {}
    with jax.set_mesh(run.trainer.mesh):
        return sample.measure(run.state)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    parser = Parser("hexa_jax.experiments.health_ranking", WorkdirError)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--target", default="knn_accuracy")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--output", type=pathlib.Path)
    try:
        known = parser.parse_args(argv)
        if known.measure and known.output is None:
            raise WorkdirError(
                "--measure takes long: give --output=FILE.md, where it keeps what it finds"
            )
        text = _table_of(known.workdirs, known.target, known.images, known.measure, known.output)
        if known.output:
            known.output.write_text(text)
    except (WorkdirError, CheckpointError, ConfigError, DataError) as error:
        print(f"hexa_jax.experiments.health_ranking: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        print(f"hexa_jax.experiments.health_ranking: {reason}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _table_of(
    workdirs: Sequence[pathlib.Path],
    target: str,
    images: int,
    measure: bool,
    output: pathlib.Path | None,
) -> str:
    """The table; runs without the target are left out and named."""
    store = (
        Finished(output.with_suffix(".json"), {"images": images}) if measure and output else None
    )
    measures, accuracies = [], []
    for workdir in workdirs:
        record = read_record(workdir)
        if target not in record.results:
            log(f"{workdir} is left out: its result has no {target}")
            continue
        own = {n: value for n in HIGHER_IS_BETTER if (value := record.last(n)) is not None}
        if not own and store is not None:
            own = store.get(str(workdir.resolve()), functools.partial(measure_run, workdir, images))
        if not own:
            log(f"{workdir} is left out: it logged no health; --measure measures it")
            continue
        measures.append(own)
        accuracies.append(record.results[target])
    if len(measures) < FEWEST:
        raise WorkdirError(
            f"{len(measures)} runs with health and {target}: at least {FEWEST} are needed"
        )
    return table(rank(measures, accuracies), target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
