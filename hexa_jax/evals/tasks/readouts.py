"""Read-outs of the robustness evaluation: a prediction, and a loss that attacks climb.

Legend: N training examples, Q queries, F features, C classes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hexa_jax.evals.knn import knn_predict, vote_logits
from hexa_jax.evals.linear import LinearClassifier

# a cross-entropy below it, of a vote that is as good as unanimous, has no useful slope
SATURATED = 1e-6


class Readout(NamedTuple):
    """A classifier on features.

    Attributes:
        predict: features float [Q, F] -> classes int [Q], on the host.
        losses: (arrays, features [Q, F], targets int [Q]) -> [Q], differentiable with respect to
            the features; 0 where the target is -1.
        arrays: what `losses` reads besides, a tree of arrays.
        classes: int [C], ascending: what the targets 0 ... C - 1 stand for.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    losses: Callable[[Any, jax.Array, jax.Array], jax.Array]
    arrays: Any
    classes: np.ndarray

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Return targets int32 [Q] of labels [Q]; -1 for a class unknown to the read-out."""
        place = np.minimum(np.searchsorted(self.classes, labels), len(self.classes) - 1)
        return np.where(self.classes[place] == labels, place, -1).astype(np.int32)


def linear_readout(classifier: LinearClassifier, dtype: Any = jnp.float32) -> Readout:
    """A fitted linear classifier and its cross-entropy; `dtype` is that of the features."""
    arrays = {
        name: jnp.asarray(getattr(classifier, name), dtype)
        for name in ("mean", "scale", "kernel", "bias")
    }

    def losses(arrays: Any, features: jax.Array, targets: jax.Array) -> jax.Array:
        x = (features - arrays["mean"][None]) / arrays["scale"][None]
        logits = jnp.matmul(x, arrays["kernel"], precision="highest") + arrays["bias"][None]
        return _cross_entropy(logits, targets)

    return Readout(classifier.predict, losses, arrays, classifier.classes)


def knn_readout(
    bank: np.ndarray,
    labels: np.ndarray,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    mesh: Mesh | None = None,
) -> Readout:
    """The weighted vote of the nearest neighbours, and the cross-entropy of that vote.

    Where the nearest neighbours all have the right class, their vote is flat and an attack on it
    would not move: robustness that is none. The loss is then that of the vote of the whole bank, in
    which every class has a part.

    Args:
        bank: float [N, F] features of training images.
        labels: int [N].
        neighbours: that vote.
        temperature: tau of the weights exp(cosine / tau).
        mesh: as in `knn_predict`.
    """
    classes, rows = np.unique(labels, return_inverse=True)
    predict = functools.partial(
        knn_predict, bank, labels, neighbours=neighbours, temperature=temperature, mesh=mesh
    )

    def losses(arrays: Any, features: jax.Array, targets: jax.Array) -> jax.Array:
        def of_vote(voters: int) -> jax.Array:
            logits = vote_logits(
                arrays["bank"],
                arrays["targets"],
                features,
                classes=len(classes),
                temperature=temperature,
                neighbours=voters,
            )
            return _cross_entropy(logits, targets)

        nearest = of_vote(neighbours)
        return jnp.where(nearest > SATURATED, nearest, of_vote(0))

    arrays = {"bank": jnp.asarray(bank), "targets": jnp.asarray(rows, jnp.int32)}
    return Readout(predict, losses, arrays, classes)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[Q] of logits [Q, C]; 0 where the target is -1."""
    wanted = jax.nn.one_hot(targets, logits.shape[1], dtype=logits.dtype)  # zeros for -1
    return optax.softmax_cross_entropy(logits, wanted)
