"""What the commands of `hexa` share: how their words are read, and what an IMAGES argument means."""

import os
import re
from collections.abc import Sequence

from hexa_jax.core.arguments import Parser


class Mistake(ValueError):
    """A mistake in the words of a command; the message is one line."""


def parser(command: str) -> Parser:
    """Return the parser of `hexa COMMAND`, which raises Mistake."""
    return Parser(f"hexa_jax.cli.{command}", Mistake)


def only_settings(words: Sequence[str], command: str) -> list[str]:
    """Return the words that a command's options left over, all of them --config.key=value.

    Raises:
        Mistake: another word.
    """
    for word in words:
        if not re.match(r"--?(no)?config\.", word):
            what = "unknown option" if word.startswith("-") else "unexpected word"
            raise Mistake(f"{what} {word!r}; see hexa {command} --help (settings are given as --config.key=value)")
    return list(words)


def source_of(images: Sequence[str]) -> str:
    """Return the config's name of what IMAGES arguments mean.

    Args:
        images: folders, or one source such as arrays:FILE.npz or tfds:NAME:SPLIT. Paths are made
            absolute, so that the run can be opened from any folder later.

    Raises:
        Mistake: several sources.
    """
    if len(images) == 1 and (re.match(r"[a-z_]+:", images[0]) or images[0] == "shapes"):
        kind, _, rest = images[0].partition(":")
        plain = kind in ("folder", "arrays") and "://" not in rest
        return f"{kind}:{_absolute(rest)}" if plain else images[0]
    named = next((text for text in images if re.match(r"[a-z_]+:", text)), None)
    if named:
        raise Mistake(f"{named} cannot be combined with others: give folders, or one source")
    return "folder:" + ",".join(map(_absolute, images))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
