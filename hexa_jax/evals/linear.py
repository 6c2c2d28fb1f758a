"""Linear probe on fixed features: multinomial logistic regression, the same for pixels and for networks."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    *,
    regularization: float = 1e-4,
    iterations: int = 200,
) -> np.ndarray:
    """Classes of the test features by a linear classifier fitted to the training features.

    Features are standardised with the training set's mean and deviation, so that no representation gains from its scale.

    Args:
        train: float [N, F].
        train_labels: int [N].
        test: float [Q, F].
        regularization: L2 weight, relative to the mean loss.
        iterations: of L-BFGS at most.

    Returns:
        int [Q].
    """
    scaler = StandardScaler().fit(train)
    classifier = LogisticRegression(C=1 / (regularization * len(train)), max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is the same for all, and stated
        classifier.fit(scaler.transform(train), train_labels)
    return classifier.predict(scaler.transform(test))
