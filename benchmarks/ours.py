"""A compiled training step of `hexa_jax` with a batch of noise, ready to be timed; as a process, the worker beside a peer's."""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.flops import product_flops
from benchmarks.turns import Refusal, serve
from hexa_jax.cli.command import parse_command
from hexa_jax.core.batch import Batch
from hexa_jax.core.errors import ConfigError
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.step import Trainer


def _weights(adversarial: float, cutmix: float, **attack: Any) -> dict[str, Any]:
    """Settings below config.views."""
    return {"adversarial.weight": adversarial, "cutmix.weight": cutmix, **attack}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": _weights(0.0, 0.0),
    "adversarial, auxiliary": _weights(1.0, 0.0, attack_norm="adversarial"),
    "adversarial, main, separate": _weights(1.0, 0.0, attack_norm="clean", share_gradient=False),
    "adversarial, main, shared": _weights(1.0, 0.0, attack_norm="clean", share_gradient=True),
    "cut-mixed": _weights(0.0, 1.0),
    "adversarial (auxiliary) + cut-mixed": _weights(1.0, 1.0, attack_norm="adversarial"),
}


def num_examples(config: ConfigDict) -> int:
    """A data set of a few steps, large enough for the clusters."""
    return 8 * config.batch_size + config.deepcluster.num_clusters


def random_batch(trainer: Trainer) -> Batch:
    """A batch of noise with consistent row numbers; keys come in another order than their images."""
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
        order = jax.random.permutation(jax.random.key(0), batch_size)
        batch = batch._replace(
            key_crops=noise(shapes.key_crops),
            key_index=order.astype(jnp.int32).reshape(rows.shape),
            key_row=jnp.argsort(order).astype(jnp.int32).reshape(rows.shape),
        )
    return jax.device_put(batch, jax.tree.map(lambda s: s.sharding, shapes))


class Variant:
    """A compiled step with its state.

    Attributes:
        compile_seconds: of the step alone.
        flops: of the whole step's products, as `product_flops` counts.
        compiler: what the compiler says of its program: "flops" and "bytes accessed" on one device,
            where it says them.
    """

    def __init__(self, config: ConfigDict, views: dict[str, Any]):
        config = config.copy_and_resolve_references()
        config.views.update_from_flattened_dict(views)
        config.scheme = ""  # it would have the last word on the weights
        self.trainer = make_trainer(config, num_examples(config))
        with jax.set_mesh(self.trainer.mesh):
            steps = self.trainer.compile()
            state, batch = steps.init(0), random_batch(self.trainer)
            if self.trainer.objective.method.needs_first_pass:
                state = steps.observe(state, batch, None)
                state, _ = steps.refresh(state, jnp.int32(0))
            begin = time.perf_counter()
            traced = steps.train.trace(state, batch, None)
            self.step = traced.lower().compile()
            self.compile_seconds = time.perf_counter() - begin
            self.state, self.batch = state, batch
        self.flops = product_flops(traced.jaxpr)
        self.compiler = {
            name: float(value) for name, value in (self.step.cost_analysis() or {}).items()
        }
        self.seconds: list[float] = []
        self.metrics: dict[str, jax.Array] = {}
        self.run()  # warm-up, not counted

    def run(self, steps: int = 1) -> float:
        """Seconds of some steps, until the device has finished the last one."""
        jax.block_until_ready(self.state)
        begin = time.perf_counter()
        for _ in range(steps):
            self.state, self.metrics = self.step(self.state, self.batch, None)
        jax.block_until_ready((self.state, self.metrics))
        return time.perf_counter() - begin


class Augmentation:
    """The part of a variant's step that turns uint8 crops into what the networks get, as a program of its own.

    What it writes to memory, the step may hand on in another form: its time is about that part's,
    not exactly.
    """

    def __init__(self, variant: Variant):
        self.variant = variant
        with jax.set_mesh(variant.trainer.mesh):
            steps = variant.trainer.compile()
            self.program = steps.augment.trace(variant.state, variant.batch, None).lower().compile()
        self.seconds: list[float] = []
        self.run()  # warm-up, not counted

    def run(self) -> float:
        """Seconds of the next step's crops, until the device has finished them."""
        state, batch = jax.block_until_ready((self.variant.state, self.variant.batch))
        begin = time.perf_counter()
        jax.block_until_ready(self.program(state, batch, None))
        return time.perf_counter() - begin


def make(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What `serve` needs: a function that runs a turn, and facts about this side."""
    begin = time.perf_counter()
    config = parse_command(["ours", *order["arguments"], "--workdir=unused"]).config
    try:
        variant = Variant(config, order["views"])
    except ConfigError as error:
        raise Refusal(str(error)) from None
    losses = {
        name: float(value) for name, value in variant.metrics.items() if name.startswith("loss_")
    }
    variant.run(2)
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return variant.run, {
        "versions": {"jax": jax.__version__},
        "device": device.device_kind,
        "platform": device.platform,
        "compile_seconds": variant.compile_seconds,
        "setup_seconds": time.perf_counter() - begin,
        "step_seconds": variant.run(),
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "flops": variant.flops,
        "compiler_flops": variant.compiler.get("flops"),
        "compiler_bytes": variant.compiler.get("bytes accessed"),
        "losses": losses,
    }


if __name__ == "__main__":
    sys.exit(serve(lambda: make(json.loads(sys.argv[1]))))
