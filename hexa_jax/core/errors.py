"""Mistakes in a config."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that says what would."""


def choose(name: str, value: str, table: Mapping[str, T]) -> T:
    """Return table[value].

    Raises:
        ConfigError: the table has no such entry; the message lists those that it has.
    """
    if value not in table:
        choices = ", ".join(sorted(table))
        raise ConfigError(f"config.{name}={value!r} is not known: use one of {choices}")
    return table[value]
