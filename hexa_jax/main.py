"""Command line: `python -m hexa_jax.main --config=configs/NAME.py --workdir=DIR ...`.

--config   a file with a get_config() function; configs/common.py lists every key with its meaning
--workdir  the folder of the run, local or gs://BUCKET/FOLDER; starting again in it resumes
--extend   allow more epochs than the run in the workdir had
--coordinator=HOST:PORT --num_processes=N --process_id=I
           for runs over several processes whose launcher is not recognised (srun, mpirun, GKE and
           Cloud TPU pods are)

Exit codes: 0 the work was done, 1 the run failed, 2 a mistake in the command or its data, 130
interrupted, 143 stopped by SIGTERM and saved.
"""

import logging
import os
import pathlib
import sys

import jax

from hexa_jax.checkpoint.checkpointer import CheckpointError
from hexa_jax.cli.command import parse_command
from hexa_jax.core import console
from hexa_jax.core.compiled import keep_compiled_programs
from hexa_jax.core.errors import ConfigError
from hexa_jax.core.preemption import Diverged, Terminated
from hexa_jax.data.pipeline import InputLost
from hexa_jax.data.source import DataError
from hexa_jax.detection.task import detection
from hexa_jax.evals.tasks.features import features
from hexa_jax.evals.tasks.finetune import finetune
from hexa_jax.evals.tasks.knn import knn
from hexa_jax.evals.tasks.linear_features import linear_features
from hexa_jax.evals.tasks.linear_sgd import linear
from hexa_jax.evals.tasks.robustness import robustness
from hexa_jax.evals.tasks.svm import lowshot, svm
from hexa_jax.evals.tasks.transfer import transfer
from hexa_jax.experiments.evaluation_tables import tables
from hexa_jax.models.weights import WeightsError
from hexa_jax.parallel import processes
from hexa_jax.storage.gcs import RemoteError, is_remote
from hexa_jax.storage.workdir import COMMAND, WorkdirError, abandon, held, open_workdir, write_json
from hexa_jax.storage.workdir_sync import local_workdir
from hexa_jax.training.loop import pretrain
from hexa_jax.training.memory import is_out_of_memory, out_of_memory

USER_ERRORS = (
    processes.DistributedError,
    ConfigError,
    DataError,
    WorkdirError,
    CheckpointError,
    WeightsError,
    RemoteError,
)
TASKS = {
    "pretrain": pretrain,
    "knn": knn,
    "linear": linear,
    "linear_features": linear_features,
    "svm": svm,
    "lowshot": lowshot,
    "finetune": finetune,
    "features": features,
    "tables": tables,
    "detection": detection,
    "robustness": robustness,
    "transfer": transfer,
}


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code and prints one line for whatever went wrong."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    folder = ""
    try:
        config, folder, extend, place, origin = parse_command(argv)
        if config.task not in TASKS:
            raise ConfigError(
                f"config.task={config.task!r} is not known: use one of {', '.join(TASKS)}"
            )
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
        if config.precision == "float64":
            jax.config.update("jax_enable_x64", True)
        processes.initialize(place)
        with local_workdir(folder) as folder, held(folder):
            workdir = open_workdir(folder, config, extend=extend)
            write_json(workdir / COMMAND, origin)
            try:
                TASKS[config.task](config, workdir)
            except (*USER_ERRORS, KeyboardInterrupt):
                abandon(workdir)
                raise
    except USER_ERRORS as error:
        return _stop(error, 2)
    except OSError as error:
        return _stop(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    except (Diverged, InputLost) as error:
        return _stop(error, 1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return _stop(out_of_memory(error, config), 1)
        if jax.process_count() == 1:
            raise
        return _stop(
            "a step failed, perhaps because another process is gone: "
            f"{str(error).splitlines()[0][:200]}",
            1,
        )
    except Terminated as stopped:
        return _stop(stopped, 143)
    except KeyboardInterrupt:
        saved = folder and (
            is_remote(folder) or any(pathlib.Path(folder).glob("checkpoints/step_*"))
        )
        end = (
            "resumes from the last checkpoint"
            if saved
            else "starts from the beginning: nothing was saved yet"
        )
        return _stop(f"interrupted; the same command {end}", 130)
    return 0


def _stop(message: object, code: int) -> int:
    print(f"hexa_jax: {console.with_aliases(str(message))}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    keep_compiled_programs()
    code = main(sys.argv)
    if code not in (0, 143) and jax.distributed.is_initialized():
        os._exit(code)  # the usual way out would wait for the other processes, which may be gone
    sys.exit(code)
