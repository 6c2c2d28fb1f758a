"""Command line: `python -m hexa_jax.main --config=configs/hexa_dcluster.py --workdir=DIR [--config.key=value ...]`.

Exit codes: 0 the work was done, 1 the run failed, 2 a mistake in the command or its data, 143 stopped by SIGTERM and saved.
"""

import logging
import sys

import jax
from absl import flags
from ml_collections import config_flags

from hexa_jax.build import ConfigError
from hexa_jax.checkpoint import CheckpointError
from hexa_jax.command import parse_flags
from hexa_jax.data.sources import DataError
from hexa_jax.pretrain import Diverged, Terminated, pretrain
from hexa_jax.workdir import WorkdirError, open_workdir

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "File with a get_config() function, see configs/.", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder of the run; starting again in it resumes.")
flags.DEFINE_bool("extend", False, "Allow more epochs than the run in the workdir had.")

USER_ERRORS = (ConfigError, DataError, WorkdirError, CheckpointError)
TASKS = {"pretrain": pretrain}


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code and prints one line for whatever went wrong."""
    try:
        parse_flags(FLAGS, argv)
        config = FLAGS.config
        if config.task not in TASKS:
            raise ConfigError(f"config.task={config.task!r} is not known: use one of {', '.join(TASKS)}")
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
        if config.precision == "float64":
            jax.config.update("jax_enable_x64", True)
        workdir = open_workdir(FLAGS.workdir, config, extend=FLAGS.extend)
        TASKS[config.task](config, workdir)
    except USER_ERRORS as error:
        return _stop(error, 2)
    except OSError as error:
        return _stop(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    except Diverged as error:
        return _stop(error, 1)
    except Terminated as stopped:
        return _stop(stopped, 143)
    return 0


def _stop(message: object, code: int) -> int:
    print(f"hexa_jax: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
