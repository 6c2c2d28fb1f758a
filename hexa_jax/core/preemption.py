"""How a run ends early: SIGTERM, which saves first, or numbers that are not finite."""

import pathlib
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Diverged(RuntimeError):
    """A loss or norm is not finite; the message names step, last good checkpoint and remedies."""


class Terminated(Exception):
    """SIGTERM arrived, and the state is saved."""

    @classmethod
    def after(cls, step: int, folder: pathlib.Path) -> "Terminated":
        """What to raise where the state of a step is saved in a workdir."""
        return cls(f"SIGTERM: saved step {step} in {folder}; the same command resumes it")


class PreemptionGuard:
    """Records SIGTERM so that a loop can save and stop at a step boundary.

    With several processes, jax listens for the signal and names one step at which all stop.
    """

    def __init__(self) -> None:
        self._wanted, self._asked = False, 0
        self._alone = jax.process_count() == 1
        self._previous = signal.signal(signal.SIGTERM, self._on_sigterm) if self._alone else None

    def _on_sigterm(self, *_: Any) -> None:
        self._wanted = True

    def reached(self) -> bool:
        """Return whether to save and stop now; all processes call it once a step and agree."""
        self._asked += 1
        if not self._alone:
            self._wanted = self._wanted or multihost_utils.reached_preemption_sync_point(
                self._asked
            )
        return self._wanted

    def close(self) -> None:
        """Restore the previous handler of the signal."""
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)
