"""How a run ends early: by a signal, which saves first, or because its numbers are no longer numbers."""

import signal
from typing import Any


class Diverged(RuntimeError):
    """The loss is not finite; the message says at which step, where the last good checkpoint is, and what to try."""


class Terminated(Exception):
    """SIGTERM arrived and the state is on disk."""


class Interruptible:
    """Turns SIGTERM into a wish that a loop grants when its state is whole."""

    def __init__(self) -> None:
        self.wanted = False
        self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self.wanted = True

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        signal.signal(signal.SIGTERM, self._previous)
