"""Weighted k-nearest-neighbor classification on cosine similarity.

The votes of the k nearest weigh exp(similarity / tau).

Legend: N rows of the bank, Q queries, F features, k neighbours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.parallel.mesh import make_mesh

QUERIES = 256  # rows of a chunk of queries
BANK_ROWS = 16_384  # rows of the bank whose similarities exist at a time, per device


def nearest(
    bank: np.ndarray,
    queries: np.ndarray,
    neighbours: int,
    *,
    own: np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the most similar rows of a bank that is split over devices, in chunks.

    Args:
        bank: float [N, F] features, any length.
        queries: float [Q, F].
        neighbours: k, at most N (N - 1 with `own`).
        own: int [Q], a query's row in the bank, which is left out; -1 for none.
        mesh: one-axis mesh of the devices; by default the first device.

    Returns:
        Cosine similarities float32 [Q, k], highest first, and their rows int64 [Q, k]; ties go to
        the lower row.

    Raises:
        ValueError: an empty bank, or more neighbours than there are.
    """
    if neighbours < 1 or neighbours > len(bank) - (own is not None):
        raise ValueError(f"{neighbours} neighbours are wanted of a bank of {len(bank)} rows")
    mesh = mesh or make_mesh(jax.local_devices()[:1])
    rows = max(min(BANK_ROWS, -(-len(bank) // mesh.size)), neighbours)  # of a chunk
    chunks = -(-len(bank) // (rows * mesh.size))
    padded = np.zeros((mesh.size * chunks * rows, bank.shape[1]), np.float32)
    for first in range(0, len(bank), BANK_ROWS):
        # In parts: the bank may be half of the memory, and a whole copy of it would not fit.
        padded[first : first + BANK_ROWS][: len(bank) - first] = _unit(
            bank[first : first + BANK_ROWS]
        )
    split = jax.device_put(
        padded.reshape(mesh.size * chunks, rows, -1), NamedSharding(mesh, P("data"))
    )
    search = functools.partial(_search(mesh, neighbours), split, np.int32(len(bank)))
    own = np.full(len(queries), -1) if own is None else own
    found = []
    # that of a training run, inside which this may be called, has more devices
    with jax.set_mesh(mesh):
        for first in range(0, len(queries), QUERIES):
            chunk = slice(first, first + QUERIES)
            missing = QUERIES - len(queries[chunk])
            excluded = np.pad(own[chunk], (0, missing), constant_values=-1).astype(np.int32)
            result = search(np.pad(_unit(queries[chunk]), ((0, missing), (0, 0))), excluded)
            found.append([np.asarray(leaf)[: QUERIES - missing] for leaf in result])
    similarity, position = (np.concatenate(leaves) for leaves in zip(*found, strict=True))
    return similarity, position.astype(np.int64)


@functools.cache
def _search(mesh: Mesh, neighbours: int):
    """Jitted (bank chunks, size of the bank, queries, own rows) -> (similarities, rows)."""

    def best(similarity: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        # By similarity, then by row: lax.top_k alone would depend on the order in which chunks and
        # devices come.
        order = jax.lax.sort([-similarity, row], num_keys=2)
        return -order[0][:, :neighbours], order[1][:, :neighbours]

    def local(
        chunks: jax.Array, size: jax.Array, queries: jax.Array, own: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        count, rows, _ = chunks.shape
        first = jax.lax.axis_index("data") * count * rows

        def step(found: tuple, leaves: tuple) -> tuple[tuple, None]:
            chunk, number = leaves
            row = first + number * rows + jnp.arange(rows, dtype=jnp.int32)
            similarity = jnp.matmul(queries, chunk.T, precision="highest")
            absent = (row >= size)[None] | (row[None] == own[:, None])
            similarity, place = jax.lax.top_k(jnp.where(absent, -jnp.inf, similarity), neighbours)
            both = [
                jnp.concatenate(pair, axis=1)
                for pair in zip(found, (similarity, row[place]), strict=True)
            ]
            return best(*both), None

        shape = (len(queries), neighbours)
        none = (
            jnp.full(shape, -jnp.inf, queries.dtype),
            jnp.full(shape, np.iinfo(np.int32).max, jnp.int32),
        )
        found, _ = jax.lax.scan(step, none, (chunks, jnp.arange(count, dtype=jnp.int32)))
        gathered = [jax.lax.all_gather(leaf, "data", axis=1, tiled=True) for leaf in found]
        return best(*gathered)

    specs = P("data"), P(), P(), P()
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False)
    )


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def knn_predict(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    leave_one_out: bool = False,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Classes of the queries by the weighted vote of their nearest neighbours in the bank.

    Args:
        bank: float [N, F] features, any length.
        bank_labels: int [N].
        queries: float [Q, F].
        neighbours: k; all of the bank where it is smaller.
        temperature: tau of the weights exp(cosine / tau).
        leave_one_out: queries[i] is bank[i] and may not vote for itself.
        mesh: of the devices that hold the bank; by default the first one.

    Returns:
        int [Q].

    Raises:
        ValueError: there is nothing to vote.
    """
    neighbours = min(neighbours, len(bank) - int(leave_one_out))
    own = np.arange(len(queries)) if leave_one_out else None
    similarity, row = nearest(bank, queries, neighbours, own=own, mesh=mesh)
    # relative to the nearest: no overflow, same winner
    weight = np.exp((similarity - similarity[:, :1]) / temperature)
    votes = np.zeros((len(queries), int(bank_labels.max()) + 1), np.float32)
    np.add.at(votes, (np.arange(len(queries))[:, None], bank_labels[row]), weight)
    return np.argmax(votes, axis=1)


def vote_logits(
    bank: jax.Array,
    bank_labels: jax.Array,
    queries: jax.Array,
    *,
    classes: int,
    temperature: float = 0.07,
    neighbours: int = 0,
) -> jax.Array:
    """Return the log votes that `knn_predict` compares, differentiable in the queries.

    Args:
        bank: float [N, F] features, any length but 0.
        bank_labels: int [N].
        queries: float [Q, F].
        classes: C.
        temperature: tau of the weights exp(cosine / tau).
        neighbours: k; 0: all of the bank votes, so that each class has votes and the logits always
            have a slope.

    Returns:
        [Q, C], up to a constant per query; very low where a class has no vote.
    """

    def unit(x: jax.Array) -> jax.Array:
        # The square root of 0 has no derivative: a feature that is 0 everywhere stays so.
        return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=1, keepdims=True), 1e-24))

    scores = jnp.matmul(unit(queries), unit(bank).T, precision="highest") / temperature
    if 0 < neighbours < len(bank):
        scores, rows = jax.lax.top_k(scores, neighbours)
        chosen = jax.nn.one_hot(bank_labels[rows], classes, dtype=scores.dtype)  # [Q, k, C]
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True)))
    if 0 < neighbours < len(bank):
        votes = jnp.einsum("qk,qkc->qc", weights, chosen, precision="highest")
    else:
        votes = jax.ops.segment_sum(weights.T, bank_labels, classes).T
    return jnp.log(votes + jnp.finfo(votes.dtype).tiny)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of right predictions, in per cent."""
    return 100.0 * float(np.mean(predictions == labels))
