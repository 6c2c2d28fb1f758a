"""Golden tests of `hexa_jax.kmeans`: spherical k-means against a NumPy loop in float64, and its invariants."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.kmeans import spherical_kmeans


def unit_rows(seed, *shape):
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def kmeans_loop(x, init, iterations):
    """`iterations` M-steps with an E-step before each and one after the last; an empty cluster keeps its centroid."""
    centroids = init.copy()
    for iteration in range(iterations + 1):
        assignments = np.array([np.argmax(centroids @ row) for row in x])
        if iteration == iterations:
            break
        for k in range(len(centroids)):
            members = x[assignments == k]
            if len(members):
                mean = members.mean(axis=0)
                centroids[k] = mean / np.linalg.norm(mean)
    return centroids, assignments, np.mean([row @ centroids[k] for row, k in zip(x, assignments, strict=True)])


def assert_same(result, expected):
    centroids, assignments, objective = result
    np.testing.assert_array_equal(assignments, expected[1])
    np.testing.assert_allclose(centroids, expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(objective, expected[2], rtol=1e-12)


@pytest.mark.parametrize("iterations", [0, 1, 2, 10])
def test_equals_a_numpy_loop(x64, iterations):
    x, init = unit_rows(0, 37, 4), unit_rows(1, 5, 4)
    result = spherical_kmeans(jax.random.key(0), x, 5, iterations, init=init)
    assert_same(result, kmeans_loop(x, init, iterations))


def test_equals_a_numpy_loop_on_many_rows(x64):
    x, init = unit_rows(0, 9001, 4), unit_rows(1, 6, 4)
    result = spherical_kmeans(jax.random.key(0), x, 6, 3, init=init)
    assert_same(result, kmeans_loop(x, init, 3))


def test_shapes_and_types():
    x = unit_rows(2, 20, 4).astype(np.float32)
    centroids, assignments, objective = spherical_kmeans(jax.random.key(0), x, 3, 2)
    assert centroids.shape == (3, 4) and centroids.dtype == np.float32
    assert assignments.shape == (20,) and assignments.dtype == np.int32
    assert objective.shape == ()


def test_centroids_have_unit_norm(x64):
    centroids, _, _ = spherical_kmeans(jax.random.key(0), unit_rows(3, 40, 4), 6, 5)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, rtol=1e-12)


def test_an_empty_cluster_keeps_its_centroid(x64):
    x = np.abs(unit_rows(4, 20, 3))
    init = np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]])  # all rows lie in the positive octant: 1 stays empty
    centroids, assignments, _ = spherical_kmeans(jax.random.key(0), x, 3, 4, init=init)
    assert not (np.asarray(assignments) == 1).any()
    np.testing.assert_array_equal(centroids[1], init[1])
    assert_same(
        spherical_kmeans(jax.random.key(0), x, 3, 4, init=init),
        kmeans_loop(x, init, 4),
    )


def test_ties_go_to_the_lowest_index(x64):
    init = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    x = np.array([[1.0, 0.0], [0.0, 1.0], [np.sqrt(0.5), np.sqrt(0.5)]])
    _, assignments, _ = spherical_kmeans(jax.random.key(0), x, 3, 0, init=init)
    np.testing.assert_array_equal(assignments, [1, 0, 0])


def test_masked_rows_count_for_nothing(x64):
    """A true mask means that the row counts, as `valid` does in a batch."""
    x, init = unit_rows(5, 32, 4), unit_rows(6, 5, 4)
    mask = np.random.default_rng(7).uniform(size=32) < 0.6
    dirty = np.where(mask[:, None], x, 1e3)
    centroids, assignments, objective = spherical_kmeans(jax.random.key(0), dirty, 5, 4, mask=mask, init=init)
    expected = kmeans_loop(x[mask], init, 4)
    np.testing.assert_array_equal(np.asarray(assignments)[~mask], -1)
    assert_same((centroids, np.asarray(assignments)[mask], objective), expected)


def test_a_mask_of_all_rows_changes_nothing(x64):
    x, init = unit_rows(5, 32, 4), unit_rows(6, 5, 4)
    result = spherical_kmeans(jax.random.key(0), x, 5, 4, mask=np.ones(32, bool), init=init)
    assert_same(result, kmeans_loop(x, init, 4))


def test_the_objective_does_not_fall_with_more_iterations(x64):
    x, init = unit_rows(8, 64, 5), unit_rows(9, 7, 5)
    objectives = [float(spherical_kmeans(jax.random.key(0), x, 7, i, init=init)[2]) for i in range(8)]
    assert np.diff(objectives).min() >= -1e-12
    assert objectives[-1] > objectives[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_init_it_starts_from_distinct_rows(x64, seed):
    x = unit_rows(10, 12, 4)
    centroids, _, _ = spherical_kmeans(jax.random.key(seed), x, 8, 0)
    nearest = (np.asarray(centroids) @ x.T).argmax(axis=1)
    assert len(set(nearest)) == 8
    np.testing.assert_allclose(centroids, x[nearest], rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_init_it_never_starts_from_a_masked_row(x64, seed):
    x, mask = unit_rows(11, 16, 4), np.arange(16) % 2 == 0
    centroids, _, _ = spherical_kmeans(jax.random.key(seed), x, 8, 0, mask=mask)
    nearest = (np.asarray(centroids) @ x.T).argmax(axis=1)
    assert set(nearest) == set(np.flatnonzero(mask))
    np.testing.assert_allclose(centroids, x[nearest], rtol=1e-12)


def test_without_init_the_rows_depend_on_the_key():
    x = unit_rows(12, 64, 4).astype(np.float32)
    first, _, _ = spherical_kmeans(jax.random.key(0), x, 4, 0)
    again, _, _ = spherical_kmeans(jax.random.key(0), x, 4, 0)
    other, _, _ = spherical_kmeans(jax.random.key(1), x, 4, 0)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_well_separated_clusters_are_found():
    """The best of several starts, because a start with two rows of one cluster can end in a poor optimum."""
    truth = np.arange(48) % 3
    x = np.eye(6)[truth] + 0.05 * np.random.default_rng(13).normal(size=(48, 6))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    runs = [spherical_kmeans(jax.random.key(seed), x, 3, 5) for seed in range(16)]
    centroids, assignments, objective = max(runs, key=lambda run: float(run[2]))
    assert objective > 0.98
    assert len(set(zip(truth.tolist(), np.asarray(assignments).tolist(), strict=True))) == 3
    np.testing.assert_allclose(np.sort(np.asarray(centroids @ np.eye(6)[:, :3]).max(axis=1)), 1.0, atol=0.01)


@pytest.mark.parametrize("masked", [False, True])
def test_sharded_rows_give_the_same_result(x64, masked):
    x, init = unit_rows(14, 64, 4), unit_rows(15, 5, 4)
    mask = np.random.default_rng(16).uniform(size=64) < 0.7 if masked else None
    kept = mask if masked else np.ones(64, bool)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        placed = jax.device_put(x, rows)
        placed_mask = jax.device_put(mask, rows) if masked else None
        centroids, assignments, objective = spherical_kmeans(
            jax.random.key(0), placed, 5, 4, mask=placed_mask, init=init
        )
    assert_same((centroids, np.asarray(assignments)[kept], objective), kmeans_loop(x[kept], init, 4))
    np.testing.assert_array_equal(np.asarray(assignments)[~kept], -1)


def test_sharded_rows_give_the_same_result_from_a_random_start(x64):
    x = unit_rows(17, 64, 4)
    alone = spherical_kmeans(jax.random.key(3), x, 5, 4)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        sharded = spherical_kmeans(jax.random.key(3), placed, 5, 4)
    assert_same(sharded, jax.tree.map(np.asarray, alone))
