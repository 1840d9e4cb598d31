"""Replay memory: pre-allocated rows in memory or in a file, a budget in bytes, two eviction policies.

The rows of one class form a segment of ``slots``, a permutation of all slots; free slots are the segment behind the
last class. Moving a slot from one class to another shifts one slot of every class between them, which is one
vectorised copy: O(1) in the rows and O(classes) in the classes, with 4 bytes a row and 4 bytes a class.

Source: Vitter, "Random sampling with a reservoir", 1985 (algorithm R); Gemulla, Lehner, Haas, "A dip in the reservoir",
VLDB 2006 (random pairing after a removal); Hayes et al., "REMIND your neural network to prevent catastrophic forgetting",
ECCV 2020 (eviction from the largest class).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgecl_device.errors import InputError
from edgecl_device.generator import WORD, Generator
from edgecl_device.manifest import WHOLE, Array, ReplaySpec, TensorSpec
from edgecl_device.rows import HEADER_BYTES, RowFile, Rows

POLICIES = ("reservoir", "largest-class")
"""Of memories from which ``learn`` gets rows by chance."""

ASIDE = 0x72656672657368
"""Added, bit by bit, to the seed for draws that leave the generator where it is ("refresh" in ASCII)."""
_ROW_OVERHEAD = 8 + 4  # sample id int64 and slot int32
_MOST_ROWS = (1 << 31) - 1  # what a slot number can be
_MOST_BYTES = 1 << 40


def memory_layout(spec: ReplaySpec, classes: int) -> tuple[int, int]:
    """Rows that fit into ``spec.capacity_bytes``, and the bytes that the whole memory then takes.

    Everything counts: the fields, each row's sample id and slot, the segment starts of the classes, and the buffers
    that :meth:`ReplayMemory.draw` fills. The label costs nothing: it is the segment in which the slot lies.

    Raises:
        InputError: when not one row fits, naming the smallest capacity; when it is beyond 2**40 bytes or 2**31 - 1 rows.

    >>> spec = ReplaySpec((TensorSpec("z", (4,), "uint8"),), rows_per_step=2, capacity_bytes=1000, policy="reservoir", seed=0)
    >>> memory_layout(spec, classes=10)
    (57, 992)
    """
    if spec.policy not in POLICIES + WHOLE:
        raise InputError(f"policy: must be one of {', '.join(POLICIES + WHOLE)}, got {spec.policy!r}; export the bundle again")
    if spec.rows_per_step < 1:
        raise InputError(f"rows_per_step: must be at least 1, got {spec.rows_per_step}; export the bundle again")
    field_bytes = sum(field.nbytes for field in spec.fields)
    if has_targets(spec) and spec.policy == "largest-class":
        raise InputError("policy: must be 'reservoir' for rows whose target is no class index, got 'largest-class'; take 'reservoir'")
    if spec.policy in WHOLE:
        return _whole_layout(spec, classes)
    drawn = sum(draw.tensor.nbytes for draw in spec.draws)
    fixed = spec.rows_per_step * (field_bytes + (4 if has_targets(spec) else 8 + 4)) + 4 * (_segments(spec, classes) + 2) + drawn
    row = field_bytes + _ROW_OVERHEAD
    rows = (spec.capacity_bytes - fixed) // row
    if rows < 1:
        raise InputError(
            f"capacity_bytes: must be at least {fixed + row} for one row of {row} bytes beside {fixed} bytes of buffers, "
            f"got {spec.capacity_bytes}; raise it"
        )
    if spec.capacity_bytes > _MOST_BYTES or rows > _MOST_ROWS:
        raise InputError(
            f"capacity_bytes: must be at most {min(_MOST_BYTES, fixed + (_MOST_ROWS + 1) * row - 1)} for rows of {row} bytes, "
            f"got {spec.capacity_bytes}; lower it"
        )
    return rows, fixed + rows * row


def whole_bytes(spec: ReplaySpec, classes: int) -> int:
    """Bytes of a memory that hands out all of its ``rows_per_step`` rows as they lie, without buffers.

    >>> spec = ReplaySpec((TensorSpec("z", (4,), "uint8"),), rows_per_step=8, capacity_bytes=0, policy="ring", seed=0)
    >>> whole_bytes(spec, classes=10)
    140
    """
    row = sum(field.nbytes for field in spec.fields) + _ROW_OVERHEAD
    offered = 8 * classes if spec.policy == "balanced" else 0
    drawn = sum(draw.tensor.nbytes for draw in spec.draws)
    return spec.rows_per_step * row + 4 * (_segments(spec, classes) + 2) + offered + drawn


def _whole_layout(spec: ReplaySpec, classes: int) -> tuple[int, int]:
    nbytes = whole_bytes(spec, classes)
    if has_targets(spec) or spec.in_file:
        what = "a field 'target'" if has_targets(spec) else "a file of their own"
        raise InputError(f"policy: must be one of {', '.join(POLICIES)} for rows with {what}, got {spec.policy!r}; export the bundle again")
    if nbytes > min(spec.capacity_bytes, _MOST_BYTES) or spec.rows_per_step > _MOST_ROWS:
        raise InputError(
            f"capacity_bytes: must be at least {nbytes} and at most {_MOST_BYTES} for {spec.rows_per_step} rows, "
            f"got {spec.capacity_bytes}; take fewer rows, or raise it"
        )
    return spec.rows_per_step, nbytes


def memory_bytes(spec: ReplaySpec, classes: int) -> tuple[int, int]:
    """Bytes that a memory takes: in memory, and in its file, where it has one.

    >>> spec = ReplaySpec((TensorSpec("z", (4,), "uint8"),), rows_per_step=2, capacity_bytes=1000, policy="reservoir", seed=0, in_file=True)
    >>> memory_bytes(spec, classes=10)  # 57 rows of 4 bytes behind a header of 64
    (764, 292)
    """
    rows, nbytes = memory_layout(spec, classes)
    if not spec.in_file:
        return nbytes, 0
    in_rows = rows * sum(field.nbytes for field in spec.fields)
    return nbytes - in_rows, HEADER_BYTES + in_rows


def row_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """A sample's own row among a step's outputs, without its batch dimension, as :meth:`ReplayMemory.offer` takes it; empty without one.

    >>> row_of({"loss": 0.5, "row.z": [[1, 2]]})
    {'z': [1, 2]}
    """
    return {name.removeprefix("row."): value[0] for name, value in outputs.items() if name.startswith("row.")}


def has_targets(spec: ReplaySpec) -> bool:
    """Whether rows hold their targets as a field ``target``, as those that are no class index."""
    return any(field.name == "target" for field in spec.fields)


def _segments(spec: ReplaySpec, classes: int) -> int:
    return 1 if has_targets(spec) or spec.policy == "ring" else classes


class ReplayMemory:
    """Rows of past samples with their labels, drawn without replacement.

    Args:
        spec: Fields, budget, policy, seed and counter.
        classes: Classes that a label may name.
        file: Where the rows lie; None is memory. What is drawn and evicted does not depend on it.

    Raises:
        InputError: when not one row fits, or this machine has no memory for all of them.

    ``reservoir`` keeps a uniform sample of everything offered: the n-th offer (from 1) replaces row ``j = below(n)`` when
    ``j`` is below the number of rows. After a removal, random pairing keeps it uniform. Beyond 2**32 offers n stays at that.
    ``largest-class`` evicts, when full, a random row of the class with the most rows, the offered sample counted among
    them, so that it may be the one that goes; of equally large classes, the one of the lowest index.
    Rows with a field ``target`` have no class: they form one segment.
    """

    def __init__(self, spec: ReplaySpec, classes: int, file: RowFile | None = None) -> None:
        self.spec = spec
        self.classes = _segments(spec, classes)
        self.rows, nbytes = memory_layout(spec, classes)
        self.generator = Generator(spec.seed, spec.counter)
        self.file = file
        try:
            self._rows = file or Rows(spec.fields, self.rows)
            self._allocate()
        except MemoryError as error:
            raise InputError(f"capacity_bytes: this machine has no memory for {nbytes} bytes of rows; lower it") from error
        self._seen = spec.seen
        self._gone_inside = 0  # removals not yet made up for, of samples that were kept
        self._gone_outside = 0  # and of samples that were not

    def _allocate(self) -> None:
        spec, classes = self.spec, self.classes
        self._labelled = not has_targets(spec)
        self._ids = np.full(self.rows, -1, np.int64)
        self._slots = np.arange(self.rows, dtype=np.int32)
        self._starts = np.zeros(classes + 2, np.int32)
        self._starts[-1] = self.rows
        r = spec.rows_per_step
        buffered = 0 if spec.policy in WHOLE else r
        self._batch = {f"replay.{field.name}": np.zeros((buffered, *field.shape), field.dtype) for field in spec.fields}
        self._target = np.zeros(buffered if self._labelled else 0, np.int64)
        self._weight = np.zeros(buffered, np.float32)
        self._draws = {draw.tensor.name: draw.tensor.zeros() for draw in spec.draws}

    def __len__(self) -> int:
        return int(self._starts[self.classes])

    @property
    def nbytes(self) -> int:
        """Bytes of every array that the memory holds, those of rows in a file not among them; never above ``spec.capacity_bytes``."""
        arrays = [*self._batch.values(), self._ids, self._slots, self._starts, self._target, self._weight, *self._draws.values()]
        return self._rows.nbytes + sum(array.nbytes for array in arrays)

    def report(self) -> dict[str, int]:
        """Rows kept and their room, bytes of memory; of a file its bytes, and the rows that wait for the next snapshot to be written."""
        file = {} if self.file is None else {"file_bytes": self.file.file_bytes, "rows_waiting": self.file.waiting}
        return {"rows": len(self), "row_capacity": self.rows, "bytes": self.nbytes, **file}

    @property
    def seen(self) -> int:
        """Samples offered so far, less the removed ones."""
        return self._seen

    def class_counts(self) -> Array:
        """Rows by class: int64 [classes]."""
        return np.diff(self._starts[:-1]).astype(np.int64)

    def offer(self, row: Mapping[str, Array], target: Array | int, sample_id: int) -> int | None:
        """Offer one sample; returns the slot that it now fills, or None when the policy does not keep it.

        Args:
            row: One array a field but ``target``, without a batch dimension.
            target: Class index; for rows with a field ``target`` its value.
            sample_id: The id by which :meth:`remove` and :meth:`relabel` find it.
        """
        self._seen += 1
        label = int(target) if self._labelled else 0
        place = self._place_reservoir() if self.spec.policy == "reservoir" else self._place_largest(label)
        if place is None:
            return None
        slot = self._move(place, label)
        self._rows.write(slot, row if self._labelled else {**row, "target": np.asarray(target)})
        self._ids[slot] = sample_id
        return slot

    def draw_aside(self, step: str) -> dict[str, Array]:
        """What :meth:`draw` gives, from a stream of words of its own: nothing that is drawn later depends on whether a step has run.

        The step's rows and integers are those of the seed :data:`ASIDE` away, at the present counter and of the rows kept now.
        """
        kept = self.generator
        self.generator = Generator(self.spec.seed ^ ASIDE, kept.counter)
        try:
            return self.draw(step)
        finally:
            self.generator = kept

    def draw(self, step: str = "learn") -> dict[str, Array]:
        """Rows for one update: ``replay.FIELD`` [r, ...], ``replay.target`` int64 [r] where no field is one, ``replay.weight`` float32 [r].

        Beside them each ``draw.NAME`` of the step.

        The arrays are the memory's own and are filled anew by the next draw. With fewer rows than r the rest is filled
        with zeros at weight zero. Only the generator's counter changes: set it back to undo a draw.
        """
        count = len(self)
        k = min(self.spec.rows_per_step, count)
        places = np.array(self.generator.sample(count, k), np.int64)
        slots = self._slots[places]
        for name, values in self._rows.read(slots).items():
            batch = self._batch[f"replay.{name}"]
            batch[:k] = values
            batch[k:] = 0
        self._weight[:k] = 1
        self._weight[k:] = 0
        drawn = self._drawn(step)
        if self._labelled:
            self._target[:k] = np.searchsorted(self._starts, places, side="right") - 1
            self._target[k:] = 0
        return {"replay.target": self._target, **self._batch, "replay.weight": self._weight, **drawn}

    def _drawn(self, step: str) -> dict[str, Array]:
        """Each ``draw.NAME`` of a step, drawn now."""
        drawn = {draw.tensor.name: (draw, self._draws[draw.tensor.name]) for draw in self.spec.draws if draw.step == step}
        for draw, array in drawn.values():
            array.reshape(-1)[:] = [self.generator.below(draw.below) for _ in range(array.size)]
        return {name: array for name, (_, array) in drawn.items()}

    def remove(self, sample_id: int) -> bool:
        """Erase an offered sample; returns whether it was still kept. Searches all rows: O(rows)."""
        place = self._find(sample_id)
        self._seen -= 1
        if place is None:
            self._gone_outside += 1
            return False
        self._gone_inside += 1
        slot = self._move(place, self.classes)
        self._rows.write(slot, {field.name: field.zeros() for field in self.spec.fields})
        self._ids[slot] = -1
        return True

    def relabel(self, sample_id: int, target: Array | int) -> bool:
        """Give a sample another class or ``target``; returns whether it was still kept. Searches all rows: O(rows)."""
        place = self._find(sample_id)
        if place is None:
            return False
        if self._labelled:
            self._move(place, int(target))
        else:
            slots = self._slots[place : place + 1]
            row = {name: values[0] for name, values in self._rows.read(slots).items()}
            self._rows.write(int(slots[0]), {**row, "target": np.asarray(target)})
        return True

    def rows_by_name(self) -> dict[str, Array]:
        """The kept rows as :meth:`fill` takes them: ``replay.FIELD`` [n, ...], ``replay.target`` and ``replay.sample_id`` int64 [n]."""
        places = np.arange(len(self))
        slots = self._slots[: len(self)]
        rows = {f"replay.{name}": values for name, values in self._rows.read(slots).items()}
        labels = {"replay.target": np.searchsorted(self._starts, places, side="right") - 1} if self._labelled else {}
        return {**rows, **labels, "replay.sample_id": self._ids[slots]}

    def fill(self, rows: Mapping[str, Array]) -> None:
        """Set the rows of an empty memory, grouped by class (in their order within it), without offering them.

        A memory filled with another one's :meth:`rows_by_name`, at the same counter, draws the same rows.

        Args:
            rows: ``replay.FIELD`` [n, ...] and, where no field is one, ``replay.target`` int64 [n]; optional ``replay.sample_id``
                int64 [n], else -1.

        Raises:
            InputError: when names, shapes, dtypes or labels do not fit, or there are more rows than fit.
        """
        target = rows.get("replay.target")
        if not self._labelled and target is not None:
            target = np.zeros(len(target), np.int64)  # one segment
        if target is None or target.ndim != 1 or target.dtype != np.int64:
            raise InputError("replay.target: must be an int64 array [n]; write the rows again")
        n = len(target)
        if n > self.rows:
            raise InputError(f"replay.target: {self.rows} rows fit into {self.spec.capacity_bytes} bytes, got {n}; raise capacity_bytes")
        if n and not 0 <= target.min() <= target.max() < self.classes:
            raise InputError(f"replay.target: labels must be in [0, {self.classes}), got {target.min()} to {target.max()}; drop those rows")
        specs = [*self.spec.fields, TensorSpec("sample_id", (), "int64")]
        values = {"replay.sample_id": np.full(n, -1, np.int64), **rows}
        checked = {s.name: take(values, TensorSpec(f"replay.{s.name}", (n, *s.shape), s.dtype)) for s in specs}
        order = np.argsort(target, kind="stable")
        self._rows.fill({field.name: checked[field.name][order] for field in self.spec.fields})
        self._ids[:n] = checked["sample_id"][order]
        self._starts[1:-1] = np.cumsum(np.bincount(target, minlength=self.classes))

    def clear(self) -> None:
        """Drop all rows, as if none had been offered; the generator's counter stays."""
        self._ids[:] = -1
        self._slots[:] = np.arange(self.rows)
        self._starts[:-1] = 0
        self._seen = self._gone_inside = self._gone_outside = 0

    def snapshot(self) -> dict[str, Array]:
        """Copies of everything that :meth:`restore` needs, rows beyond the last kept one left out.

        With rows in a file, only of those that changed since the last snapshot was written into it.
        """
        used = int(self._slots[: len(self)].max(initial=-1)) + 1
        counters = [self._seen, self.generator.counter, self._gone_inside, self._gone_outside]
        return {
            **self._rows.snapshot(used),
            "memory.sample_id": self._ids[:used].copy(),
            "memory.slots": self._slots.copy(),
            "memory.starts": self._starts.copy(),
            "memory.counters": np.array(counters, np.int64),
        }

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Take over a snapshot of a memory of the same spec, bit for bit.

        Raises:
            InputError: when it does not fit; nothing is changed then.
        """
        ids = snapshot.get("memory.sample_id")
        used = 0 if ids is None else len(ids)
        ids = take(snapshot, TensorSpec("memory.sample_id", (min(used, self.rows),), "int64"))
        slots = take(snapshot, TensorSpec("memory.slots", (self.rows,), "int32"))
        starts = take(snapshot, TensorSpec("memory.starts", (self.classes + 2,), "int32"))
        counters = take(snapshot, TensorSpec("memory.counters", (4,), "int64"))
        for spec in self._rows.specs(snapshot, used):
            take(snapshot, spec)
        if not np.array_equal(np.sort(slots), np.arange(self.rows)):
            raise InputError(f"memory.slots: must hold every slot from 0 to {self.rows - 1} once; write the rows again")
        if starts[0] != 0 or starts[-1] != self.rows or (np.diff(starts) < 0).any() or slots[: starts[-2]].max(initial=-1) >= used:
            raise InputError(f"memory.starts: must rise from 0 to {self.rows}, and kept slots be below {used}; write the rows again")
        if (counters < 0).any():
            raise InputError(f"memory.counters: must be at least 0, got {counters.tolist()}; write the rows again")
        self._rows.restore(snapshot, used)
        self._ids[:used] = ids
        self._ids[used:] = -1
        self._slots[:] = slots
        self._starts[:] = starts
        self._seen, self.generator.counter, self._gone_inside, self._gone_outside = (int(c) for c in counters)

    def _place_reservoir(self) -> int | None:
        """The place in ``slots`` that the offered sample takes."""
        gone = self._gone_inside + self._gone_outside
        if gone:
            if self.generator.below(gone) < self._gone_inside:
                self._gone_inside -= 1
                return len(self)
            self._gone_outside -= 1
            return None
        if len(self) < self.rows:
            return len(self)
        place = self.generator.below(min(self._seen, WORD))
        return place if place < self.rows else None

    def _place_largest(self, label: int) -> int | None:
        if len(self) < self.rows:
            return len(self)
        counts = np.diff(self._starts[:-1])
        counts[label] += 1
        largest = int(counts.argmax())
        offset = self.generator.below(int(counts[largest]))
        place = int(self._starts[largest]) + offset
        return place if place < self._starts[largest + 1] else None

    def _move(self, place: int, to: int) -> int:
        """Move the slot at ``place`` into the segment of class ``to``; returns the slot.

        The hole that it leaves wanders to the segment's edge and past every class between. Where an empty class lies
        between, two copies go to the same place, and the last one written, the nearer to ``to``, is the right one.
        """
        slots, starts = self._slots, self._starts
        source = int(np.searchsorted(starts, place, side="right")) - 1
        slot = int(slots[place])
        if source < to:
            slots[place] = slots[starts[source + 1] - 1]
            slots[starts[source + 1 : to] - 1] = slots[starts[source + 2 : to + 1] - 1]
            slots[starts[to] - 1] = slot
            starts[source + 1 : to + 1] -= 1
        elif source > to:
            slots[place] = slots[starts[source]]
            slots[starts[to + 2 : source + 1][::-1]] = slots[starts[to + 1 : source][::-1]]
            slots[starts[to + 1]] = slot
            starts[to + 1 : source + 1] += 1
        return slot

    def _find(self, sample_id: int) -> int | None:
        if sample_id < 0:  # -1 marks rows without an id
            return None
        slots = np.flatnonzero(self._ids == sample_id)
        return int(np.flatnonzero(self._slots == slots[0])[0]) if len(slots) else None


def take(values: Mapping[str, Array], spec: TensorSpec) -> Array:
    """The array of a spec's name, checked.

    Raises:
        InputError: when it is missing or does not fit.
    """
    if spec.name not in values:
        raise InputError(f"{spec.name}: is missing, got {', '.join(sorted(values)) or 'nothing'}; write the rows again")
    return spec.check(values[spec.name])
