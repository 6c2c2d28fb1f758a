"""The report of a run that goes on: when to write it, and what of the run to show."""

import logging
import pathlib
import time
from typing import Any

import numpy as np
from clu import parameter_overview

from hexa_jax.evals.health import nearest, unit
from hexa_jax.parallel import processes
from hexa_jax.parallel.hardware import devices_in_words
from hexa_jax.report import page, record
from hexa_jax.training.run import Run
from hexa_jax.views.preview import ViewPreview

SHARE = 0.05  # of a run's time that may go into reports on the way
NEIGHBORS = 11  # shown of an image


class LiveReport:
    """Writes `report/index.html` while a run goes on; of several processes the first one does."""

    def __init__(self, run: Run):
        self._run = run
        self._began, self._spent = time.time(), 0.0

    def due(self, epoch: int) -> bool:
        """Whether to write it after this epoch; all processes call this.

        The first page comes in any case, further ones while they take a small part of the time. The
        last one is the caller's to write.
        """
        config = self._run.config
        every = config.runtime.report_every
        if not every or epoch % every or epoch == config.epochs:
            return False
        affordable = self._spent <= SHARE * (time.time() - self._began)
        return bool(processes.broadcast_from_main(affordable))

    def write(self) -> pathlib.Path:
        """Write the page as the run is now, and return its path; all processes call this."""
        began, run = time.time(), self._run
        shown = page.Pictured(
            self._views(), run.data.source, run.assignments, self._sample_images()
        )
        path = run.workdir / "report" / "index.html"
        if processes.is_main_process():
            try:
                path.parent.mkdir(exist_ok=True)
                record.write_facts(path.parent, self._began, self._facts())
                page.write_report(run.workdir, run.config, shown)
            except Exception as error:  # a run of days does not end because of a page
                what = f"{type(error).__name__}: {error}"
                logging.warning("the report cannot be written: %s", what)
        self._spent += time.time() - began
        return path

    def _views(self) -> ViewPreview:
        """The views of the first batch."""
        run = self._run
        batch = next(run.data.batches(0))
        return processes.gather(run.steps.views(run.state, batch, run.data.resident))

    def _sample_images(self) -> page.SampleImages | None:
        sample = self._run.sample
        if sample is None or sample.features is None or sample.clusters is None:
            return None
        count = min(NEIGHBORS, len(sample.indices) - 1)
        near = nearest(sample.features, sample.features, count)
        directions = unit(sample.features)
        cosines = np.einsum("nf,nkf->nk", directions, directions[near])
        return page.SampleImages(
            sample.indices, sample.images, sample.features, near, cosines, sample.clusters
        )

    def _facts(self) -> dict[str, Any]:
        """What the report says of the run besides its files."""
        run = self._run
        source, sample, probe = run.data.source, run.sample, run.probe
        ranked = sample is not None and sample.features is not None
        return {
            "device": devices_in_words(list(run.trainer.mesh.devices.flat)),
            "images": len(source),
            "classes": source.num_classes,
            "test_images": int(probe.queries.known.sum()) if probe else None,
            "leave_one_out": bool(probe and probe.leave_one_out),
            "parameters": int(parameter_overview.count_parameters(run.state.params)),
            "steps_per_epoch": run.steps_per_epoch,
            "rank_limit": sample.rank_limit if sample and ranked else None,
            "unreadable": [source.name(index) for index in sorted(run.data.bad_images.seen)],
        }
