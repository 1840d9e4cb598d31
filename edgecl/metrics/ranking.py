"""Average precision: how well scores put the samples of a label before the others, whatever the threshold."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def average_precision(scores: NDArray[Any], present: NDArray[Any]) -> float | None:
    """``sum_n (R_n - R_{n-1}) P_n`` over the thresholds n, from the highest distinct score down; no interpolation.

    Args:
        scores: One a sample [N].
        present: Whether the label is there [N].

    Returns:
        From 0 to 1, or None where no sample has the label.

    Source: Manning, Raghavan, Schuetze, Introduction to Information Retrieval, 2008, section 8.4, for equal scores as scikit-learn has it:
    samples of one score are one step.

    >>> average_precision(np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1]))
    0.8333333333333333
    """
    if not present.any():
        return None
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], np.cumsum(present[order] > 0)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each run of equal scores
    precision, recall = right[last] / (last + 1), right[last] / right[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def mean_average_precision(scores: NDArray[Any], present: NDArray[Any]) -> float | None:
    """mAP: mean of :func:`average_precision` over the labels that some sample has, of scores and labels [N, K].

    >>> mean_average_precision(np.array([[0.9, 0.1], [0.1, 0.2]]), np.array([[1, 0], [0, 0]]))
    1.0
    """
    found = [each for k in range(scores.shape[1]) if (each := average_precision(scores[:, k], present[:, k])) is not None]
    return float(np.mean(found)) if found else None
