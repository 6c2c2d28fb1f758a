"""The report of a run that goes on: when to write it, and what of the run to show."""

import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from hexa_jax.evals.health import nearest, unit
from hexa_jax.parallel import processes
from hexa_jax.parallel.hardware import devices_in_words
from hexa_jax.report import page, record
from hexa_jax.training.input import TrainingData
from hexa_jax.training.online_health import Sample
from hexa_jax.training.online_probe import Probe
from hexa_jax.training.step import Trainer, TrainState
from hexa_jax.views.preview import ViewPreview

SHARE = 0.05  # of a run's time that may go into reports on the way
NEIGHBORS = 11  # shown of an image


class LiveReport:
    """Writes `report/index.html` while a run goes on; of several processes the first one does."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        trainer: Trainer,
        data: TrainingData,
        probe: Probe | None,
        sample: Sample | None,
    ):
        self._config, self._workdir, self._trainer = config, workdir, trainer
        self._data, self._probe, self._sample = data, probe, sample
        self._began, self._spent = time.time(), 0.0

    def due(self, epoch: int) -> bool:
        """Whether to write it after this epoch; all processes call this.

        The first page comes in any case, further ones while they take a small part of the time. The
        last one is the caller's to write.
        """
        every = self._config.runtime.report_every
        if not every or epoch % every or epoch == self._config.epochs:
            return False
        affordable = self._spent <= SHARE * (time.time() - self._began)
        return bool(processes.broadcast_from_main(affordable))

    def write(
        self,
        state: TrainState,
        views: Callable[[], ViewPreview],
        assignments: np.ndarray | None,
    ) -> pathlib.Path:
        """Write the page as the run is now, and return its path; all processes call this.

        Args:
            state: of the run.
            views: computes the views of a batch, on all processes.
            assignments: int32 [heads, examples], the method's clusters; None without.
        """
        began = time.time()
        shown = page.Pictured(views(), self._data.source, assignments, self._sample_images())
        path = self._workdir / "report" / "index.html"
        if processes.is_main_process():
            try:
                path.parent.mkdir(exist_ok=True)
                record.write_facts(path.parent, self._began, self._facts(state))
                page.write_report(self._workdir, self._config, shown)
            except Exception as error:  # a run of days does not end because of a page
                what = f"{type(error).__name__}: {error}"
                logging.warning("the report cannot be written: %s", what)
        self._spent += time.time() - began
        return path

    def _sample_images(self) -> page.SampleImages | None:
        sample = self._sample
        if sample is None or sample.features is None or sample.clusters is None:
            return None
        count = min(NEIGHBORS, len(sample.indices) - 1)
        near = nearest(sample.features, sample.features, count)
        directions = unit(sample.features)
        cosines = np.einsum("nf,nkf->nk", directions, directions[near])
        return page.SampleImages(
            sample.indices, sample.images, sample.features, near, cosines, sample.clusters
        )

    def _facts(self, state: TrainState) -> dict[str, Any]:
        """What the report says of the run besides its files."""
        source, sample, probe = self._data.source, self._sample, self._probe
        ranked = sample is not None and sample.features is not None
        return {
            "device": devices_in_words(list(self._trainer.mesh.devices.flat)),
            "images": len(source),
            "classes": source.num_classes,
            "test_images": int(probe.queries.known.sum()) if probe else None,
            "leave_one_out": bool(probe and probe.leave_one_out),
            "parameters": int(parameter_overview.count_parameters(state.params)),
            "steps_per_epoch": self._trainer.spec.steps_per_epoch,
            "rank_limit": sample.rank_limit if sample and ranked else None,
            "unreadable": [source.name(index) for index in sorted(self._data.bad_images.seen)],
        }
