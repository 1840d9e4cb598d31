"""Figures of real vectors, output by output."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def spread(targets: NDArray[Any]) -> Values:
    """Sum of squares around the mean, ``sum_i (y_i - mean(y))^2``, of each output [D] of targets [N, D].

    >>> spread(np.array([[0.0, 5.0], [2.0, 5.0]]))
    array([2., 0.])
    """
    values = targets.astype(np.float64)
    if not len(values):
        return np.zeros(values.shape[1])
    found: Values = np.where(values.max(0) == values.min(0), 0.0, ((values - values.mean(0)) ** 2).sum(0))  # not their mean's rounding
    return found


def r_squared(squared_errors: Values, spreads: Values) -> Values:
    """Coefficient of determination ``R^2 = 1 - sum_i (y_i - f_i)^2 / sum_i (y_i - mean(y))^2`` of each output [D].

    1 is perfect, 0 what always predicting the mean of these targets gives; below zero it is worse than that. NaN where an output
    does not vary.

    Args:
        squared_errors: Sum of squared errors of each output [D].
        spreads: Of :func:`spread` [D].

    Source: Draper & Smith, Applied Regression Analysis, 1998, section 1.3; on targets that the predictor has not seen.

    >>> r_squared(np.array([1.0, 1.0]), np.array([2.0, 0.0]))
    array([0.5, nan])
    """
    found: Values = 1 - np.divide(squared_errors, spreads, out=np.full(spreads.shape, np.nan), where=spreads > 0)
    return found
