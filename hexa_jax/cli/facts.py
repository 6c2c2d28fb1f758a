"""Find out what `choices.py` decides by: images, device, network of given weights."""

import json
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hexa_jax.cli.choices import DataFacts, DeviceFacts
from hexa_jax.data.decode import BadImage, decode
from hexa_jax.data.source import DataError, Source
from hexa_jax.data.subset import spread
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.training.memory import available

SAMPLE, SAMPLE_SECONDS = (
    64,
    5.0,
)  # images that are read to find out what they are like, and for how long
PRODUCT = {"cpu": 1024, "gpu": 8192, "tpu": 8192}  # side of the matrices whose product is timed
REPEATS = 4


def data_facts(source: Source) -> tuple[DataFacts, list[str]]:
    """Read a few images spread over a source.

    Returns:
        The facts, and one line for each image that cannot be read.

    Raises:
        DataError: none of them can be read.
    """
    sides: list[int] = []
    seconds: list[float] = []
    problems: list[str] = []
    end = time.monotonic() + SAMPLE_SECONDS
    for index in np.random.default_rng(0).permutation(spread(len(source), SAMPLE)):
        if time.monotonic() > end and len(sides) >= 3:
            break
        begin = time.perf_counter()
        try:
            image = decode(source[int(index)]["image"], source.name(int(index)))
        except BadImage as error:
            problems.append(str(error))
            continue
        seconds.append(time.perf_counter() - begin)
        sides.append(min(image.shape[:2]))
    if not sides:
        raise DataError(f"none of {len(problems)} images can be read; the first is {problems[0]}")
    facts = DataFacts(
        images=len(source),
        short_side=int(np.median(sides)),
        decode_seconds=float(np.mean(seconds)),
        sampled=len(sides) + len(problems),
        unreadable=len(problems),
        num_classes=source.num_classes or 0,
    )
    return facts, problems


def device_facts(num_devices: int = 0) -> DeviceFacts:
    """Ask the devices of a run, and time a matrix product on one of them.

    Args:
        num_devices: the first so many; 0: all.
    """
    devices = jax.devices()[: num_devices or None]
    platform = (
        "cpu" if devices[0].platform == "cpu" else "tpu" if devices[0].platform == "tpu" else "gpu"
    )
    room = available(make_mesh(devices))
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return DeviceFacts(
        platform=platform,
        kind=devices[0].device_kind,
        count=len(devices),
        memory=room or 0,
        cores=cores,
        # Devices of a CPU share its cores.
        flops=_product_flops(devices[0], platform) / (len(devices) if platform == "cpu" else 1),
    )


def _product_flops(device: jax.Device, platform: str) -> float:
    """Measure FLOPs per second of a matrix product: float32 on a CPU, else bfloat16."""
    side = PRODUCT[platform]
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    matrix = jax.device_put(jnp.ones((side, side), dtype), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    fastest = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * side**3 / fastest


def network_of_weights(name: str) -> dict[str, Any]:
    """Return the settings of the network that given weights are of, as far as a glance tells.

    Args:
        name: as config.model.init takes it: a workdir, a weights file, or a library's name such as
            timm:resnet50.

    Returns:
        backbone, base_channels and stem; empty where only opening the weights would tell.

    Raises:
        CheckpointError, WeightsError: a path with no weights.
    """
    if named := re.match(r"(timm|torchvision|hf):(.*)", name):
        depth = re.search(r"(?<!wide_)(?<!wide-)resnet-?(18|34|50|101)(?!\d)", named[2])
        return {"backbone": f"resnet{depth[1]}"} if depth else {}
    saved = pathlib.Path(name).expanduser() / "config.json"
    if saved.is_file():
        try:
            model = json.loads(saved.read_text())["model"]
            return {key: model[key] for key in ("backbone", "base_channels", "stem")}
        except (ValueError, KeyError, TypeError):
            return {}  # the run says what is wrong with it
    from hexa_jax.evals.backbone import load_backbone

    backbone = load_backbone(name).network.backbone
    return {
        "backbone": f"resnet{backbone.depth}",
        "base_channels": backbone.base_channels,
        "stem": backbone.stem,
    }
