"""Speed of one training step of a config, with each hard view on and off, and the shared against the separate attack.

python benchmarks/step.py --config=configs/quickstart.py [--repeats=7] [--config.key=value ...]

Variants take turns, so that a machine whose speed drifts treats them alike: quote the ratios. Input is random and ready on
the device; what the host needs for it is not measured here.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hexa_jax.build import ConfigError, make_trainer
from hexa_jax.command import parse_command
from hexa_jax.methods.base import Batch
from hexa_jax.train_step import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"alpha1": 0.0, "alpha2": 0.0},
    "adversarial, auxiliary": {"alpha1": 1.0, "alpha2": 0.0, "attack_branch": "auxiliary"},
    "adversarial, main, separate": {"alpha1": 1.0, "alpha2": 0.0, "attack_branch": "main", "share_gradient": False},
    "adversarial, main, shared": {"alpha1": 1.0, "alpha2": 0.0, "attack_branch": "main", "share_gradient": True},
    "cut-mixed": {"alpha1": 0.0, "alpha2": 1.0},
    "adversarial (auxiliary) + cut-mixed": {"alpha1": 1.0, "alpha2": 1.0, "attack_branch": "auxiliary"},
}


def random_batch(trainer: Trainer) -> Batch:
    """A batch of noise with consistent row numbers."""
    shapes, batch_size = trainer.batch_shapes(), trainer.spec.batch_size
    rows = jnp.arange(batch_size, dtype=jnp.int32).reshape(shapes.row.shape)
    noise = lambda s: jax.random.randint(jax.random.key(s.ndim), s.shape, 0, 256, jnp.uint8)  # noqa: E731
    batch = shapes._replace(
        index=rows,
        row=rows,
        valid=jnp.ones(rows.shape, bool),
        label=rows,
        crops=tuple(noise(s) for s in shapes.crops),
    )
    if shapes.key_crops is not None:
        batch = batch._replace(key_crops=noise(shapes.key_crops), key_index=rows, key_row=rows)
    return jax.device_put(batch, jax.tree.map(lambda s: s.sharding, shapes))


class Variant:
    """A compiled step with its state."""

    def __init__(self, config: ConfigDict, views: dict[str, Any]):
        config = config.copy_and_resolve_references()
        config.views.update(views)
        self.trainer = make_trainer(config, 8 * config.batch_size + config.deepcluster.num_clusters)
        with jax.set_mesh(self.trainer.mesh):
            steps = self.trainer.compile()
            state, batch = steps.init(0), random_batch(self.trainer)
            if self.trainer.objective.method.needs_first_pass:
                state = steps.observe(state, batch, None)
                state, _ = steps.refresh(state, jnp.int32(0))
            begin = time.perf_counter()
            self.step = steps.train.lower(state, batch, None).compile()
            self.compile_seconds = time.perf_counter() - begin
            self.state, self.batch = state, batch
        costs = self.step.cost_analysis() or {}
        self.flops = costs.get("flops", 0.0) * self.trainer.mesh.size / config.batch_size  # per image, all crops
        self.seconds: list[float] = []
        self.run()  # warm-up, not counted

    def run(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch, None)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each variant")
    options, settings = parser.parse_known_args(argv[1:])
    try:
        config = parse_command([argv[0], *settings, "--workdir=unused"]).config
        variants = {name: Variant(config, views) for name, views in VARIANTS.items()}
    except ConfigError as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    for _ in range(options.repeats):
        for variant in variants.values():
            variant.seconds.append(variant.run())
    device = jax.devices()[0]
    print(
        f"{len(jax.devices())} x {device.device_kind}, jax {jax.__version__}, {config.method}, {config.model.backbone}, ",
        end="",
    )
    print(f"B = {config.batch_size}, crops {config.data.crop_size}, median of {options.repeats} turns")
    print(f"{'variant':38}{'images/s':>10}{'x plain':>9}{'MFLOP/image':>13}{'compile s':>11}")
    plain = statistics.median(variants["plain"].seconds)
    for name, variant in variants.items():
        seconds = statistics.median(variant.seconds)
        numbers = f"{config.batch_size / seconds:10.0f}{seconds / plain:9.2f}{variant.flops / 1e6:13.1f}"
        print(f"{name:38}{numbers}{variant.compile_seconds:11.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
