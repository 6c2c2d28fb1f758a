"""Pre-train a backbone on images, with settings chosen from them and the device.

hexa pretrain IMAGES [--workdir=W] [--recipe=NAME] [--init=WEIGHTS] [--epochs=N] [--labelled=FOLDER]
              [--domain=KIND] [--dry-run] [--extend] [--config.key=value ...]

IMAGES      a folder, several folders, or a source such as tar:GLOB, list:FILE.txt or tfds:NAME:SPLIT
--workdir   the folder of the run; by default runs/ and the name of the folder of images. Starting
            again in it goes on where the run was, with the settings of its first start
--recipe    a recipe by name (hexa recipes lists them), changed only where it could not work
--init      weights to start from: a workdir, a weights file, timm:NAME, torchvision:NAME or hf:REPO
--epochs    how often the images are gone through
--labelled  a folder with a folder of images per class, to measure kNN accuracy with while training;
            folders in IMAGES are then no classes
--domain    what the images show, for the augmentation: natural, aerial, microscopy or grey
--dry-run   show the choices and the time that they take, and stop
--extend    allow more epochs than the run in the workdir had

Every setting can be given as --config.key=value, and goes before what would be chosen.
"""

import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hexa_jax import main as command
from hexa_jax.cli.choices import (
    FEW_IMAGES,
    Choice,
    DataFacts,
    DeviceFacts,
    Estimate,
    Wishes,
    choose,
    choose_recipe,
)
from hexa_jax.cli.command import parse_command
from hexa_jax.cli.facts import data_facts, device_facts, network_of_weights
from hexa_jax.cli.guard import guarded
from hexa_jax.cli.words import Mistake, only_settings, parser, source_of
from hexa_jax.core.console import log
from hexa_jax.core.recipes import recipe_file
from hexa_jax.data.open import open_training_source
from hexa_jax.data.sources import SOURCES
from hexa_jax.parallel.processes import TPU_VM, launcher
from hexa_jax.storage import gcs
from hexa_jax.storage.workdir import flatten
from hexa_jax.training.memory import in_words

ANY_RECIPE = "photographs"  # whose keys are those of all recipes
LONG = 4 * 3600  # seconds on a CPU above which another way is named
SHOWN = 3  # unreadable images that are named


class Plan(NamedTuple):
    """A run that is ready to start.

    Attributes:
        recipe: its name with arguments.
        settings: by dotted key, what the run has that its recipe has not.
    """

    recipe: str
    settings: dict[str, Any]

    def words(self, workdir: str, extra: Sequence[str]) -> list[str]:
        """Return the words of `python -m hexa_jax.main`; `extra` come last and win."""
        given = [f"--config.{key}={_text(value)}" for key, value in self.settings.items()]
        return [f"--config={self.recipe}", f"--workdir={workdir}", *given, *extra]


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    return guarded("pretrain", lambda: _run(argv))


def _run(argv: list[str]) -> int:
    options, settings = _parse(argv)
    source = source_of(options.images)
    workdir = options.workdir or os.path.join("runs", _name_of(source))
    fixed = _fixed(options, source, settings)
    plan = None
    if options.recipe is None and not options.dry_run:
        plan = _begun(workdir)
    if plan is None:
        plan = _plan(options, fixed, dry_run=options.dry_run)
    else:
        log(f"{workdir} holds a run that began: going on with its settings")
    words = plan.words(workdir, [*fixed, *(["--extend"] if options.extend else [])])
    if options.dry_run:
        print(f"\nthe same without choices:\n  python -m hexa_jax.main {shlex.join(words)}")
        return 0
    return command.main(["hexa", *words])


def _parse(argv: list[str]) -> tuple[Any, list[str]]:
    options = parser("pretrain")
    options.add_argument("images", nargs="+", metavar="IMAGES")
    options.add_argument("--workdir")
    options.add_argument("--recipe")
    options.add_argument("--init")
    options.add_argument("--epochs", type=int)
    options.add_argument("--labelled", "--labeled", dest="labelled")
    options.add_argument("--domain")
    options.add_argument("--dry-run", "--dry_run", dest="dry_run", action="store_true")
    options.add_argument("--extend", action="store_true")
    # Settings first: argparse would take what follows one that it does not know for images.
    is_setting = re.compile(r"--?(no)?config\.")
    settings = [word for word in argv if is_setting.match(word)]
    known, rest = options.parse_known_intermixed_args(
        [word for word in argv if not is_setting.match(word)]
    )
    only_settings(rest, "pretrain")
    if (started_by := launcher(os.environ)) and started_by != TPU_VM:
        raise Mistake(
            f"{started_by} starts several processes, whose choices may differ: run hexa pretrain "
            "--dry-run "
            "once, and start the command that it prints"
        )
    return known, settings


def _fixed(options: Any, source: str, settings: list[str]) -> list[str]:
    """What the user has decided, as words --config.key=value, later ones winning."""
    words = [f"--config.data.source={source}"]
    if options.init:
        words.append(f"--config.model.init={_init(options.init)}")
    if options.epochs is not None:
        words.append(f"--config.epochs={options.epochs}")
    if options.domain:
        words.append(f"--config.data.domain={options.domain}")
    if options.labelled:
        words += [
            "--config.data.labels=none",
            f"--config.knn.source={source_of([options.labelled])}",
        ]
    return words + settings


def _plan(options: Any, fixed: list[str], dry_run: bool) -> Plan:
    """Choose, and print what was chosen as a table."""
    recipe = options.recipe or ""
    asked = _config(recipe or ANY_RECIPE, fixed)
    source = open_training_source(asked)
    data, problems = data_facts(source)
    device = device_facts(asked.runtime.num_devices)
    flat = flatten(asked.to_dict())
    keys = [re.match(r"--?(?:no)?config\.([^=]+)", word) for word in fixed]
    wishes = Wishes(
        recipe=recipe,
        settings={match[1]: _tuples(flat[match[1]]) for match in keys if match},
        **(network_of_weights(options.init) if options.init else {}),
    )
    name, reason = choose_recipe(data, device, wishes)
    recipe_settings = {
        key: _tuples(value) for key, value in flatten(_config(name, []).to_dict()).items()
    }
    choices, time = choose(data, device, wishes, recipe_settings)
    _print_table(data, device, problems, [Choice("recipe", name, reason), *choices], time)
    if device.platform == "cpu" and time.total > LONG:
        log(
            "an accelerator would be faster by far; --config.data.limit=N trains on N of the images"
        )
    if data.images < FEW_IMAGES and not options.init:
        log(
            f"{data.images} images are few to learn from scratch: --init=torchvision:resnet18 "
            "would start from weights "
            "of ImageNet"
        )
    return Plan(
        name, {choice.key: choice.value for choice in choices if choice.key not in wishes.settings}
    )


def _begun(workdir: str) -> Plan | None:
    """The plan of the run in a workdir that has made a step, None where there is none."""
    folder = gcs.path_of(workdir)
    saved = folder / "config.json"
    try:
        steps = [path.name for path in (folder / "checkpoints").iterdir()] if saved.exists() else []
        if not any(
            name.startswith("step_") and not name.startswith("step_00000000") for name in steps
        ):
            return None
        before = flatten(json.loads(saved.read_text()))
    except (OSError, ValueError, AttributeError):
        return None  # the run itself says what is wrong with the folder
    if before.get("task") != "pretrain":
        return None
    now = flatten(_config(ANY_RECIPE, []).to_dict())
    differ = {key: _tuples(before[key]) for key in now if key in before and before[key] != now[key]}
    return Plan(ANY_RECIPE, differ)


def _config(recipe: str, words: list[str]) -> ConfigDict:
    """A recipe's config with settings; raises ConfigError for what is wrong with either."""
    recipe_file(recipe)
    return parse_command(["hexa", f"--config={recipe}", "--workdir=unused", *words]).config


def _init(name: str) -> str:
    """Make a path to weights absolute, so that the run can be resumed from any folder."""
    path = pathlib.Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _name_of(source: str) -> str:
    """A name for the run on some images."""
    kind, _, rest = source.partition(":")
    stem = (
        pathlib.PurePath(rest.split(",")[0].rstrip("/")).name
        if kind in SOURCES and SOURCES[kind].paths
        else source
    )
    return re.sub(r"[^\w.-]+", "_", pathlib.PurePath(stem).stem or kind)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


# ---- The table -----------------------------------------------------------------------------------


def _print_table(
    data: DataFacts, device: DeviceFacts, problems: list[str], choices: list[Choice], time: Estimate
) -> None:
    labels = f"{data.num_classes} classes" if data.num_classes else "no labels"
    log(f"images   {data.images}, short side about {data.short_side} pixels, {labels}")
    for problem in problems[:SHOWN]:
        log(f"         unreadable: {problem}")
    if problems:
        log(
            f"         {data.unreadable} of {data.sampled} looked at cannot be read; such images "
            "are left out"
        )
    room = f", {in_words(device.memory)} of memory" if device.memory else ""
    what = "CPU" if device.platform == "cpu" else f"{device.count} x {device.kind}"
    log(f"device   {what}, {device.cores} cores{room}\n")
    rows = [(choice.key, _text(choice.value), choice.reason) for choice in choices]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, reason in [("setting", "chosen", "because"), *rows]:
        log(f"{key:{widths[0]}}  {value:{widths[1]}}  {reason}".rstrip())
    log(
        f"\nexpected time, by arithmetic: {duration(time.total)} in all, {duration(time.start)} to "
        "start and "
        f"{duration(time.epoch)} an epoch, most of it for {time.limit}"
    )


def duration(seconds: float) -> str:
    """Return "40 s", "12 min", "3 h 20 min" or "5 days"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{round(hours / 24)} days"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
