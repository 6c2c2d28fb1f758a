"""Two implementations in processes of their own that take turns on one device, told by a pipe when to run.

Each process holds its own copy of the device's libraries and memory: jax and PyTorch in one process
disturb each other. Messages are lines of JSON: a worker first says facts about itself, then answers
a number of steps with {"seconds": ...}; or {"error": ...} or {"refusal": ...} instead of either.
"""

import contextlib
import json
import os
import pathlib
import select
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAUSE = 0.3  # seconds between turns, in which the other side's idle threads stop spinning


class WorkerError(RuntimeError):
    """A worker could not start or stopped; one line."""


class Refusal(WorkerError):
    """A worker's order cannot work, however often it is given."""


def serve(make: Callable[[], tuple[Callable[[int], float], dict[str, Any]]]) -> int:
    """The worker's side: `make` prepares and returns a function (steps -> seconds) and facts; returns the exit code."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not get between the messages

    def log(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        turn, facts = make()
        log(facts)
        for line in sys.stdin:
            log({"seconds": turn(int(line))})
    except Refusal as error:
        log({"refusal": " ".join(str(error).split())})
        return 1
    except Exception as error:
        traceback.print_exc()
        log({"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
        return 1
    return 0


class Worker:
    """The other side: a process that is ready to run turns.

    Args:
        name: for messages.
        command: what to start; its last argument tells the worker what to do.
        timeout: seconds to wait for an answer, the first one included.

    Attributes:
        facts: what the worker said of itself.

    Raises:
        WorkerError: it could not prepare.
    """

    def __init__(self, name: str, command: list[str], timeout: float):
        self.name, self.timeout = name, timeout
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Neither side may take the whole memory at its start, as XLA does by default.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "PYTHONPATH": path},
        )
        self.facts = self._answer()

    def turn(self, steps: int) -> float:
        """Seconds of so many steps."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says why
            self.process.stdin.write(f"{steps}\n".encode())
        return float(self._answer()["seconds"])

    def close(self) -> None:
        """Stop the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line, end = b"", time.monotonic() + self.timeout
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
                self.process.kill()
                self.close()
                raise WorkerError(f"{self.name} gave no answer within {self.timeout:.0f} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                self.close()
                raise WorkerError(f"{self.name} stopped with exit code {self.process.returncode}")
            line += part
        try:
            answer = json.loads(line)
        except ValueError:
            self.process.kill()
            self.close()
            raise WorkerError(f"{self.name} is no worker: it said {line[:80]!r}") from None
        if "refusal" in answer:
            self.close()
            raise Refusal(answer["refusal"])
        if "error" in answer:
            self.close()
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer


Starters = Mapping[str, Callable[[], Worker]]


def alternate(starters: Starters, turns: int, seconds: float) -> dict[str, Any]:
    """Seconds a step of each worker: all are kept alive, and turns go round (A B A B ...).

    Args:
        starters: by name; each is called once.
        turns: of each worker; one more before them is not counted.
        seconds: what a turn should last about: the number of steps is the same for all.

    Returns:
        {"seconds": {name: [turns]}, "facts": {name: ...}, "steps": of a turn}.

    Raises:
        WorkerError: from any of them.
    """
    workers: dict[str, Worker] = {}
    try:
        for name, start in starters.items():
            workers[name] = start()
        steps = _steps([worker.facts for worker in workers.values()], seconds)
        measured: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(turns + 1):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                elapsed = worker.turn(steps) / steps
                if turn:
                    measured[name].append(elapsed)
        return {
            "seconds": measured,
            "facts": {n: w.facts for n, w in workers.items()},
            "steps": steps,
        }
    finally:
        for worker in workers.values():
            worker.close()


def one_after_the_other(starters: Starters, turns: int, seconds: float) -> dict[str, Any]:
    """Like `alternate`, for a device that cannot hold both: each worker does all its turns and goes."""
    whole: dict[str, Any] = {"seconds": {}, "facts": {}, "steps": 0}
    for name, start in starters.items():
        part = alternate({name: start}, turns, seconds)
        whole["seconds"] |= part["seconds"]
        whole["facts"] |= part["facts"]
        whole["steps"] = max(whole["steps"], part["steps"])
    return whole


def _steps(facts: list[dict[str, Any]], seconds: float) -> int:
    slowest = max(fact["step_seconds"] for fact in facts)
    return max(1, min(100, round(seconds / slowest)))


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """How many times as fast ours is: of the medians; and the smallest and largest of single pairs of turns."""
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(theirs) / statistics.median(ours), min(pairs), max(pairs)
