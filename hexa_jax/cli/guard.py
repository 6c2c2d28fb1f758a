"""Turn what goes wrong in a command of `hexa` into one line and an exit code."""

import sys
from collections.abc import Callable

import jax

from hexa_jax.cli.words import Mistake
from hexa_jax.core import console
from hexa_jax.core.recipes import RecipeError
from hexa_jax.main import USER_ERRORS
from hexa_jax.training.memory import is_out_of_memory


def guarded(command: str, work: Callable[[], int]) -> int:
    """Run the work of `hexa COMMAND`; return its exit code, 2 after a user's mistake."""
    try:
        return work()
    except (Mistake, RecipeError, *USER_ERRORS) as error:
        return _stop(command, error, 2)
    except OSError as error:
        return _stop(
            command, f"{error.filename or 'input or output'}: {error.strerror or error}", 2
        )
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _stop(command, f"out of memory ({str(error).splitlines()[0][:200]})", 1)
    except KeyboardInterrupt:
        return _stop(command, "interrupted", 130)


def _stop(command: str, message: object, code: int) -> int:
    print(f"hexa {command}: {console.with_aliases(str(message))}", file=sys.stderr, flush=True)
    return code
