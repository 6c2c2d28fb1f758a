"""What the commands of `hexa` share: reading words and an IMAGES argument."""

import glob
import os
import re
from collections.abc import Sequence

from hexa_jax.core.arguments import Parser
from hexa_jax.data.sources import SOURCES, absolute_spec
from hexa_jax.data.sources.registry import unknown_source
from hexa_jax.storage.gcs import is_remote


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
            raise Mistake(
                f"{what} {word!r}; see hexa {command} --help (settings are given as "
                "--config.key=value)"
            )
    return list(words)


def source_of(images: Sequence[str]) -> str:
    """Return the config's name of what IMAGES arguments mean.

    Args:
        images: folders, or one source such as tar:GLOB or tfds:NAME:SPLIT, or a file whose ending
            tells the kind. Paths are made absolute, so that the run can be opened from any folder
            later.

    Raises:
        Mistake: several sources, or one of no known kind.
    """
    for text in images:
        kind = re.match(r"([A-Za-z_]\w*):", text)
        if kind and kind[1] not in SOURCES and not _is_there(text):
            raise Mistake(unknown_source(text))
    if len(images) > 1 and (
        named := next((text for text in images if re.match(r"[a-z_]+:", text)), None)
    ):
        raise Mistake(f"{named} cannot be combined with others: give folders, or one source")
    if len(images) > 1:
        return absolute_spec("folder:" + ",".join(images))
    spec = absolute_spec(images[0])
    is_file = os.path.isfile(spec) or glob.has_magic(spec)
    return spec if is_file or re.match(r"[a-z_]+:", spec) or spec in SOURCES else f"folder:{spec}"


def _is_there(path: str) -> bool:
    """Whether a path with a colon is one of a bucket, or of files here."""
    path = os.path.expanduser(path)
    return is_remote(path) or os.path.exists(path) or bool(glob.glob(path, recursive=True))
