"""Streams with blurred task boundaries (Si-Blurry)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgecl.streams.dataset import Dataset
from edgecl.streams.stream import Indices, Plan, PlannedStream, check_classes, check_present, where
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class Blurry(PlannedStream):
    """Si-Blurry: tasks of random size; some classes come in one task only, samples of the others come in any.

    All classes but the base ones are dealt to the tasks in random numbers, at least one to each: a task's home classes. A
    share of the classes, drawn at random, is disjoint: all their samples come in their home task. Of all samples of the other,
    blurry classes a share is drawn at random, mixed, and dealt to the tasks in random numbers. Within a task the order is
    random. Each sample comes once. Test sets hold the task's home classes.

    Deviations from the authors' code: all classes are dealt in one go, and every task has a home class, so that its accuracy is
    defined (theirs deals disjoint and blurry classes apart, and a task may have none); the blurred samples are drawn from all
    blurry classes alike and their number is exact (theirs takes up to as many from a task as the task gets back); no class is
    dropped where numbers do not divide.

    Attributes:
        dataset: Where the samples come from.
        splits: Number of the stream's tasks.
        disjoint: Share N of the classes that are disjoint, 0 to 1.
        blurred: Share M of the blurry classes' samples that are dealt to any task, 0 to 1.
        base_classes: Classes of the base set, task 0; none for a stream that starts from nothing.
        seed: Of all that is random.
        home_classes: Home classes of every task of the stream.
        disjoint_classes: The disjoint classes.

    Raises:
        InputError: when samples have no class of their own, a share is out of range, there are more splits than classes, a base
            class has no training sample, or a task is left without a sample.

    Source: Moon, Park, Kim, Park, Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask and Visual
    Prompt Tuning, ICCV 2023 (N = 50 %, M = 10 %).

    >>> from edgecl.streams import fashion_mnist_subset
    >>> stream = Blurry(fashion_mnist_subset(), splits=3, seed=1)
    >>> len(stream), stream.tasks, [len(classes) for classes in stream.home_classes], len(stream.disjoint_classes)
    (2000, 3, [4, 1, 5], 5)
    """

    dataset: Dataset
    splits: int = 5
    disjoint: float = 0.5
    blurred: float = 0.1
    base_classes: Sequence[int] = ()
    seed: int = 0
    home_classes: tuple[tuple[int, ...], ...] = field(init=False)
    disjoint_classes: tuple[int, ...] = field(init=False)
    _plan: Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_classes("blurry", self.dataset)
        for name, share in (("disjoint", self.disjoint), ("blurred", self.blurred)):
            if not 0 <= share <= 1:
                raise InputError(f"{name}: must be a share from 0 to 1, got {share}; divide percents")
        y, base = self.dataset.y, list(self.base_classes)
        check_present("base_classes", "class", base, y)
        classes = np.setdiff1d(y, base)
        if not 1 <= self.splits <= len(classes):
            raise InputError(f"splits: must be from 1 to {len(classes)}, the classes of the stream, got {self.splits}; take fewer")
        generator = np.random.default_rng(self.seed)
        first = generator.permutation(where(y, base))
        cuts = 1 + np.sort(generator.choice(len(classes) - 1, self.splits - 1, replace=False))
        homes = [home.tolist() for home in np.split(generator.permutation(classes), cuts)]
        disjoint = generator.choice(classes, round(self.disjoint * len(classes)), replace=False)
        tasks = self._blur(generator, [where(y, home) for home in homes], np.isin(y, disjoint))
        empty = [i for i, order in enumerate(tasks) if not len(order)]
        if empty:
            raise InputError(f"blurred: every task must keep a sample, got none in {empty}; take fewer splits or another seed")
        tests = [where(self.dataset.y_test, home) for home in [*([base] if base else []), *homes]]
        object.__setattr__(self, "home_classes", tuple(map(tuple, homes)))
        object.__setattr__(self, "disjoint_classes", tuple(disjoint.tolist()))
        object.__setattr__(self, "_plan", Plan(first, tasks, tests))

    def _blur(
        self, generator: np.random.Generator, own: list[Indices], disjoint: np.ndarray[tuple[int], np.dtype[np.bool_]]
    ) -> list[Indices]:
        """The samples of every task in order, from those of its home classes."""
        blurry = np.concatenate([part[~disjoint[part]] for part in own])
        moved = generator.choice(blurry, round(self.blurred * len(blurry)), replace=False)
        parts = np.split(moved, np.sort(generator.integers(0, len(moved) + 1, self.splits - 1)))
        kept = [part[~np.isin(part, moved)] for part in own]
        return [generator.permutation(np.concatenate(both)) for both in zip(kept, parts, strict=True)]
