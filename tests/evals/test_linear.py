"""The linear probe: separable classes, scale of the features, the objective that it minimises."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from hexa_jax.evals.knn import accuracy
from hexa_jax.evals.linear import linear_probe


def clusters(num, seed=0, spread=0.15, classes=4, dim=6):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, num)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return (centres[labels] + spread * generator.normal(size=(num, dim))).astype(np.float32), labels


def test_separable_features_are_solved():
    (train, train_labels), (test, test_labels) = clusters(200), clusters(150, seed=1)
    predictions = linear_probe(train, train_labels, test)
    assert predictions.shape == (150,) and accuracy(predictions, test_labels) >= 99


def test_shuffled_labels_are_not():
    (train, train_labels), (test, test_labels) = clusters(200), clusters(150, seed=1)
    shuffled = np.random.default_rng(3).permutation(train_labels)
    assert accuracy(linear_probe(train, shuffled, test), test_labels) < 60


@pytest.mark.parametrize("regularization", [1e-4, 1.0])
def test_scale_and_offset_of_the_features_do_not_matter(regularization):
    (train, train_labels), (test, _) = clusters(120, spread=0.8), clusters(300, seed=1, spread=0.8)
    plain = linear_probe(train, train_labels, test, regularization=regularization)
    scale, offset = np.float32([1e-4, 1e3, 1, 7, 0.01, 30]), np.float32([1, -50, 0, 3, 0.02, 9])
    moved = linear_probe(train * scale + offset, train_labels, test * scale + offset, regularization=regularization)
    assert (plain == moved).mean() > 0.99
    assert len(set(plain.tolist())) == 4


def test_standardised_by_the_training_set_alone():
    """A test set with another mean keeps it: the same rows give the same classes whatever stands beside them."""
    (train, train_labels), (test, _) = clusters(120, spread=0.8), clusters(80, seed=1, spread=0.8)
    together = linear_probe(train, train_labels, np.concatenate([test, test + 100]))
    np.testing.assert_array_equal(together[:80], linear_probe(train, train_labels, test))


@pytest.mark.parametrize("num", [40, 160])
def test_regularization_is_relative_to_the_mean_loss(num):
    """The same weight means the same on few and on many examples: against the objective in NumPy, float64."""
    train, labels = clusters(num, spread=1.0)
    test, _ = clusters(400, seed=1, spread=1.0)
    mean, std, weight = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64), 0.3
    x = (train - mean) / std

    def objective(flat):
        w, b = flat[:24].reshape(6, 4), flat[24:]
        scores = x @ w + b
        slopes = (np.exp(scores - logsumexp(scores, axis=1, keepdims=True)) - np.eye(4)[labels]) / num
        loss = np.mean(logsumexp(scores, axis=1) - scores[np.arange(num), labels]) + weight / 2 * np.sum(w**2)
        return loss, np.concatenate([(x.T @ slopes + weight * w).ravel(), slopes.sum(0)])

    solution = minimize(objective, np.zeros(28), jac=True, options={"gtol": 1e-8}).x
    expected = np.argmax((test - mean) / std @ solution[:24].reshape(6, 4) + solution[24:], axis=1)
    got = linear_probe(train, labels, test, regularization=weight)
    assert (got == expected).mean() > 0.99
    assert (linear_probe(train, labels, test, regularization=1e-4) == expected).mean() < 0.97


def test_a_small_budget_is_no_warning():
    (train, labels), (test, _) = clusters(200, spread=2.0), clusters(10, seed=1)
    assert linear_probe(train, labels, test, regularization=1e-6, iterations=2).shape == (10,)
