"""kNN accuracy while training, and accuracies of raw pixels and random weights."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hexa_jax.data.open import open_source
from hexa_jax.data.source import DataError, Source
from hexa_jax.data.subset import spread
from hexa_jax.evals.features import EvalImages, extract, make_extractor, raw_pixels
from hexa_jax.evals.knn import accuracy, knn_predict
from hexa_jax.evals.linear import linear_probe
from hexa_jax.training.step import Trainer, TrainState

PIXEL_BYTES = 2 << 30
BATCH = 256  # images of a forward pass, about


@dataclasses.dataclass(frozen=True)
class Probe:
    """Labelled examples to judge features by: a bank, and held-out queries (or the bank)."""

    config: ConfigDict
    bank: EvalImages
    queries: EvalImages
    leave_one_out: bool
    extractor: Any
    mesh: Mesh
    batch_size: int  # a multiple of the number of devices

    def features(self, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        """Features of bank and queries, by the clean BatchNorm's running statistics."""

        def forward(images: np.ndarray) -> jax.Array:
            return self.extractor(state.params["network"], state.batch_stats, images)

        bank = extract(forward, self.bank, self.batch_size, self.mesh)
        if self.leave_one_out:
            return bank, bank[: len(self.queries.indices)]
        return bank, extract(forward, self.queries, self.batch_size, self.mesh)

    def pixels(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Raw pixels of bank and queries; None where they would not fit in PIXEL_BYTES."""
        if (
            4 * 3 * self.bank.crop**2 * (len(self.bank.indices) + len(self.queries.indices))
            > PIXEL_BYTES
        ):
            return None
        bank = raw_pixels(self.bank)
        return bank, bank[: len(self.queries.indices)] if self.leave_one_out else raw_pixels(
            self.queries
        )

    def knn(self, features: tuple[np.ndarray, np.ndarray]) -> float:
        """Accuracy in per cent."""
        knn = self.config.knn
        bank, queries = self.bank.known, self.queries.known
        predictions = knn_predict(
            features[0][bank],
            self.bank.labels[bank],
            features[1][queries],
            neighbours=knn.neighbours,
            temperature=knn.temperature,
            leave_one_out=self.leave_one_out,
        )
        return accuracy(predictions, self.queries.labels[queries])

    def linear(self, features: tuple[np.ndarray, np.ndarray]) -> float | None:
        """Accuracy in per cent; None without held-out examples."""
        if self.leave_one_out:
            return None
        bank, queries = self.bank.known, self.queries.known
        predictions = linear_probe(
            features[0][bank],
            self.bank.labels[bank],
            features[1][queries],
            regularization=self.config.linear.regularization,
        )
        return accuracy(predictions, self.queries.labels[queries])


def make_probe(config: ConfigDict, source: Source, trainer: Trainer) -> Probe | None:
    """A probe of the run's data, or of `knn.source`; None when there are no labels.

    Raises:
        DataError: a source that is to be labelled has no labels.
    """
    knn = config.knn
    if knn.source:
        source = open_source(config, knn.source, labels="folders")
    if source.num_classes is None:
        if knn.source:
            raise DataError(f"knn.source={knn.source} has no labels to measure accuracy with")
        return None
    # In random order: without held-out examples the first of the bank are the queries, and folders
    # are sorted by class.
    order = np.random.default_rng(0).permutation(spread(len(source), knn.train_limit))
    bank = EvalImages(source, order, knn.resize, knn.crop)
    queries, leave_one_out = (
        dataclasses.replace(bank, indices=bank.indices[: knn.test_limit or None]),
        True,
    )
    if config.data.eval_source:
        held_out = open_source(config, config.data.eval_source)
        if held_out.num_classes is None:
            raise DataError(
                f"data.eval_source={config.data.eval_source} has no labels to evaluate with"
            )
        if held_out.num_classes != source.num_classes:
            raise DataError(
                f"data.eval_source={config.data.eval_source} has {held_out.num_classes} classes, "
                "data.source has "
                f"{source.num_classes}: are they the same data set?"
            )
        queries = EvalImages(held_out, spread(len(held_out), knn.test_limit), knn.resize, knn.crop)
        leave_one_out = False
    extractor = make_extractor(trainer.objective.network, trainer.mesh, trainer.dtype)
    batch_size = -(-BATCH // trainer.mesh.size) * trainer.mesh.size
    return Probe(config, bank, queries, leave_one_out, extractor, trainer.mesh, batch_size)
