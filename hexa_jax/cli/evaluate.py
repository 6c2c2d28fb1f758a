"""Measure a backbone on labeled images.

hexa evaluate W TASK [--workdir=DIR] [--data=IMAGES] [--held_out=IMAGES] [--config.key=value ...]

W           workdir of a pre-training run, a weights file, or random
TASK        a recipe of evaluations: knn, linear, transfer, features, robustness, linear_imagenet and
            others (hexa recipes eval/ lists them); arguments follow a colon, as in
            semi_imagenet:percent=10
--workdir   where results go; by default W/TASK, where W is a workdir
--data      labeled images, a folder with a folder per class; by default those of the pre-training run
--held_out  images to test on; without any, kNN leaves each image out in turn

Every setting of the recipe can be given as --config.key=value.
"""

import json
import pathlib
import sys

from hexa_jax import main as command
from hexa_jax.cli.words import Mistake, only_settings, parser, source_of
from hexa_jax.core.console import log
from hexa_jax.core.recipes import RecipeError, recipe_file


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    try:
        words = evaluation(argv)
    except (Mistake, RecipeError) as error:
        print(f"hexa evaluate: {error}", file=sys.stderr)
        return 2
    return command.main(["hexa", *words])


def evaluation(argv: list[str]) -> list[str]:
    """Return the words of `python -m hexa_jax.main` for an evaluation.

    Raises:
        Mistake: an option that is missing or unknown.
        RecipeError: an unknown task.
    """
    options = parser("evaluate")
    options.add_argument("checkpoint", metavar="W")
    options.add_argument("task", metavar="TASK")
    options.add_argument("--workdir")
    options.add_argument("--data")
    options.add_argument("--held_out")
    known, rest = options.parse_known_args(argv)
    settings = only_settings(rest, "evaluate")
    task = known.task if "/" in known.task or ".py" in known.task else f"eval/{known.task}"
    name = pathlib.PurePath(task.partition(":")[0]).stem
    words = [f"--config={recipe_file(task)}", f"--config.checkpoint={known.checkpoint}"]
    workdir = known.workdir
    if workdir is None:
        if not (pathlib.Path(known.checkpoint).expanduser() / "config.json").is_file():
            raise Mistake(
                f"--workdir is missing: a folder for the results, as {known.checkpoint} is no "
                "workdir"
            )
        workdir = str(pathlib.Path(known.checkpoint) / name)
    words.append(f"--workdir={workdir}")
    if known.data:
        words.append(f"--config.data.source={source_of([known.data])}")
    if known.held_out:
        words.append(f"--config.data.eval_source={source_of([known.held_out])}")
    elif name == "knn" and (known.data or not _has_held_out(known.checkpoint)):
        words.append("--config.leave_one_out=True")  # settings of the user come later, and win
    log(f"results go to {workdir}")
    return words + settings


def _has_held_out(checkpoint: str) -> bool:
    """Whether the run whose weights are judged had held-out examples of its own."""
    try:
        config = json.loads((pathlib.Path(checkpoint).expanduser() / "config.json").read_text())
        return bool(config["data"]["eval_source"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
