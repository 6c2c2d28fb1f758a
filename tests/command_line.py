"""Runs the command line in real processes, with the smallest network and data that still have every part.

Compiling dominates: all runs of a kind share one config, so that each program is compiled once for all of them. The run that
many tests only look at is made once for all test processes.
"""

import contextlib
import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
import time
import types

import cv2
import numpy as np

from hexa_jax.checkpoint.checkpointer import MANIFEST, Checkpoints

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
IMAGES, SIDE, BATCH = 70, 20, 16  # 4 steps an epoch; 6 images of an epoch are in no batch
EPOCHS, STEPS = 6, 24
CLASSES = ("disc", "bar", "cross")
SHARED = pathlib.Path(os.environ["HEXA_TESTS_SHARED"])  # conftest.py makes it

SMALL = {
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "bn_group_size": 8,
    "cutmix_block": 8,
    "shuffle_block": 16,
    "model.backbone": "resnet10",
    "model.base_channels": 4,
    "model.stem": "cifar",
    "model.head_dim": 16,
    "model.head_hidden": 16,
    "data.source": "shapes",
    "data.eval_source": "",
    "data.shapes_count": IMAGES,
    "data.shapes_size": SIDE,
    "data.crop_size": "(8,)",
    "augment.blur_probability": "(0.0,)",
    "knn.every_epochs": 2,
    "knn.neighbours": 5,
    "knn.resize": 8,
    "knn.crop": 8,
    "runtime.num_devices": 1,
    "runtime.workers": 0,  # the ImageNet recipe starts eight processes
    "runtime.log_every": 1,
    "runtime.checkpoint_every": 3,
}
# All that crops can have, so that it is resumed, too.
DOMAIN = {
    "data.flip": "both",
    "data.quarter_turns": True,
    "data.aspect_ratio": "(0.5, 2.0)",
    "data.normalization": "measured",
}
DEEPCLUSTER = {
    **SMALL,
    **DOMAIN,
    "compare_with_plain": False,
    "deepcluster.num_clusters": 8,
    "runtime.keep_best": "neighbor_agreement",
}
MOCO = {**SMALL, "moco.queue_size": 32, "views.cutmix.weight": 1.0}
FILES = {"deepcluster": "quickstart.py", "moco": "hexa_moco.py"}
TIMED = ("images_per_second", "input_wait")  # metrics that are of no two runs the same
KINDS = {"deepcluster": DEEPCLUSTER, "moco": MOCO}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Calls main as a program would, then tells what it left in the process.
INSPECTED = """
import json, sys
from hexa_jax import main
from hexa_jax.training.step import Trainer
kept, compile, traces, step = [], Trainer.compile, [], Trainer.train_step
Trainer.train_step = lambda *args: traces.append(args) or step(*args)
Trainer.compile = lambda self: kept.append(compile(self)) or kept[-1]
code = main.main(sys.argv)
counts = {name: getattr(kept[0], name)._cache_size() for name in kept[0]._fields} if kept else {}
if kept:
    counts["train"] += len(traces)  # compiled ahead of time; a call of the jitted function would compile it again
print("INSPECTED " + json.dumps({"tensorflow": "tensorflow" in sys.modules, "traced": counts}))
sys.exit(code)
"""


def arguments(kind, workdir, **overrides):
    """Command line words; overrides by dotted key."""
    settings = KINDS[kind] | overrides
    words = [f"--config={REPOSITORY / 'configs' / FILES[kind]}", f"--workdir={workdir}"]
    return words + [f"--config.{name}={value}" for name, value in settings.items()]


def evaluation_words(config, workdir, **settings):
    """Command line words of an evaluation: a file in configs/eval with its arguments, settings by dotted key."""
    words = [f"--config={REPOSITORY}/configs/eval/{config}", f"--workdir={workdir}"]
    return words + [f"--config.{name}={value}" for name, value in settings.items()]


def result(workdir):
    """What a run's result.json holds."""
    return json.loads((workdir / "result.json").read_text())


def check_refused(words, message, capsys):
    """Run a command in this process, which has to end with one line that holds the message and code 2."""
    from hexa_jax import main  # takes seconds, which tests that only read a run's files need not wait for

    assert main.main(["hexa", *words]) == 2, message
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hexa_jax: ") and message in line


def environment():
    """Of a child process: one CPU device, the tests' compilation cache, nothing recompiled that takes time."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    env |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
    return env


def start(words, **options):
    """A process of the command line, with text pipes."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()} | options
    return subprocess.Popen([sys.executable, "-m", "hexa_jax.main", *words], **options)


def finish(process, timeout=300):
    """Wait for a process; its exit code, stdout and stderr."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return types.SimpleNamespace(code=process.returncode, stdout=stdout, stderr=stderr)


def run(words, **options):
    """Run the command line to its end."""
    return finish(start(words, **options))


def run_until(process, text):
    """Read a process's output up to the first line that holds the text."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"ended before {text!r}: {''.join(seen)}\n{process.communicate()[1]}")


def begin(*kinds):
    """Start the uninterrupted runs side by side, unless another test process has; `finished` waits for them."""
    for kind in kinds:
        _begun(kind)


def _begun(kind):
    folder = SHARED / kind
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        program = shlex.join([sys.executable, "-c", INSPECTED, *arguments(kind, folder / "run")])
        # The shell tells the exit code to whichever process waits, even if this one has ended.
        script = f'{program} > "$0/output" 2>&1; echo $? > "$0/ending"; mv "$0/ending" "$0/code"'
        subprocess.Popen(["sh", "-c", script, folder], env=environment())
    return folder


def finished(kind):
    """The workdir of an uninterrupted run, to be read or copied but not written; and its output."""
    folder, end = _begun(kind), time.monotonic() + 300
    while not (folder / "code").exists():
        assert time.monotonic() < end, f"{folder} takes too long: {(folder / 'output').read_text()}"
        time.sleep(0.1)
    output = (folder / "output").read_text()
    assert int((folder / "code").read_text()) == 0, output
    return folder / "run", output


def lines(workdir):
    """metrics.jsonl as a list of dicts; every line must be JSON with a step."""
    parsed = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(isinstance(line["step"], int) for line in parsed)
    return parsed


def final_state(workdir):
    """(step, {leaf: array}) of the newest checkpoint: parameters, statistics, optimiser and the method's state."""
    folder = sorted(path for path in (workdir / "checkpoints").iterdir() if (path / MANIFEST).exists())[-1]
    leaves = json.loads((folder / MANIFEST).read_text())["leaves"]
    like = {name: np.zeros(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}
    step, state, _ = Checkpoints(workdir / "checkpoints").restore_latest(like)
    return step, state


def picture(number, side=SIDE):
    """uint8 [side, side, 3] and its class: a disc, a bar or a cross in random colours."""
    rng, label = np.random.default_rng([7, number]), number % len(CLASSES)
    back, front = (tuple(map(int, rng.integers(low, low + 100, 3))) for low in (0, 150))
    image = np.full((side, side, 3), back, np.uint8)
    middle = tuple(map(int, rng.integers(side // 3, 2 * side // 3, 2)))
    if label == 0:
        cv2.circle(image, middle, side // 4, front, -1)
    else:
        cv2.line(image, (0, middle[1]), (side, middle[1]), front, 3)
    if label == 2:
        cv2.line(image, (middle[0], 0), (middle[0], side), front, 3)
    return image, label


def image_folder(root, by_class=True, count=IMAGES):
    """A folder of PNG and JPEG files, by class or flat; returns their paths."""
    paths = []
    for number in range(count):
        image, label = picture(number, SIDE + number % 5)
        suffix = "png" if number % 2 else "jpg"
        path = root / (CLASSES[label] if by_class else "") / f"{number:03}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)
        paths.append(path)
    return paths
