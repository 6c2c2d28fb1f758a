"""Speed of one training step of a config, with each hard view on and off, and the shared against the separate attack.

python benchmarks/step.py --config=configs/quickstart.py [--repeats=7] [--rows=FILE.json] [--config.key=value ...]
python benchmarks/step.py --peer (--config=... | --cases=moco_resnet50,deepcluster_8crop) [--variants=plain,auxiliary,main,cutmix]

Variants take turns, so that a machine whose speed drifts treats them alike: quote the ratios. Input
is random and ready on the device; what the host needs for it is not measured here. The last line is
the augmentation on the device as a program of its own, in the same turns, and its share of a step.

--peer times each variant beside the same step in plain PyTorch, in a process of its own, turn by turn on the same device; a
ratio above 1 says that ours is faster. benchmarks/compare.py says what the sides have in common and
names the cases. FLOPs are those of matrix products and convolutions, the same for both sides; "peak
%" is their share of the device's public peak.
"""

import argparse
import os
import pathlib
import statistics
import sys
from typing import Any

# the repository need not be installed
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax

from benchmarks.compare import VIEWS, compare
from benchmarks.hardware import add_rows, surroundings
from benchmarks.ours import VARIANTS, Augmentation, Variant
from benchmarks.peers.modes import COMPILE_MODES
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError


def alone(options: argparse.Namespace, settings: list[str], argv: list[str]) -> int:
    """Time the variants of one config beside each other, in this process."""
    config = parse_command([argv[0], *settings, "--workdir=unused"]).config
    variants = {name: Variant(config, views) for name, views in VARIANTS.items()}
    augmentation = Augmentation(variants["plain"])
    for _ in range(options.repeats):
        for variant in variants.values():
            variant.seconds.append(variant.run())
        augmentation.seconds.append(augmentation.run())
    device, devices = jax.devices()[0], variants["plain"].trainer.mesh.size
    print(
        f"{devices} x {device.device_kind}, jax {jax.__version__}, {config.method}, "
        f"{config.model.backbone}, ",
        end="",
    )
    print(
        f"B = {config.batch_size}, crops {config.data.crop_size}, median of {options.repeats} turns"
    )
    print(f"{'variant':38}{'images/s':>10}{'x plain':>9}{'MFLOP/image':>13}{'compile s':>11}")
    medians = {name: statistics.median(variant.seconds) for name, variant in variants.items()}
    plain, around = medians["plain"], surroundings(argv)
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        seconds = medians[name]
        # The compiler counts one device's share.
        flops = (
            variant.compiler.get("flops", 0.0) * variant.trainer.mesh.size / config.batch_size
        )  # per image, all crops
        numbers = f"{config.batch_size / seconds:10.0f}{seconds / plain:9.2f}{flops / 1e6:13.1f}"
        print(f"{name:38}{numbers}{variant.compile_seconds:11.1f}")
        ours = {
            "seconds": seconds,
            "all_seconds": variant.seconds,
            "compile_seconds": variant.compile_seconds,
        }
        row = {
            "benchmark": "step alone",
            "variant": name,
            "device": device.device_kind,
            "flops": variant.flops,
        }
        rows.append(row | {"ours": ours, **around})
    rows.append(_augmentation_row(augmentation, medians) | {"device": device.device_kind, **around})
    add_rows(options.rows, rows)
    return 0


def _augmentation_row(augmentation: Augmentation, medians: dict[str, float]) -> dict[str, Any]:
    """Prints and returns what the augmentation takes, and its share of the steps in `medians` (seconds by variant)."""
    seconds = statistics.median(augmentation.seconds)
    shares = {name: seconds / medians[name] for name in ("plain", "adversarial, auxiliary")}
    parts = " and ".join(f"{100 * share:.1f} % of {name!r}" for name, share in shares.items())
    print(f"augmentation on the device: {1000 * seconds:.2f} ms, {parts}")
    ours = {"seconds": seconds, "all_seconds": augmentation.seconds}
    return {
        "benchmark": "step alone",
        "variant": "augmentation",
        "ours": ours,
        "share_of_step": shares,
    }


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError where an option cannot work, before anything is compiled."""
    for name in ("repeats", "turn_seconds", "timeout"):
        if not (value := getattr(options, name)) > 0:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be positive")
    try:
        add_rows(options.rows, [])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rows={options.rows} cannot take rows: {error}") from None


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,  # one line instead of the usage
        allow_abbrev=False,  # a config's settings are read by another parser
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed turns of each variant, and of each side"
    )
    parser.add_argument("--rows", type=pathlib.Path, help="JSON file to append the results to")
    peer = parser.add_argument_group("with --peer")
    peer.add_argument("--peer", action="store_true", help="time the same step in PyTorch, too")
    peer.add_argument(
        "--cases", default="", help="named cases instead of a config, separated by commas"
    )
    peer.add_argument("--variants", default=",".join(VIEWS), help="which views")
    peer.add_argument(
        "--augment", action="store_true", help="ours augments crops on the device, PyTorch does not"
    )
    peer.add_argument(
        "--compile",
        nargs="?",
        const="default",
        default="auto",
        choices=("auto", *COMPILE_MODES),
        help="torch.compile's mode; auto: the default one on CUDA, off on a CPU",
    )
    peer.add_argument("--turn-seconds", type=float, default=1.0, help="about how long a turn lasts")
    peer.add_argument(
        "--timeout",
        type=float,
        default=1200.0,
        help="seconds to wait for a side to compile or to run a turn",
    )
    peer.add_argument("--peer-python", default=sys.executable, help="interpreter that has PyTorch")
    try:
        options, settings = parser.parse_known_args(argv[1:])
        check(options)
        return (compare if options.peer else alone)(options, settings, argv)
    except (argparse.ArgumentError, ConfigError) as error:
        print(f"step: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
