"""What a person at the terminal sees of a run: lines, speed and the time left."""

import contextlib
import time
from collections.abc import Callable, Iterator

from hexa_jax.parallel import processes

# Local folders and the names to print for them: the mirror of a bucket is shown as the bucket.
aliases: dict[str, str] = {}
# Called before each line: a progress bar makes room for it.
before_line: Callable[[], None] | None = None


def with_aliases(text: str) -> str:
    """Return a message with each aliased folder under the name that its user knows."""
    for folder, name in aliases.items():
        text = text.replace(folder, name)
    return text


class StepTimer:
    """Images per second since the last reading and time left, evaluations not counted."""

    def __init__(self, batch_size: int, total: int):
        self.batch_size, self.total = batch_size, total
        self.start(0)

    def start(self, step: int) -> None:
        """Begin to count at a step."""
        self.last_step, self.last_time, self.rate = step, time.monotonic(), 0.0
        # seconds since the last reading; their share of it
        self._waited, self.input_wait = 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as spent on waiting for input."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of account."""
        begin = time.monotonic()
        yield
        self.last_time += time.monotonic() - begin

    def read(self, step: int) -> tuple[float, str]:
        """Return (images per second since the last call, time left as h:mm:ss).

        `input_wait` becomes the share of time waited since.
        """
        now = time.monotonic()
        done, elapsed = step - self.last_step, max(now - self.last_time, 1e-9)
        if done:
            self.input_wait, self._waited = min(self._waited / elapsed, 1.0), 0.0
            self.rate, self.last_step, self.last_time = done * self.batch_size / elapsed, step, now
        left = int((self.total - step) * self.batch_size / self.rate) if self.rate else 0
        return self.rate, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def log(text: str) -> None:
    """A line for the person at the terminal."""
    if processes.is_main_process():
        if before_line is not None:
            before_line()
        print(with_aliases(text), flush=True)
