"""Streams in which classes or domains come back."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from edgecl.streams.dataset import Dataset
from edgecl.streams.stream import Indices, Plan, PlannedStream, check_classes, check_present, where
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class Recurring(PlannedStream):
    """A stream of visits; a class or group that comes in several visits brings new samples each time.

    The samples of a value that is listed n times, base set included, are split at random into n shares whose sizes differ by
    at most one, so that each sample still comes once. Every visit is a task; its test set holds all test samples of its
    values, the same at every visit.

    Attributes:
        dataset: Where the samples come from.
        base_values: Classes or groups of the base set, task 0; none for a stream that starts from nothing.
        visits: Classes or groups of every visit.
        by: What the values are: ``class`` or ``group``.
        seed: Of the shares and of the order of the samples, base set included.

    Raises:
        InputError: when a value has no training sample or fewer than visits, is listed twice in one visit, a visit is empty, or
            the data set has no groups.

    Source: Hemati et al., Class-Incremental Learning with Repetition, 2023, for classes that come back.

    >>> from edgecl.streams import fashion_mnist_subset
    >>> stream = Recurring(fashion_mnist_subset(), base_values=[0, 1], visits=[[2, 3], [0, 1], [2, 3]])
    >>> len(stream.base[1]), len(stream), sorted({(sample.task, sample.y) for sample in stream})
    (200, 600, [(1, 2), (1, 3), (2, 0), (2, 1), (3, 2), (3, 3)])
    """

    dataset: Dataset
    base_values: Sequence[int]
    visits: Sequence[Sequence[int]]
    by: str = "class"
    seed: int = 0
    _plan: Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values, values_test = self._values()
        base, visits = list(self.base_values), [list(visit) for visit in self.visits]
        parts = [base, *visits]
        if not all(visits) or any(len(set(part)) != len(part) for part in parts):
            raise InputError(f"base_values, visits: every visit needs values, each listed once in it, got {parts}; mend the list")
        times = Counter(chain.from_iterable(parts))
        check_present("base_values, visits", self.by, times, values)
        generator = np.random.default_rng(self.seed)
        shares: dict[int, list[Indices]] = {}
        for value, visited in sorted(times.items()):
            mine = where(values, [value])
            if len(mine) < visited:
                raise InputError(
                    f"visits: {self.by} {value} must have a sample for each of {visited} visits, got {len(mine)}; visit it less"
                )
            shares[value] = np.array_split(generator.permutation(mine), visited)
        orders = [
            generator.permutation(np.concatenate([np.empty(0, np.int64), *(shares[value].pop(0) for value in part)])) for part in parts
        ]
        tests = [where(values_test, part) for part in parts if part]
        object.__setattr__(self, "_plan", Plan(orders[0], orders[1:], tests))

    def _values(self) -> tuple[Indices, Indices]:
        """Class or group of every training and every test sample."""
        if self.by not in {"class", "group"}:
            raise InputError(f"by: must be 'class' or 'group', got {self.by!r}; pass one of them")
        if self.by == "class":
            check_classes("recurring by class", self.dataset)
            return self.dataset.y, self.dataset.y_test
        if self.dataset.group is None or self.dataset.group_test is None:
            raise InputError("dataset: must have groups for a stream over groups, got none; give group, group_test and group_names")
        return self.dataset.group, self.dataset.group_test
