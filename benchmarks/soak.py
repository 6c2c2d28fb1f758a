"""Trains for an hour by the real command line and watches what leaks: memory, file descriptors, threads, compilations.

python benchmarks/soak.py --out=DIR [--minutes=60] [--every=10] [--growth=0.05] [--config=FILE] [--config.key=value ...]

--out       a new folder: samples.jsonl (one line a sample), soak.png, the run and what it printed
--every     seconds between samples
--growth    share by which the median memory may grow from the first quarter of the samples to the last
--config    configs/tiny.py unless given, with a worker process: checkpoint, kNN and k-means after each of its short epochs

Samples count from epoch WARM_UP on: every program has run by then. Exit code 1: memory grew by more
than `--growth`, descriptors or threads by more than SLACK, something was compiled after the
warm-up, or the run did not last or did not stop when told to. Of descriptors and threads the lowest
tenth is compared: a save in flight holds ten threads, and how many samples meet one depends on the
machine's load. Linux only: the figures are those of /proc, summed over the run and its worker
processes.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
WARM_UP = 3  # epochs
PATIENCE = 600  # seconds that the run may take to save and end
SLACK = 2  # descriptors or threads
COUNTED = "Finished XLA compilation"  # how jax logs one, from the persistent cache or not
# config.epochs: more than any soak reaches. ArgumentParser would take the words after it for its
# own.
DEFAULTS = ("--config.epochs=1000000", "--config.runtime.workers=1")
UNITS = {"memory": "MB", "descriptors": "", "threads": ""}


# ---- Samples -------------------------------------------------------------------------------------


def tree(root: int) -> list[int]:
    """The process and all that descend from it."""
    found = [root]
    for process in found:  # grows while it is read
        try:
            for task in os.listdir(f"/proc/{process}/task"):
                found += map(
                    int, pathlib.Path(f"/proc/{process}/task/{task}/children").read_text().split()
                )
        except OSError:  # ended meanwhile
            continue
    return found


def usage(process: int) -> dict[str, float]:
    """Resident memory in MB, open file descriptors and threads of one process; zeros when it has ended."""
    folder = pathlib.Path(f"/proc/{process}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        descriptors, threads = len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))
    except OSError:
        return dict.fromkeys(UNITS, 0)
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "descriptors": descriptors,
        "threads": threads,
    }


class Progress:
    """Reads what a run appends to its two outputs: how often it compiled, and its last epoch."""

    def __init__(self, output: pathlib.Path, errors: pathlib.Path):
        self._output, self._errors = output.open(), errors.open()
        self.epoch, self.compiled = 0, 0

    def read(self) -> None:
        """Take in what is new."""
        self.compiled += self._errors.read().count(COUNTED)
        for line in self._output.read().splitlines():
            words = line.split()
            # a kNN accuracy
            if words[:1] == ["epoch"] and line.endswith("%") and words[1].rstrip(":").isdigit():
                self.epoch = int(words[1].rstrip(":"))


def watch(
    words: list[str], out: pathlib.Path, seconds: float, every: float
) -> tuple[list[dict], int | None]:
    """Samples of a run that is given `seconds`, and its exit code; None: it did not end in PATIENCE after SIGTERM."""
    environment = {
        **os.environ,
        "JAX_LOG_COMPILES": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    samples: list[dict] = []
    with (out / "output").open("w") as output, (out / "errors").open("w") as errors:
        command = [sys.executable, "-m", "hexa_jax.main", f"--workdir={out / 'run'}", *words]
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        try:
            progress, begin = Progress(out / "output", out / "errors"), time.monotonic()
            with (out / "samples.jsonl").open("w", buffering=1) as file:
                while (elapsed := time.monotonic() - begin) < seconds and process.poll() is None:
                    totals = [usage(number) for number in tree(process.pid)]
                    progress.read()
                    sample = {name: sum(total[name] for total in totals) for name in UNITS}
                    sample |= {
                        "processes": len(totals),
                        "compiled": progress.compiled,
                        "epoch": progress.epoch,
                    }
                    samples.append({"seconds": round(elapsed, 2)} | sample)
                    file.write(json.dumps(samples[-1]) + "\n")
                    time.sleep(every)
            process.terminate()
            return samples, process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return samples, None
        finally:
            process.kill()


# ---- Judgement -----------------------------------------------------------------------------------


def quarters(samples: list[dict], name: str) -> tuple[float, float, float]:
    """The first and the last quarter of samples: median memory, or the lowest tenth; and the slope of all, per hour."""
    values = [sample[name] for sample in samples]
    part = max(1, len(values) // 4)
    hours = [sample["seconds"] / 3600 for sample in samples]
    slope = float(np.polyfit(hours, values, 1)[0])
    first, last = (
        float(np.quantile(some, 0.5 if name == "memory" else 0.1))
        for some in (values[:part], values[-part:])
    )
    return first, last, slope


def judge(samples: list[dict], growth: float) -> tuple[str, list[str]]:
    """A table of the samples after the warm-up, and what is wrong with them."""
    warm = [sample for sample in samples if sample["epoch"] >= WARM_UP]
    if len(warm) < 4:
        return "", [f"{len(warm)} samples after epoch {WARM_UP}: too few to judge"]
    table, wrong = [f"{'':16}{'first quarter':>16}{'last quarter':>16}{'per hour':>12}"], []
    for name, unit in UNITS.items():
        first, last, slope = quarters(warm, name)
        table.append(f"{f'{name} {unit}':16}{first:16.1f}{last:16.1f}{slope:+12.2f}")
        allowed = first * (1 + growth) if name == "memory" else first + SLACK
        if last > allowed:
            wrong.append(
                f"{name} grew from {first:.1f} to {last:.1f} {unit}; at most {allowed:.1f} were "
                "allowed"
            )
    compiled = warm[-1]["compiled"] - warm[0]["compiled"]
    minutes = (warm[-1]["seconds"] - warm[0]["seconds"]) / 60
    table.append(
        f"{len(warm)} samples in {minutes:.1f} minutes, epochs {warm[0]['epoch']} to "
        f"{warm[-1]['epoch']}; {warm[0]['compiled']} compilations before, {compiled} after"
    )
    if compiled:
        wrong.append(f"{compiled} compilations after epoch {WARM_UP}")
    return "\n".join(table), wrong


def draw(samples: list[dict], path: pathlib.Path) -> None:
    """A picture of all samples over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "memory": "resident MB",
        "descriptors": "descriptors",
        "threads": "threads",
        "compiled": "compilations",
    }
    figure, axes = pyplot.subplots(len(names), sharex=True, figsize=(7, 8), layout="constrained")
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        axis.plot([s["seconds"] / 60 for s in samples], [s[name] for s in samples], linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """Soak, print, draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=10)
    parser.add_argument("--growth", type=float, default=0.05)
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.py"))
    options, more = parser.parse_known_args(argv[1:])
    out = options.out.absolute()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out={out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    words = [f"--config={options.config}", *DEFAULTS, *more]
    samples, code = watch(words, out, 60 * options.minutes, options.every)
    table, wrong = judge(samples, options.growth)
    if code != 143:
        wrong.append(
            f"the run ended with {code} instead of 143, which is SIGTERM and saved: see "
            f"{out / 'errors'}"
        )
    if samples:
        draw(samples, out / "soak.png")
    print(table)
    for line in wrong:
        print(f"soak: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
