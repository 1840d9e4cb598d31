"""The accuracy matrix and the figures drawn from it.

``R[i, j]`` is the accuracy on task ``j`` after learning task ``i``, on one fixed test set for each task. Where the model
was prepared on a base set, that is task 0, and row 0 is the learner before its first sample on the device. Every task
counts the same, whatever its size. Entries above the diagonal (tasks not met yet) may be NaN: not evaluated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecl_device.errors import InputError

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """A checked, read-only accuracy matrix.

    Attributes:
        values: Accuracies from 0 to 1, float64 [T, T]; NaN above the diagonal where a task was not evaluated.
        least: Of other scores than accuracies the least that there can be: minus infinity for R^2.

    Raises:
        InputError: when it is not square, or an entry is out of range or missing.

    >>> R = AccuracyMatrix.from_rows([[0.9], [0.7, 0.8]])
    >>> R.tasks, float(R.values[1, 0])
    (2, 0.7)
    """

    values: Values
    least: float = 0.0

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
            raise InputError(f"values: must be square [tasks, tasks], got {list(values.shape)}; evaluate every task after each one")
        if ((values < self.least) | (values > 1)).any() or np.isinf(values).any():
            raise InputError(
                f"values: accuracies must be from {self.least:g} to 1, got {np.nanmin(values)} to {np.nanmax(values)}; divide percents"
            )
        if np.isnan(values[np.tril_indices_from(values)]).any():
            raise InputError("values: entries on and below the diagonal must be numbers, got NaN; evaluate all tasks met so far")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float]]) -> "AccuracyMatrix":
        """Build from one row per learned task: accuracies of tasks 0, 1, ...; tasks that a row leaves out become NaN.

        Raises:
            InputError: as the constructor does, and when a row is longer than there are rows.
        """
        values = np.full((len(rows), len(rows)), np.nan)
        for i, row in enumerate(rows):
            if len(row) > len(rows):
                raise InputError(f"rows: row {i} must have at most {len(rows)} accuracies, one for each row, got {len(row)}")
            values[i, : len(row)] = row
        return cls(values)

    @property
    def tasks(self) -> int:
        """Number of tasks T, the base set included."""
        return len(self.values)


def average_accuracy(matrix: AccuracyMatrix) -> float:
    """Mean of the last row: ``mean_j R[T-1, j]``.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, 2017, equation 2.

    >>> average_accuracy(AccuracyMatrix.from_rows([[1.0], [0.5, 1.0]]))
    0.75
    """
    return float(matrix.values[-1].mean())


def average_incremental_accuracy(matrix: AccuracyMatrix) -> float:
    """Mean over rows of the accuracy on the tasks met so far: ``mean_i mean_{j<=i} R[i, j]``.

    Source: Rebuffi et al., iCaRL, 2017, section 4.1, here with every task weighing the same.

    >>> average_incremental_accuracy(AccuracyMatrix.from_rows([[1.0], [0.5, 1.0]]))
    0.875
    """
    return float(np.mean([row[: i + 1].mean() for i, row in enumerate(matrix.values)]))


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """What later tasks did to earlier ones: ``mean_{j<T-1} (R[T-1, j] - R[j, j])``; negative is forgetting.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, 2017, equation 3.

    Raises:
        InputError: with one task only.

    >>> backward_transfer(AccuracyMatrix.from_rows([[1.0], [0.5, 1.0]]))
    -0.5
    """
    earlier = _earlier(matrix)
    return float((earlier[-1] - np.diag(earlier)).mean())


def forgetting(matrix: AccuracyMatrix, variant: str = "max_before_last") -> float:
    """Mean over all tasks but the last of what was lost between the best and the last accuracy.

    Args:
        matrix: Accuracies R.
        variant: What "best" means.

            - ``max_before_last``: ``max_{i<T-1} R[i, j]``; negative when the last row is the best.
              Source: Chaudhry et al., Riemannian Walk, 2018, equation 3.
            - ``max_including_last``: ``max_i R[i, j]``, never negative. Source: the Mammoth library.
            - ``first_minus_last``: ``R[j, j]``, the negative of :func:`backward_transfer`. Source: the Avalanche library.

            The maxima take in what was evaluated above the diagonal; NaN entries do not count.

    Raises:
        InputError: with one task only, or on an unknown variant.

    >>> R = AccuracyMatrix.from_rows([[0.5], [0.75, 1.0], [1.0, 0.5, 1.0]])
    >>> [forgetting(R, variant) for variant in FORGETTING_VARIANTS]
    [0.125, 0.25, 0.0]
    """
    if variant not in FORGETTING_VARIANTS:
        raise InputError(f"variant: must be one of {list(FORGETTING_VARIANTS)}, got {variant!r}")
    earlier = _earlier(matrix)
    return float((FORGETTING_VARIANTS[variant](earlier) - earlier[-1]).mean())


def _earlier(matrix: AccuracyMatrix) -> Values:
    """R without the last task's column, [T, T-1]."""
    if matrix.tasks < 2:
        raise InputError(f"matrix: must have at least 2 tasks, got {matrix.tasks}; nothing can be forgotten before the second")
    return matrix.values[:, :-1]


FORGETTING_VARIANTS: dict[str, Callable[[Values], Values]] = {
    "max_before_last": lambda earlier: np.nanmax(earlier[:-1], axis=0),
    "max_including_last": lambda earlier: np.nanmax(earlier, axis=0),
    "first_minus_last": np.diag,
}
"""Best accuracy of every earlier task [T-1], from R without the last task's column [T, T-1]."""
