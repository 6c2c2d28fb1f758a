"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio.

Each is optional and works without a network: W&B with WANDB_MODE=offline, MLflow with a folder as
MLFLOW_TRACKING_URI and MLFLOW_ALLOW_FILE_STORE=true, Trackio in its local folder. A logger that
fails is left out with a warning: a run never ends because of one.
"""

import importlib.util
import json
import logging
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

PROJECT = "hexa_jax"
# What each logger imports, and what to install for it: mlflow-skinny is a tenth of mlflow's size.
PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio", "trackio"),
}

logging.getLogger("tensorboardX").setLevel(logging.ERROR)


class LoggerError(ValueError):
    """A logger that cannot be used; the message is one line."""


class Logger(NamedTuple):
    """One logger. A resumed run writes steps again that the interrupted one wrote."""

    write: Callable[[int, Mapping[str, float]], None]  # step, scalars by name
    close: Callable[[], None]  # sends what is left


def check_loggers(names: Sequence[str]) -> None:
    """Check that the loggers are known and installed, without importing them.

    Raises:
        LoggerError: one is not.
    """
    for name in names:
        if name not in PACKAGES:
            known = ", ".join(PACKAGES)
            raise LoggerError(f"config.runtime.loggers: {name!r} is not known: use some of {known}")
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise LoggerError(
                f"config.runtime.loggers names {name}, which is not installed: "
                f"pip install {package}"
            )


class Loggers:
    """Several loggers as one; one that fails is left out from then on."""

    def __init__(
        self,
        names: Sequence[str],
        workdir: pathlib.Path,
        config: Mapping[str, Any],
        resume_step: int,
    ):
        """Start them.

        Args:
            names: of PACKAGES.
            workdir: of the run, which is called after it; loggers keep their local files there.
            config: the run's flat settings, for loggers that show them.
            resume_step: step that the run goes on from; 0 at its beginning.

        Raises:
            LoggerError: see `check_loggers`.
        """
        check_loggers(names)
        self._loggers: dict[str, Logger] = {}
        for name in names:
            if logger := self._try(name, MAKERS[name], workdir, config, resume_step):
                self._loggers[name] = logger

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars of a step."""
        for name, logger in list(self._loggers.items()):
            self._try(name, logger.write, step, values)

    def close(self) -> None:
        """Let each send what is left, and end."""
        for name, logger in list(self._loggers.items()):
            self._try(name, logger.close)

    def _try(self, name: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the action returns; None where it fails, and the logger is left out."""
        try:
            return action(*arguments)
        except Exception as error:  # other people's services: whatever goes wrong there
            self._loggers.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            logging.warning("%s fails and is left out from now on: %s", name, reason)
            return None


def tensorboard(workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> Logger:
    """Events in WORKDIR/tensorboard; steps that a resumed run writes again replace the old ones."""
    import tensorboardX

    purge = resume_step + 1 if resume_step else None
    writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Logger(write, writer.close)


def wandb(workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> Logger:
    """A W&B run, resumed by its id in WORKDIR/loggers.json."""
    import wandb

    run = wandb.init(
        project=PROJECT,
        name=workdir.name,
        id=_identity(workdir, "wandb", lambda: uuid.uuid4().hex[:8]),
        resume="allow",
        dir=str(workdir),
        config=dict(config),
        settings=wandb.Settings(console="off", silent=True),
    )
    # W&B's own step can only grow; a resumed run goes back to its last checkpoint.
    run.define_metric("*", step_metric="step")
    return Logger(lambda step, values: run.log({"step": step, **values}), run.finish)


def mlflow(workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> Logger:
    """An MLflow run at MLFLOW_TRACKING_URI, resumed by its id in WORKDIR/loggers.json."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient()

    def create() -> str:
        found = client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else client.create_experiment(PROJECT)
        return client.create_run(experiment, run_name=workdir.name).info.run_id

    run = _identity(workdir, "mlflow", create)
    if not resume_step:
        params = [Param(key, str(value)[:500]) for key, value in config.items()]
        client.log_batch(run, params=params)

    def write(step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, metrics=[Metric(name, x, now, step) for name, x in values.items()])

    return Logger(write, lambda: client.set_terminated(run))


def trackio(workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int) -> Logger:
    """A Trackio run in its local folder (TRACKIO_DIR); `trackio show` opens the dashboard."""
    import trackio

    name = _identity(workdir, "trackio", lambda: f"{workdir.name}-{time.time_ns() % 10**8:08d}")
    run = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(config), embed=False)
    return Logger(lambda step, values: run.log(dict(values), step=step), run.finish)


MAKERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}


def _identity(workdir: pathlib.Path, name: str, create: Callable[[], str]) -> str:
    """Return a logger's id of this run: from WORKDIR/loggers.json, or created and kept there."""
    path = workdir / "loggers.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if name not in known:
        known[name] = create()
        path.write_text(json.dumps(known, indent=1) + "\n")
    return known[name]
