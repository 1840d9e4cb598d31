"""Class-incremental and task-incremental streams: new classes come group by group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from edgecl.streams.dataset import Dataset
from edgecl.streams.stream import Plan, PlannedStream, check_classes, check_parts, where
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class ClassIncremental(PlannedStream):
    """Base classes first, then the others group by group, one sample at a time, each sample once, or as often as there are epochs.

    Within a group the order is random and its classes are mixed. Test sets hold the task's own classes; a prediction is made
    among all classes.

    Attributes:
        dataset: Where the samples come from.
        base_classes: Classes of the base set, task 0; none for a stream that starts from nothing.
        steps: Classes of every task of the stream.
        seed: Of the order of the samples, base set included.
        epochs: Passes over each group, in another order each, before the next group comes; 1 is what a device meets.

    Raises:
        InputError: when samples have no class of their own, a class has no training sample or is listed twice, a group is empty, or
            there is no pass.

    Source: van de Ven & Tolias, Three scenarios for continual learning, 2019.

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
    epochs: int = 1
    _plan: Plan = field(init=False, repr=False)
    scenario: ClassVar[str] = "class-incremental"

    def __post_init__(self) -> None:
        check_classes(self.scenario, self.dataset)
        base, steps = list(self.base_classes), [list(step) for step in self.steps]
        check_parts("base_classes, steps", "class", base, steps, self.dataset.y)
        if self.epochs < 1:
            raise InputError(f"epochs: must be at least 1, got {self.epochs}; 1 shows each sample once")
        generator = np.random.default_rng(self.seed)
        orders = [generator.permutation(where(self.dataset.y, base))]
        for group in steps:
            samples = where(self.dataset.y, group)
            orders.append(np.concatenate([generator.permutation(samples) for _ in range(self.epochs)]))
        tests = [where(self.dataset.y_test, group) for group in self._groups]
        object.__setattr__(self, "_plan", Plan(orders[0], orders[1:], tests))

    @property
    def _groups(self) -> list[list[int]]:
        """Classes of every task, the base set's first where there is one."""
        return [*([list(self.base_classes)] if len(self.base_classes) else []), *map(list, self.steps)]


@dataclass(frozen=True, eq=False)
class TaskIncremental(ClassIncremental):
    """As :class:`ClassIncremental`, but which task a sample belongs to is known when it is predicted.

    The learner is the same; the evaluation takes the highest score among the classes of the sample's task. This is the easier
    setting: classes of different tasks are never confused.

    Source: van de Ven & Tolias, Three scenarios for continual learning, 2019.

    >>> from edgecl.streams import fashion_mnist_subset
    >>> TaskIncremental(fashion_mnist_subset(), base_classes=[], steps=[[0, 1], [2, 3]]).choices(1)
    [2, 3]
    """

    scenario: ClassVar[str] = "task-incremental"

    def choices(self, task: int) -> Sequence[int]:
        """The task's classes.

        Raises:
            InputError: when there is no such task.
        """
        return self._groups[self._checked(task)]
