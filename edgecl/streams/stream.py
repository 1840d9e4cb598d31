"""Streams: the order in which a learner meets a data set's samples.

A scenario gives a base set to prepare the learner on, then samples one at a time. Tasks are numbered from 0: the base set is
task 0 where there is one, else the stream's first task is; in a stream of one task alone the base set belongs to it. The learner
sees no task boundary: ``Sample.task`` is for metrics and plots only.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.dataset import Dataset
from edgecl_device.errors import InputError

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a stream.

    Attributes:
        x: The sample, as in the data set.
        y: Its target: the class index, or an array as the data set has it.
        task: The task that it belongs to; the stream's first is 1, or 0 when there is no base set.
    """

    x: NDArray[Any]
    y: Any
    task: int


class Stream(Protocol):
    """What the evaluation needs of a scenario; each one decides what a task is."""

    @property
    def tasks(self) -> int:
        """Number of tasks, the base set included."""

    @property
    def base(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Samples and targets of the base set, in random order; none when there is no base set."""

    def test(self, task: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The test samples and targets of one task."""

    def choices(self, task: int) -> Sequence[int] | None:
        """Classes among which a prediction for a sample of this task is made; None when the task is not known then."""

    def __len__(self) -> int:
        """Samples in the stream, the base set not included."""

    def __iter__(self) -> Iterator[Sample]:
        """The samples in their order; every pass gives the same."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Which samples of a data set come when.

    Attributes:
        base: Indices of the base set's training samples; empty when there is none.
        tasks: Indices of the training samples of every task of the stream, in their order.
        tests: Indices of the test samples of every task, the base set's first where there is one.
    """

    base: Indices
    tasks: Sequence[Indices]
    tests: Sequence[Indices]


class PlannedStream:
    """A :class:`Stream` over a data set, from a plan that a scenario draws once."""

    dataset: Dataset
    _plan: Plan

    @property
    def tasks(self) -> int:
        """Number of tasks, the base set included."""
        return len(self._plan.tests)

    @property
    def base(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Samples [N, ...] and targets [N, ...] of the base set, in random order; N is 0 when there is none."""
        return self.dataset.x[self._plan.base], self.dataset.y[self._plan.base]

    def test(self, task: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Test samples [M, ...] and targets [M, ...] of one task.

        Raises:
            InputError: when there is no such task.
        """
        mine = self._plan.tests[self._checked(task)]
        return self.dataset.x_test[mine], self.dataset.y_test[mine]

    def choices(self, task: int) -> Sequence[int] | None:
        """None: the task is not known at prediction, every class is a choice.

        Raises:
            InputError: when there is no such task.
        """
        self._checked(task)
        return None

    def __len__(self) -> int:
        return sum(len(order) for order in self._plan.tasks)

    def __iter__(self) -> Iterator[Sample]:
        for task, order in enumerate(self._plan.tasks, start=self.tasks - len(self._plan.tasks)):
            for i in order:
                y = self.dataset.y[i]
                yield Sample(self.dataset.x[i], int(y) if self.dataset.kind == "class" else y, task)

    def _checked(self, task: int) -> int:
        if not 0 <= task < self.tasks:
            raise InputError(f"task: must be in 0..{self.tasks - 1}, got {task}")
        return task


def check_classes(scenario: str, dataset: Dataset) -> None:
    """Refuse a data set whose samples have no class of their own, which the scenario sorts them by."""
    if dataset.kind != "class":
        raise InputError(
            f"scenario: {scenario} needs one class a sample, got targets of kind {dataset.kind}; take domain-incremental (by group), "
            "recurring by group, time-ordered or one-task"
        )


def check_parts(names: str, what: str, base: Sequence[int], steps: Sequence[Sequence[int]], present: Indices) -> None:
    """Refuse parts of a data set that are empty, share a value, or have no training sample.

    Args:
        names: The parameters.
        what: ``class`` or ``group``.
        base: Values of the base set, none where there is no base set.
        steps: Values of every task.
        present: Value of every training sample.
    """
    parts = [*([base] if base else []), *steps]
    listed = list(chain.from_iterable(parts))
    if not all(parts):
        raise InputError(f"{names}: every task needs a {what}, got {parts}; drop the empty one")
    if len(set(listed)) != len(listed):
        raise InputError(f"{names}: each {what} may be listed once, got {parts}")
    check_present(names, what, listed, present)


def check_present(names: str, what: str, listed: Iterable[int], present: Indices) -> None:
    """Refuse values that have no training sample."""
    missing = sorted(set(listed) - set(np.unique(present).tolist()))
    if missing:
        raise InputError(f"{names}: the data set must have training samples of each {what}, got none of {missing}; leave them out")


def where(values: Indices, wanted: Sequence[int]) -> Indices:
    """Indices of the samples whose value is wanted, in order."""
    return np.flatnonzero(np.isin(values, wanted))
