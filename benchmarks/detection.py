"""Speed and memory of the detector, in training and in inference, with one and with more images a device.

python benchmarks/detection.py --config=configs/eval/detection_voc.py [--images=1,2,4] [--repeats=5] [--rows=FILE]
                               [--config.key=value ...]

Images are noise of the largest lying canvas, ready on the device; weights are random
(config.random). Cases take turns: quote the ratios. Peak memory is what the compiled program asks
for, and what the device says where it says anything.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError, choose
from hexa_jax.detection.batches import DetectionBatch
from hexa_jax.detection.canvases import Canvases
from hexa_jax.detection.task import make_base_optimizer, make_model
from hexa_jax.detection.training import (
    STATS,
    DetectorState,
    Frozen,
    make_detect,
    make_optimizer,
    make_step,
)
from hexa_jax.evals.backbone import IMAGENET_MEAN, IMAGENET_STD
from hexa_jax.models.resnet import make_resnet
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.training.factory import PRECISIONS, make_devices

CLASSES = 20
OBJECTS = 8  # boxes of an image


def noise(mesh: Mesh, config: ConfigDict, count: int) -> DetectionBatch:
    """`count` images with some boxes."""
    data = config.data
    height, width = Canvases(data.canvases, data.short_sides, data.long_limit).shapes(
        portrait=False
    )[-1]
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (count, data.max_boxes, 2, 2)), axis=2) * [width, height]
    labels = np.where(
        np.arange(data.max_boxes) < OBJECTS, rng.integers(0, CLASSES, (count, data.max_boxes)), -1
    )
    batch = DetectionBatch(
        images=rng.integers(0, 256, (count, height, width, 3), np.uint8),
        sizes=np.full((count, 2), (height, width), np.int32),
        boxes=corners.reshape(count, -1, 4).astype(np.float32),
        labels=labels.astype(np.int32),
        index=np.arange(count, dtype=np.int32),
    )
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


def peak_bytes(program: Any) -> int:
    """Arguments, results that do not take an argument's place, and what lies between; 0 where the compiler does not say."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


class Case:
    """A compiled program with its arguments: training, or inference."""

    def __init__(self, config: ConfigDict, mesh: Mesh, images: int, training: bool):
        self.images = images * mesh.size
        resnet = make_resnet(
            config.random.backbone,
            config.random.base_channels,
            stem=config.random.stem,
            dtype=choose("precision", config.precision, PRECISIONS)[0],
        )
        model = make_model(config, resnet, CLASSES, IMAGENET_MEAN, IMAGENET_STD)
        frozen = Frozen(config.model.frozen_stages, config.model.batch_norm == "frozen")
        optimizer = make_optimizer(make_base_optimizer(config, 1000), frozen)
        batch = noise(mesh, config, self.images)
        image, size = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64, jnp.int32)
        variables = jax.jit(model.network.init)(jax.random.key(0), image, size)
        params, stats = variables["params"], variables[STATS]
        state = DetectorState(jnp.uint32(0), jnp.int32(0), params, stats, optimizer.init(params))
        state = jax.device_put(state, NamedSharding(mesh, P()))
        if training:
            function: Any = make_step(model, optimizer, frozen, mesh, self.images)
            self.arguments: tuple[Any, ...] = (state, batch)
        else:
            function, self.arguments = make_detect(model, mesh), (state.params, state.stats, batch)
        self.training = training
        begin = time.perf_counter()
        self.program = function.lower(*self.arguments).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.program_bytes = peak_bytes(self.program)
        self.flops = (self.program.cost_analysis() or {}).get("flops", 0.0) / images
        self.seconds: list[float] = []
        self.turn()
        self.seconds.clear()  # the first one warms up

    def turn(self) -> None:
        """Run once."""
        begin = time.perf_counter()
        result = self.program(*self.arguments)
        jax.block_until_ready(result)
        self.seconds.append(time.perf_counter() - begin)
        if self.training:  # which took its state away
            self.arguments = (result[0], self.arguments[1])


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", default="1,2", help="images a device, comma-separated")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each case")
    parser.add_argument("--rows", type=pathlib.Path, help="JSON-lines file to append the rows to")
    options, settings = parser.parse_known_args(argv[1:])
    try:
        config = parse_command([argv[0], *settings, "--workdir=unused"]).config
        mesh = make_mesh(make_devices(config))
        counts = [int(count) for count in options.images.split(",")]
        if min(counts) < 1 or options.repeats < 1:
            raise ConfigError("--images and --repeats must be positive")
        with jax.set_mesh(mesh):
            cases = {
                (kind, n): Case(config, mesh, n, kind == "training")
                for kind in ("training", "inference")
                for n in counts
            }
            for _ in range(options.repeats):
                for case in cases.values():
                    case.turn()
    except (ConfigError, ValueError) as error:
        print(f"detection: {error}", file=sys.stderr)
        return 2
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    about = {
        "device": f"{mesh.size} x {device.device_kind}",
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }
    about |= {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(argv),
        "device_peak_bytes": peak,
    }
    print(
        f"{about['device']}, jax {about['jax']}, {config.random.backbone}, {config.precision}, "
        f"median of {options.repeats} turns"
    )
    print(
        f"{'case':12}{'images a device':>16}{'images/s':>10}{'GFLOP/image':>13}{'program GiB':>13}{'compile s':>11}"
    )
    for (kind, count), case in cases.items():
        speed = case.images / statistics.median(case.seconds)
        numbers = f"{speed:10.2f}{case.flops / 1e9:13.1f}{case.program_bytes / 2**30:13.2f}{case.compile_seconds:11.1f}"
        print(f"{kind:12}{count:16d}{numbers}")
        row = about | {"case": kind, "images_per_device": count, "images_per_second": speed}
        row |= {
            "program_bytes": case.program_bytes,
            "flops_per_image": case.flops,
            "seconds": case.seconds,
        }
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if peak:
        print(f"peak memory of the device over all cases: {peak / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
