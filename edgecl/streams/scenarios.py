"""Streams: the order in which a learner meets a data set's samples.

A scenario gives a base set to prepare the learner on (task 0), then samples one at a time. The learner sees no task
boundary: ``Sample.task`` is for metrics and plots only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.dataset import Dataset
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample of a stream.

    Attributes:
        x: The sample, as in the data set.
        y: Its class index.
        task: The task that it belongs to; the base set is task 0, so the stream's first is 1.
    """

    x: NDArray[Any]
    y: int
    task: int


class Stream(Protocol):
    """What the evaluation needs of a scenario; each one decides what a task is."""

    @property
    def tasks(self) -> int:
        """Number of tasks, the base set included."""

    @property
    def base(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Samples and labels of the base set, in random order."""

    def test(self, task: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The test samples and labels of one task."""

    def __len__(self) -> int:
        """Samples in the stream, the base set not included."""

    def __iter__(self) -> Iterator[Sample]:
        """The samples in their order; every pass gives the same."""


@dataclass(frozen=True, eq=False)
class ClassIncremental:
    """Base classes first, then the others group by group, one sample at a time, each sample once.

    Within a group the order is random and its classes are mixed. Test sets hold the task's own classes.

    Attributes:
        dataset: Where the samples come from.
        base_classes: Classes of the base set, task 0.
        steps: Classes of task 1, 2, ...
        seed: Of the order of the samples, base set included.

    Raises:
        InputError: when a class is unknown, is listed twice, or a group is empty.

    >>> from edgecl.streams import fashion_mnist_subset
    >>> stream = ClassIncremental(fashion_mnist_subset(), base_classes=range(6), steps=[[6], [7], [8], [9]])
    >>> len(stream.base[1]), len(stream), stream.tasks
    (1200, 800, 5)
    >>> next(iter(stream)).y
    6
    """

    dataset: Dataset
    base_classes: Sequence[int]
    steps: Sequence[Sequence[int]]
    seed: int = 0
    _orders: tuple[NDArray[np.int64], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        listed = list(chain.from_iterable(self._groups))
        if not all(self._groups):
            raise InputError(f"base_classes, steps: every group needs a class, got {self._groups}; drop the empty one")
        if len(set(listed)) != len(listed):
            raise InputError(f"base_classes, steps: each class may be listed once, got {self._groups}")
        missing = sorted(set(listed) - set(np.unique(self.dataset.y).tolist()))
        if missing:
            raise InputError(f"base_classes, steps: the data set has no training samples of the classes {missing}; leave them out")
        generator = np.random.default_rng(self.seed)
        orders = (generator.permutation(np.flatnonzero(np.isin(self.dataset.y, group))) for group in self._groups)
        object.__setattr__(self, "_orders", tuple(orders))

    @property
    def _groups(self) -> list[list[int]]:
        return [list(self.base_classes), *map(list, self.steps)]

    @property
    def tasks(self) -> int:
        """Number of tasks, the base set included."""
        return len(self._orders)

    @property
    def base(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Samples [N, ...] and labels int64 [N] of the base classes, in random order."""
        return self.dataset.x[self._orders[0]], self.dataset.y[self._orders[0]]

    def test(self, task: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Test samples [M, ...] and labels int64 [M] of one task's classes.

        Raises:
            InputError: when there is no such task.
        """
        if not 0 <= task < self.tasks:
            raise InputError(f"task: must be in 0..{self.tasks - 1}, got {task}")
        mine = np.isin(self.dataset.y_test, self._groups[task])
        return self.dataset.x_test[mine], self.dataset.y_test[mine]

    def __len__(self) -> int:
        return sum(len(order) for order in self._orders[1:])

    def __iter__(self) -> Iterator[Sample]:
        for task, order in enumerate(self._orders[1:], start=1):
            for i in order:
                yield Sample(self.dataset.x[i], int(self.dataset.y[i]), task)
