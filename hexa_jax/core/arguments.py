"""argparse for small command lines: a mistake is an exception in one line."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Parser of `python -m MODULE` or `hexa COMMAND`; help is the module's docstring.

    Args:
        module: in messages, such as hexa_jax.export; one of hexa_jax.cli is called as `hexa` calls
            it.
        mistake: what is raised.
    """

    def __init__(self, module: str, mistake: type[Exception]):
        super().__init__(add_help=False, allow_abbrev=False)
        command = module.removeprefix("hexa_jax.cli.")
        self._program = f"hexa {command}" if command != module else f"python -m {module}"
        self._mistake = mistake

    def error(self, message: str) -> NoReturn:
        """Raises the mistake."""
        raise self._mistake(f"{message}; see {self._program} --help")
