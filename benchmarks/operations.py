"""Single operations of a small network beside PyTorch, on the same cores: which of them make a step slow.

python benchmarks/operations.py [--images=256] [--repeats=7] [--rows=FILE.json]

Milliseconds, medians, both sides in this process, one after the other: for a machine without other
work. Shapes are those of ResNet-10 with 16 channels at 64 pixels (configs/quickstart.py); float32,
channels last on both sides.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# the repository need not be installed
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hardware import add_rows, surroundings
from benchmarks.turns import PAUSE
from hexa_jax.models.norm import CLEAN, BatchNorm, NormMode
from hexa_jax.models.pooling import max_pool
from hexa_jax.models.resnet import StemConv, make_conv

CONVS = (  # side, channels in and out, size, stride
    (16, 16, 16, 3, 1), (16, 16, 32, 3, 2), (8, 32, 32, 3, 1), (4, 64, 64, 3, 1), (2, 128, 128, 3, 1),
)  # fmt: skip
NORMS = ((32, 16), (16, 16), (8, 32), (4, 64))  # side, channels
# name, shape of the images, ours, PyTorch's
Pair = tuple[str, tuple[int, ...], Callable[..., jax.Array], Any]


def xla_pool(x: jax.Array) -> jax.Array:
    """`max_pool` with the gradient that XLA makes."""
    return flax.linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def pairs(images: int) -> list[Pair]:
    """What is timed; ours takes and returns NHWC."""
    from torch import nn

    def module(
        layer: Any, theirs: Any, shape: tuple[int, ...], *extra: Any
    ) -> Callable[..., jax.Array]:
        """Ours, with the kernel of theirs; what a BatchNorm multiplies and adds is 1 and 0 on both sides."""
        params = dict(layer.init(jax.random.key(0), jnp.zeros(shape), *extra)["params"])
        if "kernel" in params:
            params["kernel"] = theirs.weight.detach().numpy().transpose(2, 3, 1, 0)
        return lambda x: layer.apply({"params": params}, x, *extra)

    def conv(
        name: str, shape: tuple[int, ...], ours: Any, features: int, size: int, stride: int
    ) -> Pair:
        theirs = nn.Conv2d(shape[-1], features, size, stride, size // 2, bias=False)
        return name, shape, module(ours, theirs, shape), theirs

    found = [
        conv(
            "conv 7x7/2 of 64x64x3",
            (images, 64, 64, 3),
            StemConv(16, jnp.dtype("float32")),
            16,
            7,
            2,
        )
    ]
    pools = {"max-pool 3x3/2 of 32x32x16": max_pool, "the same as XLA has it": xla_pool}
    found += [
        (name, (images, 32, 32, 16), pool, nn.MaxPool2d(3, 2, 1)) for name, pool in pools.items()
    ]
    for side, channels, features, size, stride in CONVS:
        shape, name = (
            (images, side, side, channels),
            f"conv {size}x{size}/{stride} of {side}x{side}x{channels}",
        )
        ours = make_conv(features, size, stride, jnp.dtype("float32"), "conv")
        found.append(conv(name, shape, ours, features, size, stride))
    xla = flax.linen.Conv(features, (size, size), padding=size // 2, use_bias=False)
    # the last one, over 2 x 2
    found.append(conv("the same as XLA has it", shape, xla, features, size, stride))
    for side, channels in NORMS:
        shape, name = (
            (images, side, side, channels),
            f"batch norm, relu of {side}x{side}x{channels}",
        )
        theirs = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        norm = module(BatchNorm(), theirs, shape, NormMode(CLEAN, 1))
        found.append((name, shape, lambda x, f=norm: jax.nn.relu(f(x)), theirs))
    return found


def turns(
    shape: tuple[int, ...], ours: Callable[..., jax.Array], theirs: Any
) -> dict[str, Callable[[], object]]:
    """Forward, and forward with backward for the input, of both sides."""
    import torch

    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    on_device = jnp.asarray(x)
    dy = jnp.ones(jax.eval_shape(ours, on_device).shape)
    forward = jax.jit(ours)

    @jax.jit
    def both(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, backward = jax.vjp(ours, x)
        return y, backward(dy)[0]

    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    ones = torch.ones_like(theirs(tensor))
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    return {
        "ours": lambda: forward(on_device).block_until_ready(),
        "torch": lambda: theirs(tensor),
        "ours, both": lambda: jax.block_until_ready(both(on_device, dy)),
        "torch, both": lambda: torch.autograd.grad(theirs(tensor), tensor, ones),
    }


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=pathlib.Path, help="JSON file to append the results to")
    options = parser.parse_args(argv[1:])
    try:
        cases = pairs(options.images)
    except ImportError:
        print("operations: no PyTorch here: pip install torch", file=sys.stderr)
        return 2
    print(f"{'ms':34}{'forward':>9}{'torch':>9}{'with dx':>10}{'torch':>9}")
    around, rows = surroundings(argv), []
    for name, shape, ours, theirs in cases:
        seconds: dict[str, list[float]] = {}
        sides = turns(shape, ours, theirs)
        # one after the other: each library's idle threads disturb the other's
        for side, run in sides.items():
            time.sleep(PAUSE)
            for turn in range(options.repeats + 2):
                begin = time.perf_counter()
                run()
                if turn > 1:  # the first one compiles
                    seconds.setdefault(side, []).append(time.perf_counter() - begin)
        middle = {side: 1000 * statistics.median(values) for side, values in seconds.items()}
        print(
            f"{name:34}"
            + "".join(f"{value:{9 + (i == 2)}.2f}" for i, value in enumerate(middle.values())),
            flush=True,
        )
        rows.append(
            {"benchmark": "operations", "operation": name, "milliseconds": middle, **around}
        )
    add_rows(options.rows, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
