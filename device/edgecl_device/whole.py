"""Memories that hand out all of their rows: what ``adapt`` updates from.

They hold exactly ``rows_per_step`` rows, which go to the step as they lie, without a copy of them; nothing is drawn for it. An offer can be
taken back, so that an update which is refused leaves the memory as it was.

Source of ``balanced``: Gong et al. 2022, "NOTE: Robust Continual Test-time Adaptation Against Temporal Correlation" (prediction-balanced
reservoir sampling).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgecl_device.adapt_checks import ADAPT
from edgecl_device.errors import InputError
from edgecl_device.generator import WORD
from edgecl_device.manifest import WHOLE, Array, ReplaySpec, TensorSpec
from edgecl_device.memory import ReplayMemory, memory_layout, take
from edgecl_device.rows import RowFile, Rows


class WholeMemory(ReplayMemory):
    """Rows that are read all at once, beside the classes that were predicted for them.

    Args:
        spec: Fields, number of rows, policy, seed and counter.
        classes: Classes that may be predicted.

    ``ring`` keeps the last rows. ``balanced`` (NOTE's PBRS) keeps classes level: while there is room it takes every row. Then a row of a
    class that is not among the largest takes the place of a random row of a random largest class. One of a largest class takes the place
    of a random row of its own with a chance of m / n, with m rows kept of n that were offered of that class, as a reservoir does.
    """

    def __init__(self, spec: ReplaySpec, classes: int) -> None:
        self._offered = np.zeros(classes if spec.policy == "balanced" else 0, np.int64)
        super().__init__(spec, classes)

    @property
    def nbytes(self) -> int:
        """Bytes of every array that the memory holds."""
        return super().nbytes + self._offered.nbytes

    def offer(self, row: Mapping[str, Array], target: Array | int, sample_id: int) -> int | None:
        """Offer one sample; returns the slot that it now fills, or None when it is not kept.

        Args:
            row: One array a field, without a batch dimension.
            target: The class that was predicted.
            sample_id: Its number.
        """
        slot = self._admit(int(target))
        if slot is not None:
            self._put(slot, row, sample_id)
        return slot

    def offer_for_now(self, row: Mapping[str, Array], target: Array | int, sample_id: int) -> Callable[[], None]:
        """As :meth:`offer`; returns what takes the offer back, to the bit, as long as nothing else has happened to the memory."""
        arrays: tuple[Array, ...] = (self._slots, self._starts, self._offered)
        before, seen, counter = [array.copy() for array in arrays], self._seen, self.generator.counter
        slot = self._admit(int(target))
        where = slice(0, 0) if slot is None else slice(slot, slot + 1)
        old, old_id = {name: values[where].copy() for name, values in self._all().items()}, self._ids[where].copy()
        if slot is not None:
            self._put(slot, row, sample_id)

        def take_back() -> None:
            for array, kept in zip(arrays, before, strict=True):
                array[...] = kept
            self._seen, self.generator.counter = seen, counter
            for name, values in self._all().items():
                values[where] = old[name]
            self._ids[where] = old_id

        return take_back

    def is_due(self, every: int, ahead: int = 0) -> bool:
        """Whether an update is due: the memory is full, and a multiple of ``every`` samples has been offered; behind ``ahead`` more."""
        return min(len(self) + ahead, self.rows) == self.rows and (self._seen + ahead) % every == 0

    def draw(self, step: str = ADAPT) -> dict[str, Array]:
        """``replay.FIELD`` [rows, ...], the memory's own arrays, in the order in which they lie; beside them each ``draw.NAME``."""
        return {**{f"replay.{name}": values for name, values in self._all().items()}, **self._drawn(step)}

    def clear(self) -> None:
        """Forget every row, and what was offered; the generator goes on."""
        super().clear()
        for values in self._all().values():
            values[...] = 0
        self._offered[...] = 0

    def snapshot(self) -> dict[str, Array]:
        """Copies of everything that :meth:`restore` needs."""
        return {**super().snapshot(), "memory.offered": self._offered.copy()}

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Take over a snapshot of a memory of the same spec, bit for bit.

        Raises:
            InputError: when it does not fit; nothing is changed then.
        """
        offered = take(snapshot, TensorSpec("memory.offered", self._offered.shape, "int64"))
        if (offered < 0).any():
            raise InputError(f"memory.offered: must be at least 0, got {offered.tolist()}; write the rows again")
        super().restore(snapshot)
        self._offered[...] = offered

    def _all(self) -> dict[str, Array]:
        """Every row by field, those that are free as well."""
        assert isinstance(self._rows, Rows)
        return self._rows.arrays

    def _put(self, slot: int, row: Mapping[str, Any], sample_id: int) -> None:
        self._rows.write(slot, row)
        self._ids[slot] = sample_id

    def _admit(self, label: int) -> int | None:
        """The slot that a row of a class gets, None when it is not kept."""
        self._seen += 1
        if self.spec.policy == "ring":
            return self._move((self._seen - 1) % self.rows, 0)
        self._offered[label] += 1
        place = self._place_balanced(label)
        return None if place is None else self._move(place, label)

    def _place_balanced(self, label: int) -> int | None:
        if len(self) < self.rows:
            return len(self)
        counts = self.class_counts()
        largest = np.flatnonzero(counts == counts.max())
        if label in largest:
            offset = self.generator.below(min(int(self._offered[label]), WORD))
            return int(self._starts[label]) + offset if offset < counts[label] else None
        victim = int(largest[self.generator.below(len(largest))])
        return int(self._starts[victim]) + self.generator.below(int(counts[victim]))


def memory_of(spec: ReplaySpec, classes: int, file: RowFile | None = None) -> ReplayMemory:
    """The memory that a spec describes.

    Args:
        spec: Fields, budget, policy, seed and counter.
        classes: Classes that a label may name.
        file: Where the rows lie; None is memory.

    Raises:
        InputError: as :class:`edgecl_device.memory.ReplayMemory`.
    """
    if spec.policy not in WHOLE:
        return ReplayMemory(spec, classes, file)
    memory_layout(spec, classes)  # refuses what the policy cannot have, a file among it
    return WholeMemory(spec, classes)
