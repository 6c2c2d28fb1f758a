"""config.task = "linear_features": CIFAR's linear probe, on features computed once.

Legend: L learning rates, N examples, F features, C classes.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from hexa_jax import optim
from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.knn import accuracy
from hexa_jax.evals.tasks.labelled import Extractor, open_backbone, open_both, usable
from hexa_jax.report.pictures import confusion_matrix, curves
from hexa_jax.storage.workdir import write_json


def adamax_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    classes: int,
    learning_rates: tuple[float, ...],
    epochs: int,
    batch_size: int,
    milestones: tuple[int, ...],
    decay: float,
    seed: int,
) -> np.ndarray:
    """Softmax classifiers trained with Adamax, one per learning rate, side by side.

    Args:
        train: float [N, F].
        labels: int [N].
        test: float [Q, F].
        classes: C.
        learning_rates: L of them.
        epochs: passes over the training features, shuffled each time; the rows of an incomplete
            last batch sit out that pass.
        batch_size: rows of a step; all of them where there are fewer.
        milestones: epochs (from 0) at whose start the learning rate is multiplied by `decay`.
        decay: see milestones.
        seed: of the shuffling.

    Returns:
        int [epochs, L, Q]: predicted classes after each epoch.
    """
    batch = min(batch_size, len(train))
    steps = len(train) // batch
    features, targets, queries = (
        jnp.asarray(train, jnp.float32),
        jnp.asarray(labels),
        jnp.asarray(test, jnp.float32),
    )
    schedules = [optim.epoch_steps(rate, milestones, decay, steps) for rate in learning_rates]
    weights = {"kernel": jnp.zeros((train.shape[1], classes)), "bias": jnp.zeros(classes)}

    def loss(weights: Any, rows: jax.Array) -> jax.Array:
        logits = features[rows] @ weights["kernel"] + weights["bias"][None]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets[rows]))

    @functools.partial(jax.jit, static_argnums=0)
    def epoch(
        number: int, weights: Any, state: Any, order: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        optimizer = optax.adamax(schedules[number])

        def step(carry: tuple, rows: jax.Array) -> tuple[tuple, None]:
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights, rows), state)
            return (optax.apply_updates(weights, updates), state), None

        (weights, state), _ = jax.lax.scan(step, (weights, state), order)
        return (
            weights,
            state,
            jnp.argmax(queries @ weights["kernel"] + weights["bias"][None], axis=1),
        )

    classifiers = [(weights, optax.adamax(schedule).init(weights)) for schedule in schedules]
    rng, predictions = np.random.default_rng(seed), []
    for _ in range(epochs):
        order = jnp.asarray(rng.permutation(len(train))[: steps * batch].reshape(steps, batch))
        done = [epoch(number, *classifier, order) for number, classifier in enumerate(classifiers)]
        classifiers = [(weights, state) for weights, state, _ in done]
        predictions.append(np.stack([np.asarray(predicted) for _, _, predicted in done]))
    return np.stack(predictions)


def linear_features(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Accuracy for each learning rate; returns what `result.json` holds.

    `accuracy` is the best learning rate's, chosen on the test images as the paper does; the others
    are there, too.
    """
    if config.epochs < 1 or config.batch_size < 1 or not config.learning_rates:
        raise ConfigError("epochs and batch_size must be positive, and learning_rates not empty")
    backbone = open_backbone(config)
    train, held_out = open_both(config, backbone)
    extractor = Extractor(config, backbone, workdir / "features")
    x, labels = usable(extractor(train, "training features"))
    q, wanted = usable(extractor(held_out, "held-out features"))
    predictions = adamax_probe(
        x,
        labels,
        q,
        classes=int(train.num_classes or 0),
        learning_rates=tuple(config.learning_rates),
        epochs=config.epochs,
        batch_size=config.batch_size,
        milestones=tuple(config.milestones),
        decay=config.decay,
        seed=config.seed,
    )
    by_epoch = {
        f"lr {rate:g}": [accuracy(predicted, wanted) for predicted in predictions[:, number]]
        for number, rate in enumerate(config.learning_rates)
    }
    results: dict[str, Any] = {
        f"accuracy_lr{name[3:]}": values[-1] for name, values in by_epoch.items()
    }
    results["accuracy"] = max(results.values())
    results |= {"train_images": len(x), "test_images": len(q), "pretraining_step": backbone.step}
    best = int(np.argmax([values[-1] for values in by_epoch.values()]))
    report = workdir / "report"
    report.mkdir(exist_ok=True)
    curves(by_epoch, "epochs of the probe", "accuracy in %", report / "curves.png")
    confusion_matrix(
        wanted, predictions[-1, best], getattr(train, "class_names", None), report / "confusion.png"
    )
    write_json(workdir / "result.json", results)
    for name, values in by_epoch.items():
        log(f"{name:12}{values[-1]:8.2f} %")
    return results
