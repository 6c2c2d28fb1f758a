"""config.task = "finetune": train backbone and a new classifier on labelled images.

BatchNorm is in training mode, with statistics over the whole batch of all devices. Learning rates
of the config are trained one after another, each from the same weights.

Legend: N rows, C classes.
"""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax import optim
from hexa_jax.core.batch import Batch
from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError, choose
from hexa_jax.core.preemption import PreemptionGuard, Terminated
from hexa_jax.data.crops import Resolution
from hexa_jax.data.decode import decode, resize_center_crop
from hexa_jax.data.source import Source
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
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import CLEAN, NormMode, blend, stats_collection
from hexa_jax.parallel.mesh import ROWS
from hexa_jax.report.pictures import curves
from hexa_jax.storage.workdir import write_json

STATS = stats_collection(CLEAN)


class TuneState(NamedTuple):
    """State of a run: params has "backbone" and "classifier"; stats are running statistics."""

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


class _CentreCropped:
    """A source whose images are already resized and centre-cropped."""

    def __init__(self, source: Source, resize: int, crop: int):
        self.source, self.resize, self.crop = source, resize, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        pixels = decode(example["image"], self.source.name(index))
        return {**example, "image": resize_center_crop(pixels, self.resize, self.crop)}

    def name(self, index: int) -> str:
        return self.source.name(index)


def finetune(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Fine-tune or resume; returns what `result.json` holds.

    `top1` is that of the best learning rate, chosen on the held-out images as the paper does; the
    others are there, too.

    Raises:
        ConfigError: sizes that cannot work.
        Diverged: the loss became NaN or infinite.
        Terminated: SIGTERM arrived; the state is saved.
    """
    rates = list(config.optimizer.learning_rates)
    if config.epochs < 1 or config.batch_size < 1 or not rates:
        raise ConfigError(
            "epochs and batch_size must be positive, and optimizer.learning_rates not empty"
        )
    run = _Tuning(config, workdir)
    stop, results, by_epoch = PreemptionGuard(), dict[str, Any](), dict[str, list[float]]()
    try:
        with jax.set_mesh(run.mesh):
            for number, rate in enumerate(rates):
                history = run.train(number, rate, stop)
                by_epoch[f"lr {rate:g}"] = [epoch["top1"] for epoch in history]
                results |= {f"{name}_lr{rate:g}": value for name, value in history[-1].items()}
    finally:
        stop.close()
    best = max(rates, key=lambda rate: results[f"top1_lr{rate:g}"])
    results |= {name: results[f"{name}_lr{best:g}"] for name in ("top1", "top5")}
    results |= {
        "best_learning_rate": best,
        "epochs": config.epochs,
        "train_images": len(run.source),
    }
    report = workdir / "report"
    report.mkdir(exist_ok=True)
    curves(by_epoch, "epochs of fine-tuning", "top-1 accuracy in %", report / "curves.png")
    write_json(workdir / "result.json", results)
    log(
        f"fine-tuned: top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % (learning rate "
        f"{best:g})"
    )
    return results


class _Tuning:
    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.workdir = workdir
        self.backbone = open_backbone(config)
        self.source, self.held_out = open_both(config, self.backbone)
        self.classes = int(self.source.num_classes or 0)
        self.extractor = Extractor(config, self.backbone)  # for its mesh, and images of the test
        self.mesh, self.config = self.extractor.mesh, self.extractor.config
        self.batches = LabelledBatches(
            config, self.source, self.mesh, bn_group_size=config.batch_size
        )
        self.steps_per_epoch, self.total = self.batches.steps_per_epoch, self.batches.total
        self.test = self._test_images()

    def train(self, number: int, rate: float, stop: PreemptionGuard) -> list[dict[str, float]]:
        """Train all epochs at one learning rate, resuming; return top-1 and top-5 after each."""
        config, folder = self.config, self.workdir / f"lr{rate:g}"
        rates, optimizer = len(config.optimizer.learning_rates), self._optimizer(rate)

        def batches(step: int) -> Iterator[Batch]:
            log(f"learning rate {rate:g} ({number + 1} of {rates})")
            return self._batches(step)

        loop = TrainingLoop(
            config=config,
            folder=folder,
            total=self.total,
            steps_per_epoch=self.steps_per_epoch,
            step=self._compile(optimizer),
            batches=batches,
            evaluate=self._evaluate,
            advice="try a lower optimizer.learning_rates",
        )
        _, history = loop.run(self._initial(optimizer), stop)
        if number + 1 < rates and stop.reached():
            raise Terminated.after(self.total, folder)
        return history

    def _evaluate(self, state: TuneState, epoch: float) -> dict[str, float]:
        results = self._accuracy(state)
        log(f"epoch {epoch:.0f}: top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} %")
        return results

    def _initial(self, optimizer: optax.GradientTransformation) -> TuneState:
        """Pre-trained backbone; classifier N(0, 0.01) and 0."""
        shape = self.backbone.feature_dim, self.classes
        kernel = 0.01 * jax.random.normal(jax.random.key(self.config.seed), shape)
        params = {"backbone": self.backbone.variables["params"]["backbone"]}
        params["classifier"] = {"kernel": kernel, "bias": jnp.zeros(self.classes)}
        state = TuneState(
            jnp.zeros([], jnp.int32), params, self.backbone.variables[STATS], optimizer.init(params)
        )
        copied = jax.tree.map(
            jnp.copy, state
        )  # steps donate their state, and the next learning rate starts from here, too
        return jax.device_put(copied, NamedSharding(self.mesh, P()))

    def _optimizer(self, rate: float) -> optax.GradientTransformation:
        o = self.config.optimizer

        def one(base: float) -> optax.GradientTransformation:
            schedule = optim.epoch_steps(base, o.milestones, o.decay, self.steps_per_epoch)
            makers = {
                "sgd": lambda: optim.sgd(schedule, o.momentum, o.weight_decay),
                "adamax": lambda: optax.chain(
                    optax.add_decayed_weights(o.weight_decay), optax.adamax(schedule)
                ),
            }
            return choose("optimizer.name", o.name, makers)()

        groups = {"backbone": one(rate), "classifier": one(rate * o.classifier_factor)}
        return optax.multi_transform(groups, lambda params: {name: name for name in params})

    def _compile(self, optimizer: optax.GradientTransformation) -> Any:
        backbone = self.backbone
        mode = NormMode(CLEAN, groups=1)

        def loss(
            params: Any, stats: Any, images: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, Any]:
            variables = {"params": {"backbone": params["backbone"]}, STATS: stats}
            pixels = images.astype(jnp.float32) / 255
            features, sown = backbone.network.apply(
                variables, pixels, mode, method=Network.features, mutable=["moments"]
            )
            logits = features @ params["classifier"]["kernel"] + params["classifier"]["bias"][None]
            known = labels >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
            return jnp.sum(losses * known) / jnp.maximum(jnp.sum(known), 1), sown["moments"]

        def step(state: TuneState, batch: Batch) -> tuple[TuneState, dict[str, jax.Array]]:
            labels = jnp.where(batch.valid[0], batch.label[0], -1)
            images = batch.crops[0][0, :, 0]
            (value, moments), gradients = jax.value_and_grad(loss, has_aux=True)(
                state.params, state.stats, images, labels
            )
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TuneState(state.step + 1, params, blend(state.stats, moments), opt_state), {
                "loss": value
            }

        rows, whole = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())
        return jax.jit(step, in_shardings=(whole, rows), out_shardings=whole, donate_argnums=0)

    def _batches(self, start: int) -> Iterator[Batch]:
        """Yield random crops and flips, or evaluation's center crops without data.augment.

        In a new order each epoch.
        """
        config = self.config
        source: Any = self.source
        resolution = Resolution(1, config.data.crop, (config.data.min_scale, 1.0))
        if not config.data.augment:
            source = _CentreCropped(source, config.data.resize, config.data.crop)
            resolution = Resolution(1, config.data.crop, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
        return self.batches.after(start, resolution, source)

    def _test_images(self) -> Any:
        rows, whole = NamedSharding(self.mesh, P("data")), NamedSharding(self.mesh, P())

        def logits(params: Any, stats: Any, images: jax.Array) -> jax.Array:
            variables = {"params": {"backbone": params["backbone"]}, STATS: stats}
            features = self.backbone.features(variables, images)
            return features @ params["classifier"]["kernel"] + params["classifier"]["bias"][None]

        return jax.jit(logits, in_shardings=(whole, whole, rows), out_shardings=whole)

    def _accuracy(self, state: TuneState) -> dict[str, float]:
        """Return top-1 and top-5 on the held-out center crops, in per cent."""
        images, parts = self.extractor.images(self.held_out), []
        for batch, count in images.device_batches(
            self.mesh, self.extractor.batch_size, self.config.runtime.threads
        ):
            parts.append(np.asarray(self.test(state.params, state.stats, batch))[:count])
        logits, labels = usable(Features(np.concatenate(parts), images.labels, images.known))
        return top_k(logits, labels)
