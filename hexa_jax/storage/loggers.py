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
from typing import Any

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
                f"config.runtime.loggers names {name}, which is not installed: pip install "
                f"{package}"
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
        self._loggers: dict[str, Any] = {}
        for name in names:
            self._loggers[name] = self._try(name, MAKERS[name], workdir, config, resume_step)
        self._loggers = {name: logger for name, logger in self._loggers.items() if logger}

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


# Each logger below has `write` and `close`. A resumed run writes steps again that the interrupted
# one wrote.


class TensorBoard:
    """Events in WORKDIR/tensorboard; steps that a resumed run writes again replace the old ones."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int):
        import tensorboardX

        purge = resume_step + 1 if resume_step else None
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A W&B run, resumed by its id in WORKDIR/loggers.json."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int):
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=workdir.name,
            id=_identity(workdir, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # W&B's own step can only grow; a resumed run goes back to its last checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run at MLFLOW_TRACKING_URI, resumed by its id in WORKDIR/loggers.json."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()

        def create() -> str:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            return self._client.create_run(experiment, run_name=workdir.name).info.run_id

        self._run = _identity(workdir, "mlflow", create)
        if not resume_step:
            params = [Param(key, str(value)[:500]) for key, value in config.items()]
            self._client.log_batch(self._run, params=params)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """A Trackio run in its local folder (TRACKIO_DIR); `trackio show` opens the dashboard."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], resume_step: int):
        import trackio

        name = _identity(workdir, "trackio", lambda: f"{workdir.name}-{time.time_ns() % 10**8:08d}")
        self._run = trackio.init(
            project=PROJECT, name=name, resume="allow", config=dict(config), embed=False
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


MAKERS: dict[str, Callable[..., Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def _identity(workdir: pathlib.Path, name: str, create: Callable[[], str]) -> str:
    """Return a logger's id of this run: from WORKDIR/loggers.json, or created and kept there."""
    path = workdir / "loggers.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if name not in known:
        known[name] = create()
        path.write_text(json.dumps(known, indent=1) + "\n")
    return known[name]
