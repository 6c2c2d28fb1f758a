"""Random bytes as images, broken images and random settings: an answer or one line, never a crash, a hang or a flood of memory."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from command_line import SMALL
from PIL import Image

from hexa_jax import main
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import DataError

ROOT = pathlib.Path(main.__file__).parent.parent
LIMIT = 3 << 30  # bytes of address space beyond what importing takes

DECODE_ALL = """
import resource, sys, time
import numpy as np
from hexa_jax.data.decode import BadImage, decode
kind, count, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[4]),) * 2)
originals = [open(f"{folder}/{name}", "rb").read() for name in ("a.jpg", "b.png", "c.webp", "d.tiff", "e.gif", "f.bmp")]
read, slowest = 0, 0.0
for number in range(count):
    rng = np.random.default_rng([5, number])
    if kind == "noise":
        data = rng.bytes(int(rng.integers(0, 4000)))
        if number % 2:  # behind a header that is believed
            data = originals[number % 6][:24] + data
    else:
        data = bytearray(originals[number % 6])
        for _ in range(int(rng.integers(1, 9))):
            where = int(rng.integers(len(data)))
            change = rng.integers(3)
            if change == 0:
                data[where] = int(rng.integers(256))
            elif change == 1:
                del data[where : where + int(rng.integers(1, 50))]
            else:
                data[where:where] = rng.bytes(int(rng.integers(1, 50)))
            data = data or bytearray(b"x")
        data = bytes(data)
    begin = time.perf_counter()
    try:
        image = decode(data, "example")
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, image.shape
        read += 1
    except BadImage as error:
        assert str(error).startswith("example: ") and "\\n" not in str(error)
    slowest = max(slowest, time.perf_counter() - begin)
print("READ", read, "SLOWEST", round(slowest, 2))
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    ramp = np.add.outer(np.arange(40), np.arange(60))[..., None] * np.array([1, 2, 3])
    image = Image.fromarray((ramp % 256).astype(np.uint8))
    for name in ("a.jpg", "b.png", "c.webp", "d.tiff", "e.gif", "f.bmp"):
        image.save(folder / name)
    return folder


@pytest.mark.parametrize(("kind", "count"), [("noise", 10_000), ("mutants", 4_000)])
def test_bytes_that_are_no_images(originals, kind, count):
    words = [sys.executable, "-c", DECODE_ALL, kind, str(count), str(originals), str(LIMIT)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, read, _, slowest = done.stdout.split()
    assert float(slowest) < 10
    assert (int(read) > 100) == (kind == "mutants")  # the fuzz is no fuzz if nothing gets through


VALUES = (
    "0",
    "-1",
    "1e9",
    "nan",
    "inf",
    "''",
    "[]",
    "(1, 2)",
    "None",
    "True",
    "x" * 50,
    "3.5",
    "../..",
    "{}",
    "\u2603",
    "1;ls",
)


def test_random_overrides_never_end_in_a_traceback():
    """Every key of a config with odd values: it is parsed, or refused in one line."""
    words = ["hexa", f"--config={ROOT}/configs/hexa_moco.py", "--workdir=unused"]
    keys = sorted(_keys(parse_command(words).config.to_dict()))
    rng, refused = np.random.default_rng(0), 0
    from hexa_jax.training.factory import make_trainer

    for number in range(400):
        key, value = keys[number % len(keys)], VALUES[int(rng.integers(len(VALUES)))]
        try:
            config = parse_command(
                [*words, *(f"--config.{k}={v}" for k, v in SMALL.items()), f"--config.{key}={value}"]
            ).config
            make_trainer(config, 70)
        except (ConfigError, DataError) as error:
            refused += 1
            assert "\n" not in str(error), (key, value)
        except Exception as error:
            raise AssertionError(f"--config.{key}={value} gave {type(error).__name__}: {error}") from error
    assert refused > 100


def _keys(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_no_pickle_and_no_shell_in_the_program():
    """Untrusted files are read as safetensors, arrays or tensors alone; no command line is built from a setting."""
    words = ("shell=True", "os.system", "allow_pickle=True", "pickle.load", "unpickle")
    for path in (ROOT / "hexa_jax").rglob("*.py"):
        text = path.read_text()
        assert not [word for word in words if word in text], path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
