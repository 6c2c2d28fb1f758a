"""The paper's linear probe: a linear classifier trained by SGD on random crops.

On the frozen, pooled feature.

Several learning rates are trained side by side in one pass over the data. The first one is the
protocol's; the others tell how much the choice matters, and picking the best of them on held-out
examples is not done here.

Legend: L learning rates, N rows, F features, C classes.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax import optim
from hexa_jax.core.batch import Batch
from hexa_jax.core.console import log
from hexa_jax.core.errors import choose
from hexa_jax.core.preemption import PreemptionGuard
from hexa_jax.data.crops import Resolution
from hexa_jax.evals.backbone import Backbone
from hexa_jax.evals.tasks.labelled import (
    Extractor,
    Features,
    open_backbone,
    open_both,
    top_k,
    usable,
)
from hexa_jax.evals.tasks.labelled_batches import LabelledBatches
from hexa_jax.evals.tasks.training_loop import TrainingLoop
from hexa_jax.parallel.mesh import ROWS
from hexa_jax.storage.workdir import write_json


class ProbeState(NamedTuple):
    """State: kernels [L, F, C], biases [L, C] and their momentum, float32; step int32."""

    step: jax.Array
    kernel: jax.Array
    bias: jax.Array
    kernel_momentum: jax.Array
    bias_momentum: jax.Array


def probe_step(
    state: ProbeState,
    features: jax.Array,
    labels: jax.Array,
    rates: jax.Array,
    *,
    momentum: float,
    weight_decay: float,
) -> tuple[ProbeState, jax.Array]:
    """One step of torch's SGD for all learning rates.

    Args:
        state: before the step.
        features: [N, F].
        labels: int [N]; rows with -1 do not count.
        rates: [L] learning rates of this step.
        momentum: of the buffers.
        weight_decay: L2 weight, on biases too.

    Returns:
        The new state, and the mean cross-entropy of each learning rate [L].
    """
    known = labels >= 0
    share = known / jnp.maximum(jnp.sum(known), 1)

    def loss(weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kernel, bias = weights
        logits = jnp.einsum("nf,lfc->lnc", features, kernel) + bias[:, None]
        chosen = jnp.maximum(labels, 0)[None, :, None]
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
        losses = -jnp.sum(own * share[None], axis=1)
        return jnp.sum(losses), losses

    weights = state.kernel, state.bias
    gradients, losses = jax.grad(loss, has_aux=True)(weights)

    def move(
        weight: jax.Array, buffer: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        buffer = momentum * buffer + gradient + weight_decay * weight
        return weight - rates.reshape(-1, *[1] * (weight.ndim - 1)) * buffer, buffer

    kernel, kernel_momentum = move(state.kernel, state.kernel_momentum, gradients[0])
    bias, bias_momentum = move(state.bias, state.bias_momentum, gradients[1])
    return ProbeState(state.step + 1, kernel, bias, kernel_momentum, bias_momentum), losses


def probe_schedule(config: ConfigDict, steps_per_epoch: int) -> optim.Schedule:
    """Factor of all learning rates as a function of the step."""
    o = config.optimizer
    makers = {
        "steps": lambda: optim.epoch_steps(1.0, o.milestones, o.decay, steps_per_epoch),
        "epoch_cosine": lambda: optim.epoch_cosine(1.0, config.epochs, steps_per_epoch),
    }
    return choose("optimizer.schedule", o.schedule, makers)()


def linear(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Train or resume the probe; return what `result.json` holds.

    Raises:
        CheckpointError: no pre-trained weights where the config says.
        DataError: examples without labels, or classes that differ between training and held-out
            examples.
        ConfigError: sizes that cannot work.
        Diverged: the first learning rate's loss became NaN or infinite.
        Terminated: SIGTERM arrived; the state is saved.
    """
    run = _Probe(config, workdir)
    with jax.set_mesh(run.mesh):
        return run.run()


class _Probe:
    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.workdir = workdir
        self.backbone: Backbone = open_backbone(config)
        self.source, self.held_out = open_both(config, self.backbone)
        self.extractor = Extractor(config, self.backbone)
        self.mesh, self.config = self.extractor.mesh, self.extractor.config
        # of no consequence: statistics are the running ones
        groups = max(config.batch_size // self.mesh.size, 1)
        self.batches = LabelledBatches(config, self.source, self.mesh, bn_group_size=groups)
        self.steps_per_epoch, self.total = self.batches.steps_per_epoch, self.batches.total

    def run(self) -> dict[str, Any]:
        config = self.config
        held_out = self.extractor(self.held_out, "held-out features")
        self.backbone = self.extractor.backbone
        train, variables = self._compile(), self.backbone.variables
        resolution = Resolution(1, config.data.crop, (config.data.min_scale, 1.0))

        def evaluate(state: ProbeState, epoch: float) -> dict[str, float]:
            results = self._accuracy(state, held_out)
            log(f"epoch {epoch:.0f}: top-1 {results['top1']:.1f} %, top-5 {results['top5']:.1f} %")
            return results

        loop = TrainingLoop(
            config=config,
            folder=self.workdir,
            total=self.total,
            steps_per_epoch=self.steps_per_epoch,
            step=lambda state, batch: train(state, variables, batch),
            batches=lambda step: self.batches.after(step, resolution),
            evaluate=evaluate,
            advice="try lower optimizer.learning_rates",
            sound=lambda state: [leaf[0] for leaf in state[1:]],
        )
        stop = PreemptionGuard()
        try:
            state, _ = loop.run(self._initial(), stop)
        finally:
            stop.close()
        results: dict[str, Any] = {**self._accuracy(state, held_out)}
        results |= {"epochs": config.epochs, "pretraining_step": self.backbone.step}
        write_json(self.workdir / "result.json", results)
        log(f"linear probe: top-1 {results['top1']:.1f} %, top-5 {results['top5']:.1f} %")
        return results

    def _initial(self) -> ProbeState:
        """fc ~ N(0, 0.01), bias 0, the same for all learning rates."""
        rates, classes = len(self.config.optimizer.learning_rates), self.source.num_classes
        shape = self.backbone.feature_dim, classes
        kernel = 0.01 * jax.random.normal(jax.random.key(self.config.seed), shape)
        kernel = jnp.broadcast_to(kernel, (rates, *shape))
        bias = jnp.zeros((rates, classes))
        state = ProbeState(
            jnp.zeros([], jnp.int32), kernel, bias, jnp.zeros_like(kernel), jnp.zeros_like(bias)
        )
        return jax.device_put(state, NamedSharding(self.mesh, P()))

    def _features(self, variables: Any, images: jax.Array) -> jax.Array:
        """[N, F] of uint8 images, by running statistics; no gradient."""
        return jax.lax.stop_gradient(self.backbone.features(variables, images))

    def _compile(self) -> Any:
        o = self.config.optimizer
        schedule = probe_schedule(self.config, self.steps_per_epoch)

        def step(
            state: ProbeState, variables: Any, batch: Batch
        ) -> tuple[ProbeState, dict[str, jax.Array]]:
            features = self._features(variables, batch.crops[0][0, :, 0])
            labels = jnp.where(batch.valid[0], batch.label[0], -1)
            rates = jnp.asarray(o.learning_rates, jnp.float32) * schedule(state.step)
            state, losses = probe_step(
                state, features, labels, rates, momentum=o.momentum, weight_decay=o.weight_decay
            )
            return state, {"loss": losses[0]}

        rows, whole = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())
        return jax.jit(
            step, in_shardings=(whole, whole, rows), out_shardings=whole, donate_argnums=0
        )

    def _accuracy(self, state: ProbeState, held_out: Features) -> dict[str, float]:
        """Top-1 and top-5 of the first learning rate in per cent, and top-1 of each."""
        features, labels = usable(held_out)
        results: dict[str, float] = {}
        kernels, biases = np.asarray(state.kernel), np.asarray(state.bias)
        for rate, kernel, bias in zip(
            self.config.optimizer.learning_rates, kernels, biases, strict=True
        ):
            found = top_k(features @ kernel + bias, labels)
            accuracies = {f"top1_lr{rate:g}": found["top1"]} | ({} if results else found)
            results |= accuracies
        return results
