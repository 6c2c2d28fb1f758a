"""Weighted k-nearest-neighbour classification on cosine similarity: the votes of the k nearest weigh exp(similarity / tau)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

QUERIES = 256  # rows of a chunk: the similarities of one chunk exist at a time


@functools.partial(jax.jit, static_argnames=("neighbours", "num_classes", "temperature"))
def _vote(
    bank: jax.Array,
    labels: jax.Array,
    queries: jax.Array,
    own: jax.Array,
    *,
    neighbours: int,
    num_classes: int,
    temperature: float,
) -> jax.Array:
    """Predicted class [Q] of queries [Q, F]; `own` [Q] is a query's row in the bank, to be left out, or -1."""
    similarity = jnp.einsum("qf,nf->qn", queries, bank, precision="highest")
    itself = jnp.arange(bank.shape[0])[None] == own[:, None]
    nearest, position = jax.lax.top_k(jnp.where(itself, -jnp.inf, similarity), neighbours)
    weight = jnp.exp((nearest - nearest[:, :1]) / temperature)  # relative to the nearest: no overflow, same winner
    votes = jax.nn.one_hot(labels[position], num_classes) * weight[..., None]
    return jnp.argmax(jnp.sum(votes, axis=1), axis=-1)


def knn_predict(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    leave_one_out: bool = False,
) -> np.ndarray:
    """Classes of the queries by the weighted vote of their nearest neighbours in the bank.

    Args:
        bank: float [N, F] features, any length.
        bank_labels: int [N].
        queries: float [Q, F].
        neighbours: k; at most the size of the bank.
        temperature: tau of the weights exp(cosine / tau).
        leave_one_out: queries[i] is bank[i] and may not vote for itself.

    Returns:
        int [Q].
    """
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)  # noqa: E731
    bank, queries = unit(np.asarray(bank, np.float32)), unit(np.asarray(queries, np.float32))
    own = np.arange(len(queries)) if leave_one_out else np.full(len(queries), -1)
    vote = functools.partial(
        _vote,
        jnp.asarray(bank),
        jnp.asarray(bank_labels),
        neighbours=min(neighbours, len(bank) - int(leave_one_out)),
        num_classes=int(bank_labels.max()) + 1,
        temperature=temperature,
    )
    predictions = []
    for first in range(0, len(queries), QUERIES):
        chunk = slice(first, first + QUERIES)
        missing = QUERIES - len(queries[chunk])
        padded = vote(
            np.pad(queries[chunk], ((0, missing), (0, 0))), np.pad(own[chunk], (0, missing), constant_values=-1)
        )
        predictions.append(np.asarray(padded)[: QUERIES - missing])
    return np.concatenate(predictions)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of right predictions, in per cent."""
    return 100.0 * float(np.mean(predictions == labels))
