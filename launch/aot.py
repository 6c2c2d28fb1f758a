"""Compiles a run for TPUs that are not there, and says whether it fits, what travels between chips, and what bounds it.

python -m launch.aot --config=configs/hexa_moco.py --topology=v5e:4x4 [--config.key=value ...]
--topology      KIND:SHAPE, such as v5e:16x16, v4:2x2x2 or v5p:2x2x1; shapes are in chips
--programs      comma-separated: train, augment (what of it makes crops), init, refresh (k-means; methods with clusters),
                features (evaluation); all by default
--num_examples  of the data set; ImageNet's 1,281,167 by default
--rows          JSON file that keeps the results; what it holds is not compiled again (docs/scaling.json by default)
--hlo=FOLDER    keep the compiled programs' HLO there, to look into: one file a program
--table=FILE    write all rows as a Markdown table and compile nothing

Nothing but a CPU is needed, and libtpu (pip install libtpu): the compiler is the real one, what it says of cycles is an
estimate. A step of a ResNet-50 takes 4 to 10 minutes to compile on two cores.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.features import make_extractor
from hexa_jax.methods.base import Method
from hexa_jax.storage.workdir import write_json
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.step import Trainer
from launch.program import CHIPS, Chip, describe, microbatches_that_fit, too_large

IMAGENET = 1_281_167
PROGRAMS = ("train", "augment", "init", "refresh", "features")
EVALUATION_ROWS = 256  # images a chip
GIB = 2**30


class AotError(ValueError):
    """A mistake in the command; one line."""


def devices_of(topology: str) -> list[jax.Device]:
    """One device per chip of a topology KIND:SHAPE; AotError if there is none."""
    kind, _, shape = topology.partition(":")
    settings: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        sides = [int(side) for side in shape.split("x")] + [1]
        if sides[0] % 2 or sides[1] % 2:  # less than a whole host of 2 x 2 chips
            settings["chips_per_host_bounds"] = tuple((*sides, 1)[:3])
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise AotError(f"--topology={topology}: {str(error).splitlines()[0][:200]}") from None


def compile_program(trainer: Trainer, program: str, hlo: pathlib.Path | None = None) -> dict[str, Any]:
    """Numbers of one program, whether it fits or not; its HLO goes to the file `hlo`."""
    begin = time.monotonic()
    with jax.set_mesh(trainer.mesh):
        steps, state = trainer.compile(), trainer.state_shapes()
        try:
            if program in ("train", "augment"):
                lowered = getattr(steps, program).lower(state, trainer.batch_shapes(), None)
            elif program == "init":
                lowered = steps.init.lower(jax.ShapeDtypeStruct((), jnp.uint32))
            elif program == "refresh":
                lowered = steps.refresh.lower(state, jax.ShapeDtypeStruct((), jnp.int32))
            else:
                size = trainer.objective.crops.resolutions[0].size
                images = jax.ShapeDtypeStruct((EVALUATION_ROWS * trainer.mesh.size, size, size, 3), jnp.uint8)
                extractor: Any = make_extractor(trainer.objective.network, trainer.mesh, jnp.bfloat16)
                lowered = extractor.lower(state.params["network"], state.batch_stats, images)
            compiled = lowered.compile()
            if hlo is not None:
                hlo.parent.mkdir(parents=True, exist_ok=True)
                hlo.write_text(compiled.as_text())
            found: dict[str, Any] | None = describe(compiled)
        except jax.errors.JaxRuntimeError as error:
            found = too_large(str(error))
            if found is None:
                raise
    assert found is not None
    return found | {"compile_seconds": round(time.monotonic() - begin, 1)}


def advice(trainer: Trainer, row: dict[str, Any], chip: Chip) -> str:
    """Whether a train step fits, and what to change if it does not."""
    peak, limit = row["peak_bytes"], row.get("limit_bytes", chip.memory)
    if row["fits"]:
        return f"fits: {peak / GIB:.1f} of {limit / GIB:.0f} GiB a chip"
    layout = trainer.objective.layout
    shapes = jax.tree.leaves((trainer.state_shapes(), trainer.batch_shapes()))
    fixed = sum(leaf.dtype.itemsize * _share(leaf) for leaf in shapes)
    allowed = [m for m in range(1, layout.batch_size + 1) if layout.batch_size % (m * layout.num_devices) == 0]
    number = microbatches_that_fit(layout.microbatches, peak, fixed, limit, allowed)
    hint = "use more chips" if number is None else f"--config.runtime.microbatches={number} should fit"
    return f"does not fit: {peak / GIB:.1f} of {limit / GIB:.1f} GiB a chip; {hint}"


def _share(leaf: jax.ShapeDtypeStruct) -> int:
    """Elements of a leaf on one chip."""
    assert leaf.sharding is not None
    shard = leaf.sharding.shard_shape(leaf.shape)
    return int(jnp.prod(jnp.array(shard, jnp.float32))) if shard else 1


def bound(row: dict[str, Any], chip: Chip) -> dict[str, float]:
    """Milliseconds that arithmetic, memory traffic and the compiler's cycles would take."""
    if not row["fits"]:
        return {}
    times = {
        "flops_ms": row["flops"] / chip.flops,
        "memory_ms": row["bytes_accessed"] / chip.bandwidth,
        "cycles_ms": row["estimated_cycles"] / chip.clock,
    }
    return {name: round(1000 * seconds, 3) for name, seconds in times.items()}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """A table of all rows."""
    head = [
        "config",
        "chips",
        "program",
        "peak GiB",
        "TFLOP",
        "GB",
        "Mcycles",
        "ms: FLOP / memory / cycles",
        "between chips",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows.values():
        cells = [f"{row['config']} {' '.join(row['overrides'])}".strip(), row["topology"], row["program"]]
        if row["fits"]:
            travel = ", ".join(
                f"{entry['count']} {kind} ({entry['bytes'] / 1e6:.1f} MB)" for kind, entry in row["collectives"].items()
            )
            cells += [
                f"{row['peak_bytes'] / GIB:.1f}",
                f"{row['flops'] / 1e12:.2f}",
                f"{row['bytes_accessed'] / 1e9:.1f}",
            ]
            cells += [f"{row['estimated_cycles'] / 1e6:.1f}"]
            cells += [f"{row['flops_ms']:.1f} / {row['memory_ms']:.1f} / {row['cycles_ms']:.1f}", travel or "nothing"]
        else:
            cells += [f"{row['peak_bytes'] / GIB:.1f}: {row['advice']}", "", "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Compile what is asked for and not known yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--num_examples", type=int, default=IMAGENET)
    parser.add_argument("--rows", type=pathlib.Path, default=pathlib.Path("docs/scaling.json"))
    parser.add_argument("--hlo", type=pathlib.Path)
    parser.add_argument("--table", type=pathlib.Path)
    options, settings = parser.parse_known_args(argv[1:])
    rows: dict[str, dict[str, Any]] = json.loads(options.rows.read_text()) if options.rows.is_file() else {}
    if options.table:
        options.table.write_text(markdown(rows))
        return 0
    try:
        chip = CHIPS.get(options.topology.partition(":")[0])
        unknown = set(options.programs.split(",")) - set(PROGRAMS)
        if chip is None or unknown:
            raise AotError(f"--topology={options.topology} or --programs={options.programs} is not known; see --help")
        if importlib.util.find_spec("libtpu") is None:
            raise AotError("the TPU compiler is missing: pip install libtpu")
        config = parse_command([argv[0], *settings, "--workdir=unused"]).config
        trainer = make_trainer(config, options.num_examples, devices_of(options.topology), num_classes=1000)
    except (AotError, ConfigError) as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    named = next(word for word in settings if word.startswith("--config=")).partition("=")[2]
    overrides = sorted(word.removeprefix("--config.") for word in settings if word.startswith("--config."))
    fits = True
    for program in options.programs.split(","):
        if program == "refresh" and type(trainer.objective.method).refresh is Method.refresh:  # nothing to do
            continue
        versions = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
        key = f"{named} {' '.join(overrides)} {options.topology} {options.num_examples} {program} {versions}"
        if key not in rows:
            row = compile_program(trainer, program, options.hlo and options.hlo / f"{program}.hlo")
            row |= {"config": pathlib.PurePath(named).stem, "overrides": overrides, "topology": options.topology}
            row |= {"program": program, "versions": versions} | bound(row, chip)
            row["advice"] = advice(trainer, row, chip) if program == "train" else ""
            latest = json.loads(options.rows.read_text()) if options.rows.is_file() else {}  # another may have written
            rows = latest | {key: row}
            write_json(options.rows, rows)
        fits &= rows[key]["fits"]
        _show(program, rows[key])
    return 0 if fits else 1


def _show(program: str, row: dict[str, Any]) -> None:
    print(f"{program}: {row['advice'] or ('fits' if row['fits'] else 'does not fit')}")
    if not row["fits"]:
        return
    print(f"  peak {row['peak_bytes'] / GIB:.2f} GiB a chip, of which arguments {row['argument_bytes'] / GIB:.2f}")
    print(
        f"  {row['flops'] / 1e12:.3f} TFLOP, {row['bytes_accessed'] / 1e9:.2f} GB, {row['estimated_cycles'] / 1e6:.2f} Mcycles"
    )
    print(
        f"  at least {row['flops_ms']} ms of arithmetic, {row['memory_ms']} ms of memory; estimated {row['cycles_ms']} ms"
    )
    for kind, entry in row["collectives"].items():
        print(f"  {entry['count']} x {kind}, {entry['bytes'] / 1e6:.3f} MB")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
