"""Compile a run for TPUs or GPUs that are not there; say whether it fits, what travels, and what bounds it.

python -m launch.aot --config=configs/hexa_moco.py --topology=h100:8 [--config.key=value ...]
--topology      GPUs: KIND:N of one host, or KIND:HOSTSxN, such as h100:8 or h200:2x8; a100, h100, h200 or b200.
                TPUs: KIND:SHAPE in chips, such as v5e:16x16, v4:2x2x2 or v5p:2x2x1
--programs      comma-separated; all by default. Of pre-training: train, augment (what of it makes crops), init, refresh
                (k-means; methods with clusters), features (evaluation). Of
                configs/eval/detection_voc.py: train, detect
--num_examples  of the data set; ImageNet's 1,281,167 by default
--rows          JSON file that keeps the results; what it holds is not compiled again (docs/scaling.json by default)
--hlo=FOLDER    keep the compiled programs' HLO there, to look into: one file a program
--table=FILE    write all rows as Markdown tables and compile nothing
--kernels       with GPUs: print the tables of kernels as Markdown as well

The compilers are the real ones and need no accelerator. For TPUs `pip install libtpu`: its estimate
of cycles is shown. For GPUs `pip install -e '.[aot-gpu]'`: bytes and FLOPs of each kernel are
counted from the program. A step of a ResNet-50 takes 2 to 10 minutes to compile on two cores.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

# alarms about slow compilation, a paragraph each
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import hexa_jax
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.storage.workdir import write_json
from hexa_jax.training import memory
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.step import Trainer
from launch import lowering
from launch.gpu_topology import Gpu, TopologyError, gpu_devices, plugin_version, read_gpus
from launch.program import CHIPS, Chip, describe, describe_on_gpu, microbatches_that_fit, too_large
from launch.tables import GIB, kernel_table, lines_of, markdown

IMAGENET = 1_281_167
VOC = 16_551  # training images of VOC 2007 and 2012
PACKAGE = str(pathlib.Path(hexa_jax.__file__).parent)
Device = Chip | Gpu


class AotError(ValueError):
    """A mistake in the command; one line."""


def known_devices() -> dict[str, Device]:
    """Return what is known of each kind of chip and GPU."""
    return CHIPS | read_gpus()


def devices_of(topology: str, device: Device) -> list[jax.Device]:
    """Return one device per chip or GPU of a topology KIND:SHAPE.

    Raises:
        AotError: there is no such topology, or no compiler for it.
    """
    kind, _, shape = topology.partition(":")
    if isinstance(device, Gpu):
        if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
            raise AotError(
                f"--topology={topology}: GPUs are {kind}:N of one host or {kind}:HOSTSxN, such as "
                f"{kind}:2x8"
            )
        hosts, _, gpus = shape.rpartition("x")
        try:
            return gpu_devices(device, int(hosts or 1), int(gpus))
        except TopologyError as error:
            raise AotError(f"--topology={topology}: {error}") from None
    if importlib.util.find_spec("libtpu") is None:
        raise AotError("the TPU compiler is missing: pip install libtpu")
    settings: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        sides = [int(side) for side in shape.split("x")] + [1]
        if sides[0] % 2 or sides[1] % 2:  # less than a whole host of 2 x 2 chips
            settings["chips_per_host_bounds"] = tuple((*sides, 1)[:3])
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise AotError(f"--topology={topology}: {str(error).splitlines()[0][:200]}") from None


def compile_program(
    lower: Callable[[], Any], device: Device, hlo: pathlib.Path | None = None
) -> dict[str, Any]:
    """Return the numbers of one program, whether it fits or not.

    Args:
        lower: returns the program as jax lowered it.
        device: what it is compiled for.
        hlo: file for its HLO.
    """
    begin = time.monotonic()
    try:
        compiled = lower().compile()
        if hlo is not None:
            hlo.parent.mkdir(parents=True, exist_ok=True)
            hlo.write_text(compiled.as_text())
        found: dict[str, Any] | None = (
            describe_on_gpu(compiled, device, PACKAGE)
            if isinstance(device, Gpu)
            else describe(compiled)
        )
    except jax.errors.JaxRuntimeError as error:
        found = too_large(str(error))
        if found is None:
            raise
    assert found is not None
    return found | {"compile_seconds": round(time.monotonic() - begin, 1)}


def advice(trainer: Trainer, row: dict[str, Any], device: Device) -> str:
    """Return whether a train step fits, and what to change if it does not."""
    peak, limit = row["peak_bytes"], row.get("limit_bytes", device.memory)
    if isinstance(device, Gpu):
        return _advice_for_gpu(trainer, row, device)
    if row["fits"]:
        return f"fits: {peak / GIB:.1f} of {limit / GIB:.0f} GiB a chip"
    layout = trainer.objective.layout
    shapes = jax.tree.leaves((trainer.state_shapes(), trainer.batch_shapes()))
    fixed = sum(leaf.dtype.itemsize * _share(leaf) for leaf in shapes)
    allowed = [
        m
        for m in range(1, layout.batch_size + 1)
        if layout.batch_size % (m * layout.num_devices) == 0
    ]
    number = microbatches_that_fit(layout.microbatches, peak, fixed, limit, allowed)
    hint = (
        "use more chips" if number is None else f"--config.runtime.microbatches={number} should fit"
    )
    return f"does not fit: {peak / GIB:.1f} of {limit / GIB:.1f} GiB a chip; {hint}"


def _advice_for_gpu(trainer: Trainer, row: dict[str, Any], gpu: Gpu) -> str:
    peak, limit = row["peak_bytes"], row["limit_bytes"]
    amount = f"{peak / GIB:.1f} of the {limit / GIB:.1f} GiB that jax takes of a GPU's {gpu.memory / GIB:.1f}"
    if row["fits"]:
        return f"fits: {amount}"
    parameters = jax.tree.leaves(trainer.state_shapes().params)
    gradients = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in parameters)
    need = memory.Need(peak - row["temporary_bytes"], row["temporary_bytes"])
    found = memory.microbatches_that_fit(trainer.objective.layout, need, gradients, limit)
    if found is None:
        return f"does not fit: {amount}; use more GPUs"
    layout, same = found
    settings = f"--config.runtime.microbatches={layout.microbatches}"
    if not same:
        settings += f" --config.bn_group_size={layout.bn_group_size} --config.cutmix_block={layout.cutmix_block}"
    return f"does not fit: {amount}; {settings} should"


def _share(leaf: jax.ShapeDtypeStruct) -> int:
    """Elements of a leaf on one chip."""
    assert leaf.sharding is not None
    shard = leaf.sharding.shard_shape(leaf.shape)
    return int(jnp.prod(jnp.array(shard, jnp.float32))) if shard else 1


def bound(row: dict[str, Any], device: Device) -> dict[str, float]:
    """Return the milliseconds that arithmetic, memory traffic and the compiler's cycles would take on a TPU."""
    if isinstance(device, Gpu) or not row["fits"]:
        return {}
    times = {
        "flops_ms": row["flops"] / device.flops,
        "memory_ms": row["bytes_accessed"] / device.bandwidth,
        "cycles_ms": row["estimated_cycles"] / device.clock,
    }
    return {name: round(1000 * seconds, 3) for name, seconds in times.items()}


def versions_of(device: Device) -> str:
    """Return the versions of jax and of the compiler; TopologyError if there is none for GPUs."""
    compiler = (
        plugin_version()
        if isinstance(device, Gpu)
        else f"libtpu {importlib.metadata.version('libtpu')}"
    )
    return f"jax {jax.__version__}, {compiler}"


def main(argv: list[str]) -> int:
    """Compile what is asked for and not known yet; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--programs", default="")
    parser.add_argument("--num_examples", type=int, default=IMAGENET)
    parser.add_argument("--rows", type=pathlib.Path, default=pathlib.Path("docs/scaling.json"))
    parser.add_argument("--hlo", type=pathlib.Path)
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--kernels", action="store_true")
    options, settings = parser.parse_known_args(argv[1:])
    rows: dict[str, dict[str, Any]] = (
        json.loads(options.rows.read_text()) if options.rows.is_file() else {}
    )
    if options.table:
        options.table.write_text(markdown(rows))
        return 0
    try:
        device = known_devices().get(options.topology.partition(":")[0])
        if device is None:
            raise AotError(
                f"--topology={options.topology} is not known: use {', '.join(known_devices())}; "
                "see --help"
            )
        config = parse_command([argv[0], *settings, "--workdir=unused"]).config
        known = {"pretrain": lowering.PRETRAINING, "detection": lowering.DETECTION}.get(config.task)
        if known is None:
            raise AotError(
                f"config.task={config.task} is not compiled: use a config of pre-training or "
                "detection"
            )
        wanted = options.programs.split(",") if options.programs else list(known)
        if unknown := set(wanted) - set(known):
            raise AotError(
                f"--programs={','.join(sorted(unknown))} is not known: use {','.join(known)}"
            )
        mesh = make_mesh(devices_of(options.topology, device))
        trainer = None
        if config.task == "pretrain":
            trainer = make_trainer(
                config, options.num_examples, list(mesh.devices.flat), num_classes=1000
            )
            programs = lowering.pretraining(trainer)
        else:
            programs = lowering.detection(
                config, mesh, num_classes=20, steps_per_epoch=VOC // config.batch_size
            )
    except (AotError, ConfigError) as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    named = next(word for word in settings if word.startswith("--config=")).partition("=")[2]
    overrides = sorted(
        word.removeprefix("--config.") for word in settings if word.startswith("--config.")
    )
    versions, fits = versions_of(device), True
    for program in (name for name in wanted if name in programs):
        key = f"{named} {' '.join(overrides)} {options.topology} {options.num_examples} {program} {versions}"
        if key not in rows:
            print(f"aot: compiling {program}, which takes minutes", file=sys.stderr)
            with jax.set_mesh(mesh):
                row = compile_program(
                    programs[program], device, options.hlo and options.hlo / f"{program}.hlo"
                )
            row |= {
                "config": pathlib.PurePath(named).stem,
                "overrides": overrides,
                "topology": options.topology,
            }
            row |= {"program": program, "versions": versions} | bound(row, device)
            row["advice"] = (
                advice(trainer, row, device) if trainer is not None and program == "train" else ""
            )
            # another may have written
            latest = json.loads(options.rows.read_text()) if options.rows.is_file() else {}
            rows = latest | {key: row}
            write_json(options.rows, rows)
        fits &= rows[key]["fits"]
        print("\n".join(lines_of(rows[key])))
        if options.kernels and "by_kind" in rows[key]:
            print("\n" + kernel_table(rows[key]))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
