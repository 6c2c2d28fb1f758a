"""Mistakes in a config."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

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


@contextlib.contextmanager
def as_config_error(prefix: str = "") -> Iterator[None]:
    """Raise ConfigError in place of a ValueError that a class raises about its own fields.

    Args:
        prefix: put before the class's message, such as "config.".
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def make_from_block(kind: Callable[..., T], name: str, block: Mapping[str, Any]) -> T:
    """Return kind(**block) for the settings `config.NAME`.

    Raises:
        ConfigError: a setting has a value that cannot work, or the block lacks one or has one too
            many.
    """
    try:
        with as_config_error("config."):
            return kind(**block)
    except TypeError as error:
        raise ConfigError(f"config.{name}: {error}") from None
