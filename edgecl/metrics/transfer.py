"""Forward transfer: what earlier tasks did for a task before it was learned."""

from collections.abc import Sequence

import numpy as np

from edgecl.metrics.matrix import AccuracyMatrix, Values
from edgecl_device.errors import InputError


def forward_transfer(matrix: AccuracyMatrix, initial: Sequence[float]) -> float:
    """What the tasks before a task did for it: ``mean_{j>=1} (R[j-1, j] - b[j])``.

    Args:
        matrix: Accuracies R, evaluated just above the diagonal too.
        initial: Accuracy ``b`` of the learner at its initialisation, before its base set, on every task [T].

    Raises:
        InputError: with one task only, when ``initial`` does not fit, or an entry just above the diagonal is missing.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, 2017, equation 4.

    >>> forward_transfer(AccuracyMatrix.from_rows([[1.0, 0.75], [0.5, 1.0]]), initial=[0.5, 0.25])
    0.5
    """
    b = np.asarray(initial, np.float64)
    if b.shape != (matrix.tasks,) or not ((b >= matrix.least) & (b <= 1)).all():
        raise InputError(
            f"initial: must be {matrix.tasks} accuracies from {matrix.least:g} to 1, one for each task, got {list(initial)}; measure them"
        )
    return float((_above(matrix).diagonal() - b[1:]).mean())


def forward_transfer_raw(matrix: AccuracyMatrix) -> float:
    """Mean accuracy on tasks not learned yet: ``2 / (T (T-1)) sum_{i<j} R[i, j]``. No initial accuracy is taken off.

    Raises:
        InputError: with one task only, or when an entry above the diagonal is missing.

    Source: Diaz-Rodriguez et al., Don't forget, there is more than forgetting, 2018; the CapyMOA library's forward transfer.

    >>> forward_transfer_raw(AccuracyMatrix.from_rows([[1.0, 0.75, 0.25], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]))
    0.5
    """
    above = _above(matrix)
    return float(above[np.triu_indices_from(above)].mean())


def _above(matrix: AccuracyMatrix) -> Values:
    """R without its last row and first column [T-1, T-1]: row i on task i+1 is the diagonal."""
    if matrix.tasks < 2:
        raise InputError(f"matrix: must have at least 2 tasks, got {matrix.tasks}; nothing can be transferred before the second")
    above = matrix.values[:-1, 1:]
    if np.isnan(above[np.triu_indices_from(above)]).any():
        raise InputError("matrix: entries above the diagonal must be numbers, got NaN; evaluate every task after each one")
    return above
