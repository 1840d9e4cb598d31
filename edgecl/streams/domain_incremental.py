"""Domain-incremental streams: the classes stay, the speaker, user or time changes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgecl.streams.dataset import Dataset
from edgecl.streams.stream import Plan, PlannedStream, check_parts, where
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class DomainIncremental(PlannedStream):
    """Samples of some groups first, then of the others group by group, one sample at a time, each sample once.

    Test sets hold the test samples of the task's own groups.

    Attributes:
        dataset: Where the samples come from; its ``group`` says which domain each belongs to.
        base_groups: Groups of the base set, task 0; none for a stream that starts from nothing.
        steps: Groups of every task of the stream.
        seed: Of the order of the samples, base set included.
        in_order: Keep the data set's order within a task of the stream, for groups that are slices of time; else it is random.

    Raises:
        InputError: when the data set has no groups, a group has no training sample or is listed twice, or a task has no group.

    Source: van de Ven & Tolias, Three scenarios for continual learning, 2019.

    >>> x, y, speaker = np.arange(6), np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 1, 1, 2, 2])
    >>> data = Dataset(x, y, x, y, ("no", "yes"), speaker, speaker, ("ann", "bob", "eve"))
    >>> stream = DomainIncremental(data, base_groups=[0, 1], steps=[[data.group_names.index("eve")]])
    >>> sorted(stream.base[0].tolist()), sorted(int(sample.x) for sample in stream), stream.test(1)[0].tolist()
    ([0, 1, 2, 3], [4, 5], [4, 5])
    """

    dataset: Dataset
    base_groups: Sequence[int]
    steps: Sequence[Sequence[int]]
    seed: int = 0
    in_order: bool = False
    _plan: Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        group, group_test = self.dataset.group, self.dataset.group_test
        if group is None or group_test is None:
            raise InputError("dataset: must have groups for a stream over domains, got none; give group, group_test and group_names")
        base, steps = list(self.base_groups), [list(step) for step in self.steps]
        check_parts("base_groups, steps", "group", base, steps, group)
        generator = np.random.default_rng(self.seed)
        first = generator.permutation(where(group, base))
        orders = [where(group, step) if self.in_order else generator.permutation(where(group, step)) for step in steps]
        tests = [where(group_test, part) for part in [*([base] if base else []), *steps]]
        object.__setattr__(self, "_plan", Plan(first, orders, tests))
