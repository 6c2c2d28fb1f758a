"""Linear probe on fixed features: multinomial logistic regression."""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


class LinearClassifier(NamedTuple):
    """Logits ((x - mean) / scale) @ kernel + bias of the classes that were there to learn from.

    Attributes:
        mean: float [F], of the features.
        scale: float [F], their deviation; 1 where a feature is constant.
        kernel: float [F, C].
        bias: float [C].
        classes: int [C], ascending: what a column of the logits stands for.
    """

    mean: np.ndarray
    scale: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    classes: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Classes int [Q] of features [Q, F]."""
        logits = ((features - self.mean) / self.scale) @ self.kernel + self.bias
        return self.classes[np.argmax(logits, axis=1)]


def fit_linear(
    train: np.ndarray,
    train_labels: np.ndarray,
    *,
    regularization: float = 1e-4,
    iterations: int = 200,
    statistics_of: np.ndarray | None = None,
) -> LinearClassifier:
    """A linear classifier fitted to the training features by L-BFGS.

    Features are standardized with their mean and deviation, so that no representation gains from
    its scale.

    Args:
        train: float [N, F].
        train_labels: int [N], of two classes at least.
        regularization: L2 weight, relative to the mean loss.
        iterations: of L-BFGS at most.
        statistics_of: float [M, F], whose mean and deviation to take instead of the training
            features': a few examples say little of how features vary, and those without labels say
            the same as the others.

    Raises:
        ValueError: fewer than two classes.
    """
    scaler = StandardScaler().fit(train if statistics_of is None else statistics_of)
    classifier = LogisticRegression(C=1 / (regularization * len(train)), max_iter=iterations)
    with warnings.catch_warnings():
        # the budget is the same for all, and stated
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(scaler.transform(train), train_labels)
    kernel, bias = classifier.coef_.T, classifier.intercept_
    # scikit-learn keeps the difference of two classes' logits only
    if len(classifier.classes_) == 2:
        kernel, bias = np.hstack([np.zeros_like(kernel), kernel]), np.array([0.0, *bias])
    return LinearClassifier(scaler.mean_, scaler.scale_, kernel, bias, classifier.classes_)


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    *,
    regularization: float = 1e-4,
    iterations: int = 200,
) -> np.ndarray:
    """Classes int [Q] of the test features [Q, F] by `fit_linear` on the training features."""
    classifier = fit_linear(
        train, train_labels, regularization=regularization, iterations=iterations
    )
    return classifier.predict(test)
