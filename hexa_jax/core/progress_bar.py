"""A progress bar on a terminal; elsewhere a line now and then."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from hexa_jax.core import console
from hexa_jax.parallel import processes

SECONDS = 0.1  # between two drawings
LINE_SECONDS = 60.0  # between two lines where there is no terminal
WIDTH = 24  # characters of the bar itself
CLEAR = "\r\x1b[K"


class ProgressBar:
    """One line at the bottom of a terminal that is drawn over itself; ordinary lines go above it.

    `active` says whether there is a terminal: who writes lines of progress leaves them out then.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream if stream is not None else sys.stderr
        terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.active = terminal and processes.is_main_process()
        self._line, self._drawn, self._last = "", False, 0.0
        if self.active:
            console.before_line = self.clear
            for handler in logging.getLogger().handlers:
                handler.addFilter(self._make_room)

    def show(self, done: int, total: int, text: str) -> None:
        """Draw the bar at `done` of `total`, with words behind it."""
        if not self.active:
            return
        self._line = draw(done, total, text, shutil.get_terminal_size().columns)
        now = time.monotonic()
        if now - self._last >= SECONDS or done >= total:
            self.stream.write(CLEAR + self._line)
            self.stream.flush()
            self._drawn, self._last = True, now

    def track(self, items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        """Yield the items, showing how many are taken; without a terminal a line a minute."""
        begin = last = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            left = (now - begin) / done * (total - done) if done else None
            text = what + (f"  {clock(left)} left" if left is not None else "")
            self.show(done, total, text)
            if not self.active and now - last >= LINE_SECONDS:
                console.log(f"{what}: {done}/{total}, {clock(left or 0)} left")
                last = now
            yield item
        self.clear()

    def clear(self) -> None:
        """Take the bar off the terminal; the next `show` draws it again."""
        if self._drawn:
            self.stream.write(CLEAR)
            self.stream.flush()
            self._drawn, self._last = False, 0.0

    def close(self) -> None:
        """Take the bar off for good."""
        self.clear()
        if self.active:
            console.before_line = None
            for handler in logging.getLogger().handlers:
                handler.removeFilter(self._make_room)
        self.active = False

    def _make_room(self, _: logging.LogRecord) -> bool:
        """A filter that lets every record through, and clears the line that it is written to."""
        self.clear()
        return True


def draw(done: int, total: int, text: str, columns: int) -> str:
    """Return the bar as text of fewer than `columns` characters."""
    share = min(max(done / total, 0.0), 1.0) if total else 1.0
    full = int(share * WIDTH)
    line = f"{100 * share:3.0f} % {'━' * full}{'─' * (WIDTH - full)} {text}"
    return line if len(line) < columns else line[: max(columns - 2, 0)] + "…"


def clock(seconds: float) -> str:
    """Return h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
