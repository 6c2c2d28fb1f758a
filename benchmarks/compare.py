"""Cases that `benchmarks/step.py --peer` times beside PyTorch, and how: process by process, turn by turn, one row a variant.

Both sides do the same work: the same network, precision, crops (uint8, on the device), forward and
backward passes, queue or bank, and SGD. Left out on both sides: photometric augmentation (unless
--augment, which then is work of ours alone), and what reading and cutting images costs the host.
Ours computes a few scalars for the log besides.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.hardware import add_rows, peak_of, surroundings
from benchmarks.ours import VARIANTS, num_examples
from benchmarks.peers.case import Case
from benchmarks.turns import (
    ROOT,
    Refusal,
    Worker,
    WorkerError,
    alternate,
    one_after_the_other,
    ratio,
)
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.training.factory import make_method, make_network, make_resolutions
from hexa_jax.training.schemes import make_scheme
from hexa_jax.views import HardView
from hexa_jax.views.base import LABEL
from hexa_jax.views.cutmix import CutMix

# Config file below configs/, and settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "moco_resnet50": ("hexa_moco.py", {}),
    "moco_resnet18": ("cifar10_hexa_moco.py", {"precision": "bfloat16"}),
    "moco_quickstart": (
        "quickstart.py",
        {"method": "moco", "moco.queue_size": 4096, "model.head_batch_norm": False},
    ),
    "deepcluster_8crop": ("hexa_dcluster_8crop.py", {"batch_size": 256}),
    "deepcluster_quickstart": ("quickstart.py", {}),
    "tiny_moco": ("tiny.py:method=moco", {}),
    "tiny_8crop": (
        "tiny.py",
        {
            "data.num_crops": (2, 6),
            "data.crop_size": (16, 8),
            "data.min_scale": (0.2, 0.1),
            "data.max_scale": (1.0, 0.2),
        },
    ),
}
VIEWS = {
    "plain": "plain",
    "auxiliary": "adversarial, auxiliary",
    "main": "adversarial, main, shared",
    "cutmix": "adversarial (auxiliary) + cut-mixed",
}
NO_AUGMENTATION = {
    f"augment.{name}_probability": (0.0,) for name in ("jitter", "gray", "blur", "solarize")
}


def settings_of(name: str) -> list[str]:
    """The command-line settings of a named case."""
    file, overrides = CASES[name]
    return [
        f"--config={ROOT / 'configs' / file}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]


def in_common(config: ConfigDict, augment: bool) -> dict[str, Any]:
    """What both sides need: one device, BatchNorm groups and blocks as large as the batch, SGD, crops from the host."""
    whole = dict.fromkeys(("bn_group_size", "cutmix_block", "shuffle_block"), config.batch_size)
    changes = whole | {"optimizer.name": "sgd", "data.on_device": False, "scheme": ""}
    changes["views.average"] = False  # the peer does not divide
    changes |= {"runtime.microbatches": 1, "runtime.num_devices": 1}
    return changes if augment else changes | NO_AUGMENTATION


def plain_view(view: HardView) -> HardView:
    """The view without a schedule, replacement, other targets or shared boxes."""
    plain = dataclasses.replace(view, start_epoch=0.0, ramp_epochs=0.0, replace=0.0, target=LABEL)
    return dataclasses.replace(plain, one_box=False) if isinstance(plain, CutMix) else plain


def case_of(config: ConfigDict, views: dict[str, Any]) -> Case:
    """The step of a config as the peer computes it.

    Raises:
        ConfigError: the peer does not do this.
    """
    config = config.copy_and_resolve_references()
    config.views.update_from_flattened_dict(views)
    method, scheme = make_method(config), make_scheme(config)
    if config.method not in ("moco", "deepcluster"):
        raise ConfigError(f"config.method={config.method!r} has no peer: use moco or deepcluster")
    if config.precision not in ("bfloat16", "float32"):
        raise ConfigError(
            f"config.precision={config.precision!r} has no peer: use bfloat16 or float32"
        )
    settings = config.views
    known = {"adversarial", "cutmix"}
    if unknown := [
        view.name for view in scheme.views if view.name not in known or view != plain_view(view)
    ]:
        raise ConfigError(
            "the peer knows adversarial and cut-mixed views added from the first step on, not "
            f"{unknown[0]}"
        )
    plain = {"norm": "linf", "random_start": False, "max_increase": 0.0}
    for name, value in plain.items():
        if (found := settings[name]) != value:
            raise ConfigError(f"the peer knows no views.{name}={found!r}, only {value!r}")
    weights = scheme.weights(jnp.int32(0))
    network, crops = make_network(config, method), make_resolutions(config, method.key_crops)
    assert network.head is not None
    of_method: dict[str, Any] = (
        {"key_momentum": config.moco.momentum, "queue_size": config.moco.queue_size}
        if config.method == "moco"
        else {
            "num_clusters": config.deepcluster.num_clusters,
            "num_heads": config.deepcluster.num_heads,
            "assign_crops": config.deepcluster.assign_crops,
            "bank_steps": num_examples(config) // config.batch_size,
        }
    )
    return Case(
        method=config.method,
        precision=config.precision,
        batch_size=config.batch_size,
        depth=network.backbone.depth,
        base_channels=network.backbone.base_channels,
        stem=network.backbone.stem,
        zero_init_residual=config.model.zero_init_residual,
        head_hidden=network.head.hidden_dim,
        head_dim=network.head.out_dim,
        head_batch_norm=network.head.batch_norm,
        num_crops=tuple(crop.count for crop in crops),
        crop_size=tuple(crop.size for crop in crops),
        pixel_mean=network.pixel_mean,
        pixel_std=network.pixel_std,
        temperature=config[config.method].temperature,
        alpha1=float(weights.get("adversarial", 0.0)),
        alpha2=float(weights.get("cutmix", 0.0)),
        epsilon=scheme.attack.epsilon,
        step_size=scheme.attack.step_size,
        steps=scheme.attack.steps,
        attack_norm=scheme.attack.norm_set,
        cutmix_alpha=settings.cutmix.alpha,
        cutmix_beta=settings.cutmix.beta,
        learning_rate=config.optimizer.learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        **of_method,
    )


def torch_version(python: str) -> str | None:
    """Version of PyTorch in an interpreter; None where it has none."""
    try:
        found = subprocess.run(
            [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
        )
    except OSError as error:
        raise ConfigError(f"--peer-python={python} cannot be started: {error.strerror}") from None
    return found.stdout.strip() if found.returncode == 0 else None


def compare(options: argparse.Namespace, settings: list[str], argv: list[str]) -> int:
    """Time every chosen variant of every chosen case, print a line and write a row for each; returns the exit code."""
    chosen = [name for name in options.variants.split(",") if name]
    if unknown := [name for name in chosen if name not in VIEWS] or ([] if chosen else ["''"]):
        raise ConfigError(f"--variants={unknown[0]} is not known: use {', '.join(VIEWS)}")
    if options.cases and any(word.startswith("--config=") for word in settings):
        raise ConfigError("--cases has configs of its own: give --config or --cases, not both")
    names = [name for name in options.cases.split(",") if name]
    if unknown := [name for name in names if name not in CASES]:
        raise ConfigError(f"--cases={unknown[0]} is not known: use {', '.join(CASES)}")
    plan = [_planned(options, name, chosen, settings, argv) for name in names or [""]]
    version = torch_version(options.peer_python)
    if version is None:
        print(
            f"step: {options.peer_python} has no PyTorch (pip install torch): ours runs alone",
            file=sys.stderr,
        )
    around, failures = surroundings(argv), 0 if version else 1
    for name, config, arguments, cases in plan:
        _print_head(name or arguments[0].partition("=")[2], config)
        for variant, case in cases.items():
            views = VARIANTS[VIEWS[variant]]
            row: dict[str, Any] = {
                "benchmark": "step",
                "case": name,
                "variant": VIEWS[variant],
                **around,
            }
            row["augmentation"] = "ours alone" if options.augment else "left out on both sides"
            row["step"] = dataclasses.asdict(case)
            try:
                row |= _measure(options, arguments, views, case, version is not None)
                print(_line(row), flush=True)
            except Refusal as error:
                raise ConfigError(str(error)) from None
            except WorkerError as error:
                row["error"] = str(error)
                print(f"{VIEWS[variant]:38}failed: {error}", flush=True)
            failures += "error" in row or bool(row.get("not_finite"))
            add_rows(options.rows, [row])
    return 1 if failures else 0


class Planned(NamedTuple):
    """A config to measure, as words for the worker, and its step by variant; the name is empty unless it is one of CASES."""

    name: str
    config: ConfigDict
    arguments: list[str]
    cases: dict[str, Case]


def _planned(
    options: argparse.Namespace,
    name: str,
    variants: list[str],
    settings: list[str],
    argv: list[str],
) -> Planned:
    # This process must not ask jax for its devices: it would hold memory that the workers need.
    arguments = [*settings_of(name), *settings] if name else settings
    changes = in_common(
        parse_command([argv[0], *arguments, "--workdir=unused"]).config, options.augment
    )
    arguments = arguments + [f"--config.{key}={value}" for key, value in changes.items()]
    config = parse_command([argv[0], *arguments, "--workdir=unused"]).config
    return Planned(
        name,
        config,
        arguments,
        {variant: case_of(config, VARIANTS[VIEWS[variant]]) for variant in variants},
    )


def _measure(
    options: argparse.Namespace,
    arguments: list[str],
    views: dict[str, Any],
    case: Case,
    with_peer: bool,
) -> dict[str, Any]:
    """Both sides' numbers of one variant. A side that cannot start beside the other gets the device for itself."""
    ours = {"arguments": arguments, "views": views}
    platform = ""

    def start_ours() -> Worker:
        nonlocal platform
        worker = Worker(
            "hexa_jax", [sys.executable, "-m", "benchmarks.ours", json.dumps(ours)], options.timeout
        )
        platform = "cpu" if worker.facts["platform"] == "cpu" else "cuda"
        return worker

    def start_torch(mode: str) -> Worker:
        order = {"case": dataclasses.asdict(case), "device": platform, "compile": mode}
        command = [options.peer_python, "-m", "benchmarks.peers.torch_step", json.dumps(order)]
        return Worker("torch", command, options.timeout)

    notes: list[str] = []

    def turns(together: bool, mode: str) -> dict[str, Any]:
        starters: dict[str, Callable[[], Worker]] = {"ours": start_ours}
        if with_peer:
            starters["torch"] = lambda: start_torch(mode)
        return (alternate if together else one_after_the_other)(
            starters, options.repeats, options.turn_seconds
        )

    plans = [(True, options.compile), (False, options.compile), (False, "off")]
    if not with_peer:
        plans = plans[:1]
    for number, (together, mode) in enumerate(plans):
        try:
            found = turns(together, mode)
            break
        except Refusal:
            raise
        except WorkerError as error:
            if number + 1 == len(plans):
                raise
            notes.append(str(error))
            following = "one after the other" + (
                ", without torch.compile" if plans[number + 1][1] == "off" else ""
            )
            print(f"step: {error}; once more, {following}", file=sys.stderr)
    return _row(found, case, together, notes)


def _row(found: dict[str, Any], case: Case, together: bool, notes: list[str]) -> dict[str, Any]:
    """Rates and shares from seconds and facts."""
    facts = found["facts"]["ours"]
    peak = peak_of(facts["device"])
    row: dict[str, Any] = {
        "turns": "alternating" if together else "one after the other",
        "steps_a_turn": found["steps"],
    }
    row |= {
        "device": facts["device"],
        "flops": facts["flops"],
        "peak": peak._asdict() if peak else None,
        "notes": notes,
    }
    for side, seconds in found["seconds"].items():
        median = statistics.median(seconds)
        numbers = {
            "seconds": median,
            "all_seconds": seconds,
            "images_per_second": case.batch_size / median,
        }
        numbers["flops_per_second"] = facts["flops"] / median
        numbers["share_of_peak"] = (
            facts["flops"] / median / getattr(peak, case.precision) if peak else None
        )
        row[side] = numbers | found["facts"][side]
    if facts["compiler_bytes"]:
        row["ours"]["bytes_per_second"] = facts["compiler_bytes"] / row["ours"]["seconds"]
        row["ours"]["share_of_bandwidth"] = (
            row["ours"]["bytes_per_second"] / peak.bandwidth if peak else None
        )
    if "torch" in row:
        row["ratio"], row["ratio_low"], row["ratio_high"] = ratio(
            found["seconds"]["ours"], found["seconds"]["torch"]
        )
    losses = [loss for side in found["facts"].values() for loss in side["losses"].values()]
    row["not_finite"] = not all(map(math.isfinite, losses))
    return row


def _print_head(title: str, config: ConfigDict) -> None:
    size = " + ".join(
        f"{n} x {s}" for n, s in zip(config.data.num_crops, config.data.crop_size, strict=True)
    )
    print(
        f"\n{title}: {config.method}, {config.model.backbone}, crops {size}, B = "
        f"{config.batch_size}, {config.precision}"
    )
    print(
        f"{'':38}{'images/s':>10}{'torch':>10}{'ratio':>7}{'low-high':>12}"
        f"{'TFLOP/s':>9}{'peak %':>8}{'torch %':>8}{'GB/s':>8}"
    )


def _line(row: dict[str, Any]) -> str:
    ours, peer = row["ours"], row.get("torch")

    def percent(side: dict[str, Any] | None) -> str:
        return f"{100 * side['share_of_peak']:.1f}" if side and side["share_of_peak"] else "-"

    cells = f"{row['variant']:38}{ours['images_per_second']:10.0f}"
    if peer:
        spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        cells += f"{peer['images_per_second']:10.0f}{row['ratio']:7.2f}{spread:>12}"
    else:
        cells += f"{'-':>10}{'-':>7}{'-':>12}"
    cells += f"{ours['flops_per_second'] / 1e12:9.3f}{percent(ours):>8}{percent(peer):>8}"
    cells += f"{ours['bytes_per_second'] / 1e9:8.1f}" if "bytes_per_second" in ours else f"{'-':>8}"
    marks = [row["turns"]] if row["turns"] != "alternating" else []
    marks += ["a loss is not finite"] if row["not_finite"] else []
    marks += [f"torch.compile: {peer['compile']}"] if peer else []
    return cells + (f"  {'; '.join(marks)}" if marks else "")
