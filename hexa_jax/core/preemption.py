"""How a run ends early: by a signal, which saves first, or because its numbers are no longer numbers."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Diverged(RuntimeError):
    """The loss is not finite; the message says at which step, where the last good checkpoint is, and what to try."""


class Terminated(Exception):
    """SIGTERM arrived and the state is on disk."""


class PreemptionGuard:
    """Turns SIGTERM into a wish that a loop grants when its state is whole.

    With several processes, jax itself listens for the signal, tells the others, and lets all of them stop at the same step.
    """

    def __init__(self) -> None:
        self._wanted, self._asked = False, 0
        self._alone = jax.process_count() == 1
        self._previous = signal.signal(signal.SIGTERM, self._on_sigterm) if self._alone else None

    def _on_sigterm(self, *_: Any) -> None:
        self._wanted = True

    def reached(self) -> bool:
        """Whether to save and stop now. Called once a step, by all processes; all get the same answer."""
        self._asked += 1
        if not self._alone:
            self._wanted = self._wanted or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._wanted

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)
