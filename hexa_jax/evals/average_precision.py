"""Average precision: the area under the monotone precision-recall curve.

The rule of Goyal et al., svm_helper.py.
"""

import numpy as np


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve after precision was made to fall with recall.

    Args:
        positive: bool [N].
        scores: float [N]; equal scores count in the order given.

    Returns:
        A number from 0 to 1; NaN where nothing is positive.
    """
    if not positive.any():
        return float("nan")
    hits = positive[np.argsort(-scores, kind="stable")]
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    recall = found / found[-1]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))
