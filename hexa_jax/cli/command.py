"""Parse the command line; each mistake is one line that names what would work."""

import re
import traceback
from collections.abc import Iterable
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from hexa_jax.core.errors import ConfigError
from hexa_jax.core.recipes import RecipeError, recipe_file
from hexa_jax.data.domains import set_domain
from hexa_jax.evals.tasks.image_size import size_after_change
from hexa_jax.parallel.processes import Placement
from hexa_jax.storage.workdir import closest, flatten

HELP = "see python -m hexa_jax.main --help"
# What other programs call a setting, by the last part of the key that was given.
USUAL_NAMES = {
    **dict.fromkeys(("checkpoint", "pretrained", "weights", "init"), "model.init"),
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.learning_rate"),
    **dict.fromkeys(("folder", "dir", "path", "dataset"), "data.source"),
    **dict.fromkeys(("image_size", "size", "resolution"), "data.crop_size"),
    **dict.fromkeys(("gpus", "devices"), "runtime.num_devices"),
}


class Command(NamedTuple):
    """What the user asked for.

    Attributes:
        config: locked: its keys are those of the config file.
        workdir: folder of the run.
        extend: whether the run may get more epochs than it had.
        place: of this process among others.
        origin: for the record: `argv`, the `recipe` (config file), and what was `changed` in it,
            {key: [was, is]}.
    """

    config: ConfigDict
    workdir: str
    extend: bool
    place: Placement
    origin: dict[str, Any]


def parse_command(argv: list[str]) -> Command:
    """The command in argv, whose first entry is the program's name.

    Raises:
        ConfigError: no config or workdir, unknown flag or config key, value of a wrong type, config
            file that fails.
    """
    argv = _with_recipe_file(argv)
    defaults = _load_config(argv)
    known = flatten(defaults.to_dict())
    overrides = [
        match[1] for match in (re.match(r"--?(?:no)?config\.([^=]+)", a) for a in argv[1:]) if match
    ]
    for key in overrides:
        if key not in known:
            inside = [name for name in known if name.startswith(f"{key}.")]
            if inside:
                raise ConfigError(f"config key {key!r} is a group of settings: {', '.join(inside)}")
            hint = _hint(key, known)
            raise ConfigError(f"unknown config key {key!r}{hint}")
    values = _flags(argv)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(
            f"unknown flag --{error.flagname}{_meant(error.flagname, list(values), list(known))}"
        ) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_wrong_value(_one_line(error), known)) from None
    if len(rest) > 1:
        raise ConfigError(
            f"unexpected argument {rest[1]!r}: settings are given as --config.key=value"
        )
    if values.workdir is None:
        raise ConfigError(f"--workdir is missing: {HELP}")
    _check_tuples(known, flatten(values.config.to_dict()), overrides)
    data = values.config.get("data", ConfigDict())
    if data.get("domain"):
        set_domain(values.config, data.domain, keep=overrides)
    if data.get("normalization") == "measured" and (
        given := {"data.pixel_mean", "data.pixel_std"} & set(overrides)
    ):
        raise ConfigError(
            f"--config.{min(given)} is given, and data.normalization=measured would measure it: "
            "use one"
        )
    if "data.source" in overrides and "data.eval_source" not in overrides:
        _leave_out_foreign_images(values.config.data, defaults.data)
    if "data.crop_size" in overrides and not {"knn.resize", "knn.crop"} & set(overrides):
        _resize_knn_images(values.config, defaults)
    place = Placement(values.coordinator, values.num_processes, values.process_id)
    now = flatten(values.config.to_dict())
    changed = {key: [known[key], value] for key, value in now.items() if known.get(key) != value}
    origin = {"argv": argv, "recipe": _config_path(argv, arguments=True), "changed": changed}
    return Command(values.config, values.workdir, values.extend, place, origin)


def _hint(key: str, known: dict[str, Any]) -> str:
    """Return what may have been meant by an unknown config key."""
    usual = USUAL_NAMES.get(key.rpartition(".")[2])
    if usual in known:
        return f"; did you mean {usual!r}?"
    return closest(key, list(known)) or "; configs/common.py lists them all"


def _with_recipe_file(argv: list[str]) -> list[str]:
    """Return the words with the file of a recipe in place of its name."""
    replaced = list(argv)
    for position, word in enumerate(argv):
        match = re.fullmatch(r"(--?config)(?:=(.+))?", word)
        if not match:
            continue
        try:
            if match[2] is not None:
                replaced[position] = f"{match[1]}={recipe_file(match[2])}"
            elif position + 1 < len(argv):
                replaced[position + 1] = recipe_file(argv[position + 1])
        except RecipeError as error:
            raise ConfigError(str(error)) from None
    return replaced


def _meant(name: str, flag_names: list[str], keys: list[str]) -> str:
    """Return a hint for an unknown flag: the setting of that name, or else the nearest flag."""
    settings = [key for key in keys if name in (key, key.rpartition(".")[2])]
    if settings:
        return f"; did you mean {' or '.join(f'--config.{key}' for key in settings[:3])}?"
    return closest(name, flag_names)


def _wrong_value(message: str, known: dict) -> str:
    """Return what absl says of a value of a wrong type in words for a person."""
    match = re.match(r"flag --config\.([^=]+)=(.*?): ", message)
    kinds = {bool: "True or False", int: "a whole number", float: "a number"}
    kind = kinds.get(type(known.get(match[1]))) if match else None
    return f"--config.{match[1]}={match[2]}: must be {kind}" if match and kind else message


def _flags(argv: list[str]) -> flags.FlagValues:
    """Fresh flags for each call; the config's own read their overrides from argv."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "config file", lock_config=True, flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_bool(
        "extend", False, "allow more epochs than the run in the workdir had", flag_values=values
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of the run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process", flag_values=values)
    return values


def _load_config(argv: list[str]) -> ConfigDict:
    """The config file without overrides."""
    values = _flags(argv[:1])
    try:
        values(argv, known_only=True)
        config = values.config
        if not isinstance(config, ConfigDict) and config is not None:
            config.to_dict()  # raises what was wrong with the file
    except flags.Error as error:
        *above, last = str(error).strip().splitlines()
        # A ValueError of the file's own comes with its traceback.
        raise ConfigError(
            last.removeprefix("ValueError: ") if above else _one_line(error)
        ) from None
    except OSError as error:
        missing = "No such file" in str(error) or not _config_path(argv)
        reason = (
            "does not exist"
            if missing
            else f"cannot be read: {_one_line(error).split('to load: ')[-1]}"
        )
        raise ConfigError(f"config file {_config_path(argv)!r} {reason}") from None
    except Exception as error:  # whatever the file itself does wrong
        line = next(
            (
                f":{f.lineno}"
                for f in reversed(traceback.extract_tb(error.__traceback__))
                if _is(f, argv)
            ),
            "",
        )
        problem = f"{type(error).__name__}: {_one_line(error)}"
        raise ConfigError(f"config file {_config_path(argv)}{line} fails: {problem}") from None
    if config is None:
        raise ConfigError(f"--config is missing: {HELP}")
    return config


def _config_path(argv: list[str], arguments: bool = False) -> str:
    """What --config names, with or without the arguments behind the colon."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            path = following if match[1] is None else match[1]
            return path if arguments else re.sub(r"(\.py):.*", r"\1", path)
    return ""


def _is(frame: traceback.FrameSummary, argv: list[str]) -> bool:
    return frame.filename.endswith(_config_path(argv))


def _check_tuples(before: dict, now: dict, overrides: list[str]) -> None:
    """absl checks the type of a number, but not of what a tuple holds."""
    for key in overrides:
        if isinstance(before[key], list):
            if before[key] and all(isinstance(value, str) for value in before[key]):
                if not all(isinstance(value, str) for value in now[key]):
                    found = ", ".join(map(repr, now[key]))
                    example = f'("{before[key][0]}",)'
                    raise ConfigError(
                        f"--config.{key} takes a tuple of texts, such as '{example}', not ({found})"
                    )
                continue
            old, new = _numbers(before[key]), _numbers(now[key])
            kinds = (int, float) if any(isinstance(value, float) for value in old) else (int,)
            pairs = isinstance(next(iter(before[key]), None), list)
            if not all(type(value) in kinds for value in new) or pairs != any(
                isinstance(v, list) for v in now[key]
            ):
                found = ", ".join(map(repr, now[key]))
                wanted = ("pairs of " if pairs else "") + (
                    "numbers" if float in kinds else "whole numbers"
                )
                example = "((1, 2),)" if pairs else "(1,)"
                raise ConfigError(
                    f"--config.{key} takes a tuple of {wanted}, such as '{example}', not ({found})"
                )


def _leave_out_foreign_images(data: ConfigDict, recipe: ConfigDict) -> None:
    """Drop the recipe's held-out examples where the training examples are of another data set.

    Somebody's own photographs would otherwise be judged by ImageNet's.
    """
    known = {_data_set(recipe.source), _data_set(recipe.eval_source)}
    if recipe.eval_source and _data_set(data.source) not in known:
        data.eval_source = ""


def _resize_knn_images(config: ConfigDict, recipe: ConfigDict) -> None:
    """Let the run's own kNN see images of a size that suits the given crops, not the recipe's."""
    before, after = (max(c.data.crop_size, default=0) for c in (recipe, config))
    # Crops that are no sizes, and configs of other tasks, are judged later.
    if min(before, after) > 0 and "knn" in config:
        knn = config.knn
        knn.resize, knn.crop = size_after_change((knn.resize, knn.crop), before, after)


def _data_set(source: str) -> str:
    """What a source's splits have in common: tfds:NAME/CONFIG, hf:NAME, shapes, or all of it."""
    kind, _, rest = source.partition(":")
    if kind == "shapes":
        return kind
    return f"{kind}:{rest.partition(':')[0]}" if kind in ("tfds", "hf") else source


def _numbers(values: Iterable[Any]) -> list[Any]:
    """What lists and lists of lists hold."""
    return [
        number for value in values for number in (value if isinstance(value, list) else (value,))
    ]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
