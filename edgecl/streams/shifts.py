"""In which order corrupted images come, where a learner starts anew, and how long classes stay."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.stream import Indices
from edgecl_device.errors import InputError

MOST_SLOTS = 100
"""Slots of a Dirichlet order, or as many as classes where these are fewer."""


LEAST_CONCENTRATION = 0.001
"""Of a Dirichlet order; far below, each class has one slot, and shares are no numbers any more."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Samples of one severity, and of one corruption but where corruptions are mixed.

    Attributes:
        index: Index of every sample among the test images, in their order, int64 [n].
        corruption: Corruption of every one, text [n].
        severity: Of all.
        reset: Whether the learner starts anew, as the source left it, in front of them.
        task: Task that they belong to, from 0, a base set not counted.
    """

    index: Indices
    corruption: NDArray[np.str_]
    severity: int
    reset: bool
    task: int


Order = Callable[[], Indices]
"""Draws an order of all test images."""

Setting = Callable[[Order, Sequence[str], int], Iterator[Stretch]]


def _reset_each_shift(order: Order, corruptions: Sequence[str], severity: int) -> Iterator[Stretch]:
    for task, name in enumerate(corruptions):
        index = order()
        yield Stretch(index, np.full(len(index), name), severity, True, task)


def _continual(order: Order, corruptions: Sequence[str], severity: int) -> Iterator[Stretch]:
    for part in _reset_each_shift(order, corruptions, severity):
        yield Stretch(part.index, part.corruption, part.severity, part.task == 0, part.task)


def _gradual(order: Order, corruptions: Sequence[str], severity: int) -> Iterator[Stretch]:
    for task, name in enumerate(corruptions):
        for step, level in enumerate([*range(1, severity), *range(severity, 0, -1)]):
            index = order()
            yield Stretch(index, np.full(len(index), name), level, task == step == 0, task)


def _mixed(order: Order, corruptions: Sequence[str], severity: int) -> Iterator[Stretch]:
    rounds, names = [order() for _ in corruptions], np.array(corruptions)
    # In round k image i has corruption (i + k) modulo their number, so that it meets each of them once.
    chosen = [names[(index + k) % len(names)] for k, index in enumerate(rounds)]
    yield Stretch(np.concatenate(rounds), np.concatenate(chosen), severity, True, 0)


SETTINGS: dict[str, Setting] = {
    "reset_each_shift": _reset_each_shift,
    "continual": _continual,
    "gradual": _gradual,
    "mixed": _mixed,
    "correlated": _continual,
}
"""Settings by name; correlated is continual with another order of the images."""


def in_runs(y: NDArray[np.int64], run: int, generator: np.random.Generator) -> Indices:
    """An order in which each class stays for at least ``run`` samples, at most twice as many where another class follows.

    A class's samples, in random order, are split into runs of as equal lengths as can be. Runs come in rounds of one run a class, in
    random order, and no class follows itself as long as another one has runs left.

    Raises:
        InputError: when a class has fewer samples than a run.
    """
    left: dict[int, list[Indices]] = {}
    for label in np.unique(y).tolist():
        mine = generator.permutation(np.flatnonzero(y == label))
        if len(mine) < run:
            raise InputError(f"run: must be at most {len(mine)}, the test images of class {label}, got {run}; take shorter runs")
        left[label] = np.array_split(mine, len(mine) // run)
    done: list[Indices] = []
    last = -1
    while left:
        labels = generator.permutation(list(left)).tolist()
        if labels[0] == last:
            labels = labels[1:] + labels[:1]
        for label in labels:
            done.append(left[label].pop())
            if not left[label]:
                del left[label]
        last = labels[-1]
    return np.concatenate(done)


def in_slots(y: NDArray[np.int64], concentration: float, generator: np.random.Generator) -> Indices:
    """An order in which the shares of the classes change from slot to slot, and each slot's classes come one after the other.

    There are as many slots as classes, at most 100. For each class one draw of a Dirichlet distribution says which share of its samples
    lies in which slot: the smaller the concentration, the fewer slots, and the longer a class stays.

    Source: Gong et al., NOTE, NeurIPS 2022 (concentration 0.1); slots as in Yuan et al., Robust Test-Time Adaptation in Dynamic Scenarios,
    CVPR 2023.
    """
    labels = np.unique(y).tolist()
    slots = min(len(labels), MOST_SLOTS)
    parts: list[list[Indices]] = [[] for _ in range(slots)]
    for label in labels:
        mine = generator.permutation(np.flatnonzero(y == label))
        shares = generator.dirichlet(np.full(slots, concentration))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(mine)).astype(np.int64)
        for slot, part in zip(parts, np.split(mine, cuts), strict=True):
            slot.append(part)
    return np.concatenate([slot[i] for slot in parts for i in generator.permutation(len(labels))])
