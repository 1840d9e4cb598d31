"""Streams without changing classes or groups: in the order of time, or of one task in random order."""

from dataclasses import dataclass, field

import numpy as np

from edgecl.streams.dataset import Dataset
from edgecl.streams.stream import Plan, PlannedStream
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class TimeOrdered(PlannedStream):
    """The samples in the data set's order, which is that of time; slices of time are the tasks.

    The test set must be in the order of time, too: it is cut at the same shares, so that each task is tested on its own time.

    Attributes:
        dataset: Where the samples come from, of any kind of target.
        base_share: Share of the training samples, the first ones, in the base set, task 0; 0 for a stream that starts from nothing.
        splits: Number of the stream's tasks, of equal length but for one sample.

    Raises:
        InputError: when the share is out of range, or a task is left without a sample.

    >>> x = np.arange(10)
    >>> stream = TimeOrdered(Dataset(x, x % 2, x[:5], x[:5] % 2, ("no", "yes")), base_share=0.4, splits=2)
    >>> stream.base[0].tolist(), [(int(sample.x), sample.task) for sample in stream], stream.test(0)[0].tolist()
    ([0, 1, 2, 3], [(4, 1), (5, 1), (6, 1), (7, 2), (8, 2), (9, 2)], [0, 1])
    """

    dataset: Dataset
    base_share: float = 0.0
    splits: int = 1
    _plan: Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_share(self.base_share)
        samples = len(self.dataset.y) - round(self.base_share * len(self.dataset.y))
        if not 1 <= self.splits <= samples:
            raise InputError(f"splits: must be from 1 to {samples}, the samples of the stream, got {self.splits}; take fewer")
        base, *tasks = self._cut(len(self.dataset.y), self.base_share)
        tests = self._cut(len(self.dataset.y_test), self.base_share if len(base) else 0.0)
        if len(base) and not len(tests[0]):
            raise InputError(
                f"base_share: must leave the base set a test sample, got {self.base_share} of {len(self.dataset.y_test)}; "
                "raise it, or pass 0"
            )
        object.__setattr__(self, "_plan", Plan(base, tasks, tests if len(base) else tests[1:]))

    def _cut(self, count: int, share: float) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Indices of the base set and of every task."""
        base = round(share * count)
        return [np.arange(base), *np.array_split(np.arange(base, count), self.splits)]


@dataclass(frozen=True, eq=False)
class OneTask(PlannedStream):
    """A stream of one task: a random part of the samples is the base set, the others come in random order.

    The base set belongs to the task. All test samples are its test set: there is one curve, and nothing to forget.

    Attributes:
        dataset: Where the samples come from, of any kind of target.
        base_share: Share of the training samples in the base set; 0 for a stream that starts from nothing.
        seed: Of the draw and the order.

    Raises:
        InputError: when the share is out of range.

    >>> x = np.arange(10)
    >>> stream = OneTask(Dataset(x, x % 2, x, x % 2, ("no", "yes")), base_share=0.3)
    >>> len(stream.base[1]), len(stream), stream.tasks, len(stream.test(0)[1])
    (3, 7, 1, 10)
    """

    dataset: Dataset
    base_share: float = 0.0
    seed: int = 0
    _plan: Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_share(self.base_share)
        count = len(self.dataset.y)
        order = np.random.default_rng(self.seed).permutation(count)
        base = round(self.base_share * count)
        object.__setattr__(self, "_plan", Plan(order[:base], [order[base:]], [np.arange(len(self.dataset.y_test))]))


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise InputError(f"base_share: must be a share from 0 to below 1, got {share}; divide percents")
