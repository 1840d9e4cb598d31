"""Figures of predictions that are sets, of labels or of pixels by class, from three counts of each label or class.

``hits`` are right predictions (true positives), ``predicted`` all predictions of it (true and false positives), ``present`` how often it
was there (true positives and false negatives); arrays of counts [K]. They add up over samples, so that every figure here is that of the
whole set, not a mean of samples' figures.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[Any]


def micro_f1(hits: Counts, predicted: Counts, present: Counts) -> float | None:
    """``2 sum_k TP_k / sum_k (2 TP_k + FP_k + FN_k)``; None where no label is present.

    Source: Sokolova & Lapalme, A systematic analysis of performance measures for classification tasks, 2009, table 3 (beta = 1).

    >>> micro_f1(np.array([2, 0]), np.array([2, 1]), np.array([3, 0]))
    0.6666666666666666
    """
    return None if not present.sum() else float(2 * hits.sum() / (predicted.sum() + present.sum()))


def f1_by_label(hits: Counts, predicted: Counts, present: Counts) -> NDArray[np.float64]:
    """``2 TP_k / (2 TP_k + FP_k + FN_k)`` [K]; NaN for a label that is not present.

    >>> f1_by_label(np.array([2, 0]), np.array([2, 1]), np.array([3, 0]))
    array([0.8, nan])
    """
    return _over(2 * hits, predicted + present, present)


def iou_by_class(hits: Counts, predicted: Counts, present: Counts) -> NDArray[np.float64]:
    """Intersection over union ``TP_k / (TP_k + FP_k + FN_k)`` [K]; NaN for a class that is not present.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge: a retrospective, 2015, section 4.2.

    >>> iou_by_class(np.array([2, 0]), np.array([2, 1]), np.array([4, 1]))
    array([0.5, 0. ])
    """
    return _over(hits, predicted + present - hits, present)


def mean_present(values: NDArray[np.float64]) -> float | None:
    """Mean over the labels or classes that are present, of :func:`f1_by_label` (macro F1) or :func:`iou_by_class` (mean IoU).

    >>> mean_present(np.array([0.8, np.nan, 0.4])), mean_present(np.array([np.nan]))
    (0.6000000000000001, None)
    """
    found = values[~np.isnan(values)]
    return float(found.mean()) if found.size else None


def _over(above: Counts, below: Counts, present: Counts) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.divide(above, below, out=np.full(present.shape, np.nan), where=present > 0)
    return found
