"""Parsing of the command line: whatever is wrong with it becomes one line that names the nearest thing that would work."""

import re

from absl import flags

from hexa_jax.build import ConfigError
from hexa_jax.workdir import closest, flatten


def parse_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """Fill `values` from argv.

    Raises:
        ConfigError: no config or workdir, unknown flag or config key, value of a wrong type, config file that fails.
    """
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(_unknown(values, error.flagname)) from None
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown(values, _named_key(argv, error))) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_one_line(error)) from None
    except (OSError, ImportError, SyntaxError) as error:
        raise ConfigError(f"cannot read the config file: {_one_line(error)}") from None
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}: settings are given as --config.key=value")
    for name in ("config", "workdir"):
        if values[name].value is None:
            raise ConfigError(f"--{name} is missing: see python -m hexa_jax.main --help")


def _unknown(values: flags.FlagValues, name: str) -> str:
    config = values["config"].value
    if name.startswith("config.") and config is not None:
        key = name.removeprefix("config.")
        return f"unknown config key {key!r}{closest(key, list(flatten(config.to_dict())))}"
    return f"unknown flag --{name}{closest(name, list(values))}"


def _named_key(argv: list[str], error: Exception) -> str:
    """The override that the error is about: the one whose last part the message names, else the first."""
    overrides = [m[1] for m in (re.match(r"--(config\.[^=\s]+)", argument) for argument in argv) if m]
    named = [key for key in overrides if re.search(rf"\b{re.escape(key.split('.')[-1])}\b", str(error))]
    return (named or overrides or [str(error)])[0]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
