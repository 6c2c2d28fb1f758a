"""The argparse of small command lines: a mistake is an exception of theirs in one line, not a usage page and an exit."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Of `python -m MODULE`: words in full, and help is left to the module's docstring.

    Args:
        module: in messages, such as hexa_jax.export.
        mistake: what is raised.
    """

    def __init__(self, module: str, mistake: type[Exception]):
        super().__init__(add_help=False, allow_abbrev=False)
        self._module, self._mistake = module, mistake

    def error(self, message: str) -> NoReturn:
        """Raises the mistake."""
        raise self._mistake(f"{message}; see python -m {self._module} --help")
