"""Clean BatchNorm statistics re-estimated over training crops: `config.eval_statistics`.

Running ones of a short run lag behind, and those of a fresh network are made up.
"""

import contextlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from hexa_jax.core.preemption import PreemptionGuard
from hexa_jax.models.norm import CLEAN, stats_collection
from hexa_jax.training.run import Run
from hexa_jax.training.step import TrainState

REESTIMATED = "reestimated"


def reestimate(
    run: Run, state: TrainState, num_batches: int, stop: PreemptionGuard | None = None
) -> TrainState | None:
    """Return a state with clean statistics that are the mean over batches of training crops.

    Args:
        run: whose crops and network they are.
        state: a state of the run; it stays as it is.
        num_batches: from the beginning of the first pass on, at most an epoch of them.
        stop: asked after each batch; None where so few are quickly made.

    Returns:
        The state; None where SIGTERM arrived before all batches were seen.
    """
    num_batches = min(num_batches, run.steps_per_epoch)
    total: Any = None
    with contextlib.closing(run.data.batches(0)) as batches:
        some = itertools.islice(batches, num_batches)
        for batch in run.bar.track(some, num_batches, "statistics"):
            moments = run.steps.moments(state, batch, run.data.resident)
            total = moments if total is None else jax.tree.map(jnp.add, total, moments)
            if stop is not None and stop.reached():
                return None
    mean = jax.tree.map(lambda value: value / num_batches, total)
    return state._replace(batch_stats=state.batch_stats | {stats_collection(CLEAN): mean})


def settle(run: Run) -> None:
    """Give a run's state the statistics that it is evaluated by; training passes never read them.

    Raises:
        Terminated: SIGTERM arrived; the state is saved with the statistics that it had.
    """
    if is_settled(run):
        return
    state = reestimate(run, run.state, run.steps_per_epoch, run.stop)
    if state is None:
        # A pass over the data takes longer than a scheduler waits: the next start makes it.
        run.metadata["evaluate"] = run.step
        if run.checkpoints.steps()[-1:] != [run.step]:
            run.save(last=True)
        raise run.terminated()
    run.state, run.metadata[REESTIMATED] = state, run.step


def is_settled(run: Run) -> bool:
    """Return whether a run's state has the statistics that it is evaluated by."""
    wanted = run.config.eval_statistics == REESTIMATED
    return not wanted or run.metadata.get(REESTIMATED) == run.step
