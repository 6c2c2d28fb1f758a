"""`config.runtime.microbatches = 0`: find the fewest microbatches that fit.

The step is compiled with one microbatch. Where it does not fit, the compiler's numbers say which
number of microbatches should; that step is compiled, and others until the answer is certain.
Results do not depend on the answer, except by the order of sums.
"""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import Source
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import Layout
from hexa_jax.training.memory import (
    SMALLER,
    Need,
    available,
    compile_ahead,
    described,
    gradient_bytes,
    in_words,
    is_out_of_memory,
    lowered,
    needed,
    place,
    too_large,
)
from hexa_jax.training.step import CompiledSteps, Trainer

SHARE = 0.9  # of the memory that a step may take: batches under way and evaluations take some, too
MARGIN = 1.1  # how wrong an estimate from two compiled steps may be
MEGABYTE = 1 << 20


def compile_to_fit(
    config: ConfigDict, trainer: Trainer, source: Source
) -> tuple[Trainer, CompiledSteps]:
    """Compile the training step of a run with as many microbatches as the config says, or as fit.

    Args:
        config: of the run.
        trainer: what computes; its mesh is the current one.
        source: the training examples, see `compile_ahead`.

    Returns:
        The trainer with the layout that was found, and its steps, the training step compiled.

    Raises:
        ConfigError: no number of microbatches makes it fit; one line with settings that would.
        DataError: an image that is read for its size cannot be read.
    """
    room = _smallest_room(trainer) if config.runtime.check_memory else None
    if config.runtime.microbatches or room is None:
        return trainer, compile_ahead(config, trainer, trainer.compile(), source)
    search = _Search(config, trainer, source, room)
    return search.run()


class _Search:
    """Compiles one layout after another; `needs` holds what those that compiled take."""

    def __init__(self, config: ConfigDict, trainer: Trainer, source: Source, room: int):
        self.config, self.trainer, self.source, self.room = config, trainer, source, room
        self.layouts = same_results(trainer.objective.layout)
        self.needs: dict[int, Need] = {}  # by position in `layouts`

    def run(self) -> tuple[Trainer, CompiledSteps]:
        position, failed = 0, -1
        found: tuple[int, Trainer, CompiledSteps] | None = None
        while True:
            trainer = self._with(self.layouts[position])
            steps = self._compiled(trainer, position)
            if steps is not None and self._fits(position):
                found = position, trainer, steps
                if position - 1 == failed or self._cannot_fit(position - 1):
                    break
                position -= 1
            else:
                failed = position
                if found is not None:
                    break
                position = self._next(position)
        position, trainer, steps = found
        self._tell(position, trainer)
        return trainer, steps

    def _with(self, layout: Layout) -> Trainer:
        objective = dataclasses.replace(self.trainer.objective, layout=layout)
        return dataclasses.replace(self.trainer, objective=objective)

    def _compiled(self, trainer: Trainer, position: int) -> CompiledSteps | None:
        """The steps with the training step compiled; None where the compiler refuses it."""
        layout, device = self.layouts[position], trainer.mesh.local_devices[0]
        patience = "; takes minutes on a CPU" if device.platform == "cpu" else ""
        log(f"compiling the training step: {described(self.config, layout)}{patience}")
        steps = trainer.compile()
        try:
            compiled = lowered(self.config, trainer, steps, self.source).compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        self.needs[position] = needed(compiled, device.platform)
        return steps._replace(train=compiled)

    def _fits(self, position: int) -> bool:
        return self.needs[position].total <= SHARE * self.room

    def _next(self, position: int) -> int:
        """The next position to try after one that does not fit; ConfigError where none is left."""
        later = range(position + 1, len(self.layouts))
        if position in self.needs:
            need, kept = self.needs[position], gradient_bytes(self.trainer)
            kept, parts = min(kept, need.temporaries), self.layouts[position].microbatches
            for candidate in later:
                share = parts / self.layouts[candidate].microbatches
                if need.fixed + kept + (need.temporaries - kept) * share <= SHARE * self.room:
                    return candidate
        if later:  # an estimate may be wrong: the last one decides
            return later[-1] if position in self.needs else later[0]
        what = described(self.config, self.layouts[position])
        if position not in self.needs:
            raise ConfigError(
                f"a training step of {what} does not fit the "
                f"{place(self.trainer.mesh, self.room)}: use {SMALLER}"
            )
        raise too_large(
            self.config, self._with(self.layouts[position]), self.needs[position], self.room
        )

    def _cannot_fit(self, position: int) -> bool:
        """Whether two compiled steps say that this one is too large, beyond doubt."""
        if len(self.needs) < 2:
            return False
        # Temporaries grow linearly with the rows of a microbatch.
        rows = [self.layouts[known].rows for known in self.needs]
        totals = [need.total for need in self.needs.values()]
        slope, constant = np.polyfit(rows, totals, 1)
        return slope * self.layouts[position].rows + constant > MARGIN * SHARE * self.room

    def _tell(self, position: int, trainer: Trainer) -> None:
        need, parts = self.needs[position].total, self.layouts[position].microbatches
        fewest = f"{parts} microbatches, the fewest that fit" if parts > 1 else "one microbatch"
        log(
            f"memory: a step takes {in_words(need)}, and there are "
            f"{place(trainer.mesh, self.room)}: {fewest}"
        )


def same_results(layout: Layout) -> list[Layout]:
    """Return layouts that compute the same as one microbatch, fewest first."""
    layouts = []
    for parts in range(1, layout.batch_size + 1):
        finer = dataclasses.replace(layout, microbatches=parts)
        try:
            finer.check()
        except ValueError:
            continue
        layouts.append(finer)
    return layouts


def _smallest_room(trainer: Trainer) -> int | None:
    """Bytes for each device of the process that has the least, None where one does not know.

    All processes must search alike, or they would wait for each other.
    """
    room = available(trainer.mesh)
    told = np.array([-1 if room is None else -(room // MEGABYTE), int(room is None)], np.int64)
    smallest, unknown = processes.largest(told.astype(np.int32))
    return None if unknown else int(-smallest) * MEGABYTE
