"""Accuracy on every task at every evaluation, and the figures of continual evaluation drawn from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecl.metrics.matrix import AccuracyMatrix, Values
from edgecl_device.errors import InputError


@dataclass(init=False, frozen=True, eq=False)
class AccuracyTrace:
    """Accuracies along a stream, every one on the same fixed test set of its task.

    A subset drawn anew at every evaluation would make a minimum over time a minimum over noise: at a true accuracy of 50 %,
    1,000 test samples and 1,000 evaluations it lies 5 points too low.

    Attributes:
        values: Accuracy from 0 to 1 on every task at every evaluation, in order, float64 [E, T].
        current: Task of the last sample learned before each evaluation, int [E]; -1 where there was none.
        least: As of :class:`AccuracyMatrix`.

    Raises:
        InputError: when shapes do not fit, a value is no accuracy, or the tasks do not follow each other from 0 to T-1.

    >>> trace = AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1])
    >>> trace.matrix.values.tolist()
    [[1.0, 0.0], [0.75, 1.0]]
    """

    values: Values
    current: NDArray[np.int64]
    least: float

    def __init__(self, values: Sequence[Sequence[float]] | Values, current: Sequence[int] | NDArray[np.int64], least: float = 0.0) -> None:
        checked, tasks = np.array(values, np.float64), np.array(current, np.int64)
        if checked.ndim != 2 or not checked.size or tasks.shape != checked.shape[:1]:
            raise InputError(
                f"values, current: must be [evaluations, tasks] and [evaluations], got {list(checked.shape)} and {list(tasks.shape)}"
            )
        if not ((checked >= least) & (checked <= 1) & np.isfinite(checked)).all():
            raise InputError(
                f"values: must be accuracies from {least:g} to 1, got others or NaN; evaluate every task each time, divide percents"
            )
        steps = np.diff(tasks)
        if not (-1 <= tasks[0] <= 0 and ((steps == 0) | (steps == 1)).all() and tasks[-1] == checked.shape[1] - 1):
            raise InputError(
                f"current: must begin at -1 or 0 and go on by at most 1 to {checked.shape[1] - 1}, got {tasks.tolist()}; evaluate at the"
                " end of every task"
            )
        object.__setattr__(self, "least", least)
        for name, array in (("values", checked), ("current", tasks)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return int(self.values.shape[1])

    @property
    def matrix(self) -> AccuracyMatrix:
        """Accuracies at the last evaluation of every task."""
        return AccuracyMatrix(self.values[[np.flatnonzero(self.current == task)[-1] for task in range(self.tasks)]], self.least)

    def start(self, task: int) -> int:
        """Index of the last evaluation before the task's first sample; 0 when it was learned before the first evaluation."""
        return max(int(np.searchsorted(self.current, task)) - 1, 0)


def average_anytime_accuracy(trace: AccuracyTrace) -> float:
    """AAA: mean over evaluations of the accuracy on the tasks met so far, ``mean_n mean_{j<=k(n)} A_j(n)``.

    Evaluations before the first sample do not count. Every task weighs the same, whatever its size.

    Source: Caccia et al., New Insights on Reducing Abrupt Representation Change in Online Continual Learning, 2022.

    >>> average_anytime_accuracy(AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1]))
    0.7916666666666666
    """
    met = [(row, task) for row, task in zip(trace.values, trace.current, strict=True) if task >= 0]
    return float(np.mean([row[: task + 1].mean() for row, task in met]))


def minimum_accuracy(trace: AccuracyTrace) -> float:
    """min-ACC: mean over all tasks but the last of the lowest accuracy after the task, ``mean_{j<T-1} min_{n: k(n)>j} A_j(n)``.

    Raises:
        InputError: with one task only.

    Source: De Lange, van de Ven, Tuytelaars, Continual evaluation for lifelong learning: Identifying the stability gap, 2023.

    >>> minimum_accuracy(AccuracyTrace([[0.25, 0.0], [1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[-1, 0, 1, 1]))
    0.5
    """
    _need_two(trace)
    return float(np.mean([trace.values[trace.current > task, task].min() for task in range(trace.tasks - 1)]))


def worst_case_accuracy(trace: AccuracyTrace) -> float:
    """WC-ACC: ``1/T A_{T-1}(end) + (1 - 1/T) min-ACC``, what holds at any time of the stream.

    Raises:
        InputError: with one task only.

    Source: De Lange, van de Ven, Tuytelaars, Continual evaluation for lifelong learning: Identifying the stability gap, 2023.

    >>> worst_case_accuracy(AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1]))
    0.75
    """
    share = 1 / trace.tasks
    return share * float(trace.values[-1, -1]) + (1 - share) * minimum_accuracy(trace)


def stability_gap(trace: AccuracyTrace) -> float:
    """Depth of the drop while a new task is learned: mean over tasks k and earlier j of what ``A_j`` falls below its value before k.

    ``mean_{k>=1} mean_{j<k} max(0, A_j(end of k-1) - min_{n: k(n)=k} A_j(n))``. Unlike forgetting it sees what recovers. De Lange
    et al. show the gap in plots and give no single figure; this one is edgecl's.

    Raises:
        InputError: with one task only.

    Source: of the phenomenon, De Lange, van de Ven, Tuytelaars, Identifying the stability gap, 2023.

    >>> stability_gap(AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1]))
    0.5
    """
    _need_two(trace)
    drops = []
    for task in range(1, trace.tasks):
        before = trace.values[trace.start(task), :task]
        lowest = trace.values[trace.current == task, :task].min(0)
        drops.append(np.maximum(before - lowest, 0).mean())
    return float(np.mean(drops))


def _need_two(trace: AccuracyTrace) -> None:
    if trace.tasks < 2:
        raise InputError(f"trace: must have at least 2 tasks, got {trace.tasks}; nothing can be forgotten before the second")
