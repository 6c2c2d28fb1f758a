"""Golden tests of `hexa_jax.losses`: equations 1-4 of the paper and SwAV's Sinkhorn rule in float64 NumPy."""

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from hexa_jax import losses

N, D, K = 5, 4, 7


def unit_rows(seed, *shape):
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def log_sum_exp(values):
    top = max(values)
    return top + np.log(sum(np.exp(value - top) for value in values))


def info_nce_loop(query, positive, negatives, temperature):
    """Equation 2: -log exp(q.k+/tau) / sum over k+ and the queue of exp(q.k/tau)."""
    result = []
    for q, k in zip(query, positive, strict=True):
        logits = [q @ k / temperature] + [q @ negative / temperature for negative in negatives]
        result.append(log_sum_exp(logits) - logits[0])
    return np.array(result)


def nt_xent_loop(z1, z2, temperature):
    """NT-Xent, both directions: an anchor must find its sibling among all other embeddings of the batch."""
    n = len(z1)
    everyone = np.concatenate([z1, z2])
    result = np.zeros(n)
    for anchor in range(2 * n):
        sibling = (anchor + n) % (2 * n)
        logits = [everyone[anchor] @ everyone[j] / temperature for j in range(2 * n) if j != anchor]
        positive = everyone[anchor] @ everyone[sibling] / temperature
        result[anchor % n] += 0.5 * (log_sum_exp(logits) - positive)
    return result


def prototype_loop(z, prototypes, labels, temperature):
    """Equation 4: -log exp(z.c_y/tau) / sum_j exp(z.c_j/tau); an unlabelled row costs nothing."""
    result = []
    for row, label in zip(z, labels, strict=True):
        logits = prototypes @ row / temperature
        result.append(log_sum_exp(logits) - logits[label] if label >= 0 else 0.0)
    return np.array(result)


def sinkhorn_loop(scores, epsilon, iterations):
    """SwAV's rule, in logarithms: scale prototypes to mass 1/K, then examples to mass 1/N, `iterations` times."""
    log_q = scores.T / epsilon  # [K, N]
    k, n = log_q.shape
    log_q = log_q - log_sum_exp(log_q.ravel())
    for _ in range(iterations):
        for row in range(k):
            log_q[row] -= log_sum_exp(log_q[row]) + np.log(k)
        for column in range(n):
            log_q[:, column] -= log_sum_exp(log_q[:, column]) + np.log(n)
    return np.exp(log_q + np.log(n)).T


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_is_equation_2(x64, temperature):
    query, positive, negatives = unit_rows(0, N, D), unit_rows(1, N, D), unit_rows(2, K, D)
    expected = info_nce_loop(query, positive, negatives, temperature)
    np.testing.assert_allclose(losses.info_nce(query, positive, negatives, temperature), expected, rtol=1e-12)


def test_info_nce_scores_are_plain_dot_products(x64):
    query, positive, negatives = 2.0 * unit_rows(0, N, D), 3.0 * unit_rows(1, N, D), 0.5 * unit_rows(2, K, D)
    expected = info_nce_loop(query, positive, negatives, 0.2)
    np.testing.assert_allclose(losses.info_nce(query, positive, negatives, 0.2), expected, rtol=1e-12)


def test_info_nce_permuting_the_batch_permutes_the_losses(x64):
    query, positive, negatives = unit_rows(3, N, D), unit_rows(4, N, D), unit_rows(5, K, D)
    order = np.array([3, 0, 4, 1, 2])
    straight = np.asarray(losses.info_nce(query, positive, negatives, 0.2))
    np.testing.assert_allclose(
        losses.info_nce(query[order], positive[order], negatives, 0.2), straight[order], rtol=1e-12
    )


def test_info_nce_does_not_see_the_order_of_the_queue(x64):
    query, positive, negatives = unit_rows(3, N, D), unit_rows(4, N, D), unit_rows(5, K, D)
    straight = losses.info_nce(query, positive, negatives, 0.2)
    np.testing.assert_allclose(losses.info_nce(query, positive, negatives[::-1], 0.2), straight, rtol=1e-12)


def test_info_nce_of_equal_vectors_is_log_of_the_number_of_candidates():
    same = np.ones((N, D), np.float32) / 2
    np.testing.assert_allclose(
        losses.info_nce(same, same, np.ones((K, D), np.float32) / 2, 0.2), np.log(K + 1), rtol=1e-6
    )


def test_info_nce_gradients(x64):
    check_grads(
        lambda q, k, n: losses.info_nce(q, k, n, 0.2),
        (unit_rows(6, N, D), unit_rows(7, N, D), unit_rows(8, K, D)),
        order=1,
        modes=["rev"],
    )


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_mean_of_both_directions(x64, temperature):
    z1, z2 = unit_rows(0, N, D), unit_rows(1, N, D)
    np.testing.assert_allclose(losses.nt_xent(z1, z2, temperature), nt_xent_loop(z1, z2, temperature), rtol=1e-12)


def test_nt_xent_is_symmetric_in_the_two_views(x64):
    z1, z2 = unit_rows(2, N, D), unit_rows(3, N, D)
    np.testing.assert_allclose(losses.nt_xent(z1, z2, 0.1), losses.nt_xent(z2, z1, 0.1), rtol=1e-12)


def test_nt_xent_permuting_the_batch_permutes_the_losses(x64):
    z1, z2, order = unit_rows(2, N, D), unit_rows(3, N, D), np.array([1, 4, 0, 2, 3])
    straight = np.asarray(losses.nt_xent(z1, z2, 0.1))
    np.testing.assert_allclose(losses.nt_xent(z1[order], z2[order], 0.1), straight[order], rtol=1e-12)


def test_nt_xent_gradients(x64):
    check_grads(
        lambda a, b: losses.nt_xent(a, b, 0.5), (unit_rows(4, N, D), unit_rows(5, N, D)), order=1, modes=["rev"]
    )


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_prototype_cross_entropy_is_equation_4(x64, temperature):
    z, prototypes, labels = unit_rows(0, N, D), unit_rows(1, K, D), np.array([0, 6, 3, 3, 1])
    expected = prototype_loop(z, prototypes, labels, temperature)
    np.testing.assert_allclose(losses.prototype_cross_entropy(z, prototypes, labels, temperature), expected, rtol=1e-12)


def test_prototype_cross_entropy_scores_are_plain_dot_products(x64):
    z, prototypes, labels = 2.0 * unit_rows(0, N, D), 0.5 * unit_rows(1, K, D), np.array([0, 6, 3, 3, 1])
    expected = prototype_loop(z, prototypes, labels, 0.1)
    np.testing.assert_allclose(losses.prototype_cross_entropy(z, prototypes, labels, 0.1), expected, rtol=1e-12)


def test_prototype_cross_entropy_of_label_minus_one_is_zero(x64):
    z, prototypes, labels = unit_rows(0, N, D), unit_rows(1, K, D), np.array([-1, 6, -1, 3, 1])
    result = np.asarray(losses.prototype_cross_entropy(z, prototypes, labels, 0.1))
    np.testing.assert_array_equal(result[[0, 2]], 0.0)
    np.testing.assert_allclose(result, prototype_loop(z, prototypes, labels, 0.1), rtol=1e-12)


def test_prototype_cross_entropy_of_label_minus_one_gives_no_gradient(x64):
    z, prototypes, labels = unit_rows(0, N, D), unit_rows(1, K, D), np.array([-1, -1, 2, -1, 1])

    def total(z, prototypes):
        return losses.prototype_cross_entropy(z, prototypes, labels, 0.1).sum()

    with_ignored, prototype_gradient = jax.grad(total, (0, 1))(z, prototypes)
    kept = np.array([2, 4])
    expected = jax.grad(lambda c: losses.prototype_cross_entropy(z[kept], c, labels[kept], 0.1).sum())(prototypes)
    np.testing.assert_array_equal(np.asarray(with_ignored)[[0, 1, 3]], 0.0)
    np.testing.assert_allclose(prototype_gradient, expected, rtol=1e-10, atol=1e-14)


def test_prototype_cross_entropy_permuting_the_batch_permutes_the_losses(x64):
    z, prototypes, labels = unit_rows(2, N, D), unit_rows(3, K, D), np.array([2, -1, 0, 6, 5])
    order = np.array([4, 2, 0, 1, 3])
    straight = np.asarray(losses.prototype_cross_entropy(z, prototypes, labels, 0.1))
    shuffled = losses.prototype_cross_entropy(z[order], prototypes, labels[order], 0.1)
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-12)


def test_prototype_cross_entropy_gradients(x64):
    labels = np.array([0, 6, -1, 3, 1])
    check_grads(
        lambda z, c: losses.prototype_cross_entropy(z, c, labels, 0.5),
        (unit_rows(4, N, D), unit_rows(5, K, D)),
        order=1,
        modes=["rev"],
    )


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_sinkhorn_is_the_reference_rule(x64, epsilon, iterations):
    scores = unit_rows(0, 12, D) @ unit_rows(1, K, D).T
    expected = sinkhorn_loop(scores, epsilon, iterations)
    np.testing.assert_allclose(losses.sinkhorn(scores, epsilon, iterations), expected, rtol=1e-9, atol=1e-15)


def test_sinkhorn_rows_sum_to_one():
    scores = (unit_rows(2, 12, D) @ unit_rows(3, K, D).T).astype(np.float32)
    codes = np.asarray(losses.sinkhorn(scores, 0.05, 3))
    assert (codes >= 0).all()
    np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-5)


def test_sinkhorn_shares_the_batch_equally_between_prototypes(x64):
    scores = unit_rows(2, 12, D) @ unit_rows(3, K, D).T
    codes = np.asarray(losses.sinkhorn(scores, 0.5, 200))
    np.testing.assert_allclose(codes.sum(axis=0), 12 / K, rtol=1e-6)


def test_sinkhorn_is_stable_for_large_scores_in_float64(x64):
    scores = np.random.default_rng(4).normal(size=(12, K)) * 100
    expected = sinkhorn_loop(scores, 0.05, 3)
    np.testing.assert_allclose(losses.sinkhorn(scores, 0.05, 3), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [10.0, 1e4])
def test_sinkhorn_is_stable_for_large_scores_in_float32(size):
    scores = (np.random.default_rng(5).normal(size=(12, K)) * size).astype(np.float32)
    codes = np.asarray(losses.sinkhorn(scores, 0.05, 3))
    assert np.isfinite(codes).all()
    np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-5)


def test_sinkhorn_permuting_the_batch_permutes_the_codes(x64):
    scores = unit_rows(6, N, D) @ unit_rows(7, K, D).T
    order = np.array([2, 3, 0, 4, 1])
    straight = np.asarray(losses.sinkhorn(scores, 0.05, 3))
    np.testing.assert_allclose(losses.sinkhorn(scores[order], 0.05, 3), straight[order], rtol=1e-10, atol=1e-15)
