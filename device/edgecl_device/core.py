"""What a learner knows at this moment: the engine's state, the replay memory, the classes; no store, no samples waiting."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_device.adapt_checks import ADAPT
from edgecl_device.adaptation import Adaptation, Adapted, health_of
from edgecl_device.checks import GATE, REFRESH, check_state, short
from edgecl_device.engines import Engine
from edgecl_device.errors import RESTORE, BundleError, EdgeclError, InputError, StoreError, UpdateRefusedError
from edgecl_device.manifest import AGE, Array, Manifest, ReplaySpec
from edgecl_device.memory import ReplayMemory, memory_layout, row_of
from edgecl_device.record import Sample
from edgecl_device.rows import RowFile
from edgecl_device.snapshot import Snapshot
from edgecl_device.targets import target_of
from edgecl_device.whole import WholeMemory, memory_of


class Core:
    """Applies samples to engine, memory and counts, each either whole or not at all.

    Attributes:
        names: Class names by index, None where a class has none.
        counts: Samples learned by class or label, less the forgotten: int64 [K]; a map counts for every class that it shows.
        totals: ``learned``, ``forgotten`` and ``relabelled`` over the learner's life; with a step ``adapt`` also samples ``adapted``,
            ``updates`` and ``resets``.
        health: The method's figures after the last update.
        refused: Updates refused in this session.
        refreshes: Runs of the step ``refresh`` in this session.
        memory: The replay memory, if the method has one.
        task: The task in use, for methods whose state is one task's; else empty.
        unchanged: Whether that task is as the store has it.
        stream_start: What :attr:`stream` was before the first frame.
        adaptation: What is done with samples without a target; None without a step ``adapt``.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        state: Mapping[str, Array],
        rows: Mapping[str, Array] | None,
        row_file: Path | None = None,
        new: bool = True,
        token: bytes | None = None,
    ) -> None:
        check_state(manifest, state)
        self._manifest = manifest
        self._engine = engine
        self.memory = None
        try:
            if manifest.replay is not None:
                self.memory = _memory(manifest.replay, manifest.max_classes, row_file, token)
                if new or row_file is None:  # else the file has rows, and the store its own of everything beside them
                    self.memory.fill(rows or _empty_rows(manifest))
                if not len(self.memory) <= manifest.replay.seen < 1 << 62 or manifest.replay.counter >= 1 << 62:
                    raise InputError(
                        f"seen: must be at least the {len(self.memory)} rows kept, and with counter below 2**62, "
                        f"got {manifest.replay.seen} and {manifest.replay.counter}; export the bundle again"
                    )
            elif rows is not None:
                raise InputError("rows: the manifest has no replay memory; leave them out")
        except StoreError:
            raise
        except (ValueError, OverflowError, MemoryError) as error:  # InputErrors, and what numpy raises for absurd sizes
            raise BundleError(f"replay: {error}") from error
        unnamed = manifest.max_classes - len(manifest.class_names)
        self.names: list[str | None] = [*manifest.class_names, *[None] * unnamed]
        self.counts = np.zeros(manifest.max_classes, np.int64)
        self._stream = [spec.name for spec in manifest.stream]
        self.stream_start = {name: state[name].copy() for name in self._stream}
        self._target = target_of(manifest.target, manifest.max_classes)
        self.totals = {"learned": 0, "forgotten": 0, "relabelled": 0}
        self.health: dict[str, float] = {}
        self.refused = 0
        self.refreshes = 0
        self.adaptation: Adaptation | None = None
        if manifest.adapt is not None:
            self.totals |= {"adapted": 0, "updates": 0, "resets": 0}
            memory = self.memory if isinstance(self.memory, WholeMemory) else None
            self.adaptation = Adaptation(manifest, engine, memory, state, self._run)
        self.task = manifest.tasks.first if manifest.tasks is not None else ""
        self.unchanged = False
        self._first = state if manifest.tasks is not None else {}
        engine.load(state)

    @property
    def counter(self) -> int:
        """Words drawn from the replay memory's generator; set it back to undo :meth:`propose`."""
        return self.memory.generator.counter if self.memory is not None else 0

    @counter.setter
    def counter(self, value: int) -> None:
        if self.memory is not None:
            self.memory.generator.counter = value

    @property
    def stream(self) -> dict[str, Array]:
        """Copies of the state that ``encode`` carries from frame to frame; empty but for streams."""
        return self._engine.state(self._stream) if self._stream else {}

    @stream.setter
    def stream(self, state: Mapping[str, Array]) -> None:
        self._engine.put(state)

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """A stream stands where it stood when anything inside fails."""
        heard = self.stream
        try:
            yield
        except BaseException:
            self.stream = heard
            raise

    def settle(self) -> None:
        """Call it when an automatic snapshot of the present is in the store for good: rows in a file go there."""
        if self.memory is not None and self.memory.file is not None:
            self.memory.file.settle()

    def place(self) -> None:
        """Call it when it is sure that the store goes on: a file of rows that is not in its place yet goes there."""
        if self.memory is not None and self.memory.file is not None:
            self.memory.file.place()

    @property
    def settled(self) -> bool:
        """Whether no rows wait to be written into their file."""
        return self.memory is None or self.memory.file is None or not self.memory.file.waiting

    @property
    def written(self) -> int:
        """Bytes written into the file of rows."""
        return 0 if self.memory is None or self.memory.file is None else self.memory.file.written

    def close(self) -> None:
        """Release the engine and the row file."""
        with ExitStack() as stack:
            stack.callback(self._engine.close)
            if self.memory is not None and self.memory.file is not None:
                stack.callback(self.memory.file.close)

    def abandon(self) -> None:
        """Remove the row file of a store that came to no first snapshot."""
        if self.memory is not None and self.memory.file is not None:
            self.memory.file.remove()

    def gate(self, sample: Sample) -> dict[str, Array] | None:
        """Outputs of the step ``gate`` for a sample, whose ``worth`` says whether to learn it; None for a method that learns all.

        Raises:
            UpdateRefusedError: when scores or loss are not finite, so that it tells nothing.
        """
        return self._run(GATE, sample.inputs(), f"sample {sample.id}") if GATE in self._manifest.steps else None

    def propose(self, sample: Sample) -> dict[str, Array]:
        """Run ``learn`` on a sample and return its outputs. Nothing but :attr:`counter` changes until :meth:`keep`.

        A ``refresh`` that is due still, as it failed behind the last update, runs first; what it takes in stays.

        Raises:
            UpdateRefusedError: when its result must not be kept.
        """
        late = self._catch_up(f"sample {sample.id}")
        rows = self.memory.draw() if self.memory is not None else {}
        return self._run("learn", {**sample.inputs(), **rows}, f"sample {sample.id}", late)

    def keep(self, sample: Sample, outputs: Mapping[str, Array]) -> None:
        """Make what :meth:`propose` found the present."""
        self._engine.commit()
        self._refresh()
        assert sample.target is not None
        if self.memory is not None:
            self.memory.offer(row_of(outputs), sample.target[0], sample.id)
        self.counts[self._target.classes_of(sample.target)] += 1
        self.unchanged = False
        self.totals["learned"] += 1
        self.health = health_of(outputs)

    def keep_adapted(self, sample: Sample, adapted: Adapted) -> None:
        """Make what :meth:`Adaptation.propose` found the present."""
        assert self.adaptation is not None
        self.adaptation.keep(sample, adapted)
        self.totals["adapted"] += 1
        self.totals["updates"] += adapted.loss is not None
        self.totals["resets"] += adapted.reset
        self.health = {**self.health, **adapted.health}

    def reset_adaptation(self) -> None:
        """Go back to the bundle's initial state, with an empty memory."""
        assert self.adaptation is not None
        self.adaptation.reset()
        self.totals["resets"] += 1
        self.health = {}

    def revise(self, sample: Sample, step: str, target: Array | None, what: str) -> None:
        """Unlearn a sample (``target`` None) or give it another target. Not undone on failure: see :meth:`reverting`."""
        values = sample.inputs() if target is None else {**sample.inputs(), "new_target": target}
        outputs = self._run(step, values, what, self._catch_up(what))
        self._engine.commit()
        if target is None and REFRESH in self._manifest.steps:  # changes that wait hold the sample's features
            self._run(REFRESH, self._aside(), what)
            self._keep_refreshed()
        self._refresh()
        self.health = health_of(outputs)
        assert sample.target is not None
        self.counts[self._target.classes_of(sample.target)] -= 1
        if target is None:
            self.totals["forgotten"] += 1
            if self.memory is not None:
                self.memory.remove(sample.id)
        else:
            self.totals["relabelled"] += 1
            self.counts[self._target.classes_of(target)] += 1
            if self.memory is not None:
                self.memory.relabel(sample.id, target[0])

    def capture(self) -> Snapshot:
        """Copies of everything that :meth:`restore` needs."""
        tensors = {f"state.{name}": array for name, array in self._engine.state().items()}
        if self.memory is not None:
            tensors |= self.memory.snapshot()
        meta: dict[str, Any] = {"class_names": list(self.names), "class_counts": self.counts.tolist(), "totals": dict(self.totals)}
        task = {"task": self.task} if self.task else {}
        adaptation = {} if self.adaptation is None else {"adaptation": self.adaptation.progress()}
        return Snapshot(tensors, {**meta, "health": dict(self.health), **task, **adaptation})

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, bit for bit.

        Raises:
            StoreError: when it does not fit the manifest.
        """
        state = snapshot.under("state.")
        try:
            check_state(self._manifest, state)
            names, counts, totals = (snapshot.meta[key] for key in ("class_names", "class_counts", "totals"))
            health = snapshot.meta.get("health", {})  # snapshots of earlier versions have none
            self._check_classes(names, counts)
            if not isinstance(totals, dict) or totals.keys() != self.totals.keys() or not isinstance(health, dict):
                raise InputError(f"totals and health: must be objects, the first with {', '.join(self.totals)}, got {totals} and {health}")
            if self.adaptation is not None:
                self.adaptation.restore(snapshot.meta["adaptation"])
            task = snapshot.meta["task"] if self.task else ""
            if not isinstance(task, str):
                raise InputError(f"task: must be a name, got {short(task)}; write the snapshot again")
            if self.memory is not None:
                self.memory.restore(snapshot.tensors)
        except (EdgeclError, KeyError) as error:
            raise StoreError(f"snapshot: does not fit the bundle ({error}); {RESTORE}") from error
        self._engine.load(state)
        self.task, self.unchanged = task, False
        self.names, self.counts, self.totals, self.health = list(names), np.array(counts, np.int64), dict(totals), dict(health)

    def new_task(self) -> bytes:
        """A task in which nothing was learned, as :meth:`pack_task` has one."""
        assert self._manifest.tasks is not None
        fresh = self._manifest.tasks.fresh
        state = {name: np.zeros_like(array) if name in fresh else array for name, array in self._first.items() if name not in self._stream}
        return _task(state, [None] * len(self.names), [0] * len(self.counts), {}).pack()

    def pack_task(self) -> bytes:
        """The task in use: its state, classes and health figures."""
        return _task(self._engine.state(self._own), self.names, self.counts.tolist(), self.health).pack()

    def read_task(self, blob: bytes, foreign: bool = False) -> Snapshot:
        """What :meth:`pack_task` wrote.

        Args:
            blob: Its bytes; of the store's own ones CRC-32 and bundle are right.
            foreign: Whether it is from elsewhere, so that its tensors are to be checked as well.

        Raises:
            StoreError: when it does not fit the manifest.
        """
        task = Snapshot.unpack(blob)
        try:
            if foreign:
                check_state(self._manifest, {**self.stream, **task.under("state.")})
                if self._stream and set(self._stream) & task.under("state.").keys():
                    raise InputError(f"state: must leave {short(self._stream)} to the stream, got them in a task; write the task again")
            names, health = task.meta["class_names"], task.meta.get("health", {})
            self._check_classes(names, task.meta["class_counts"])
            known = [name for name in names if name is not None]
            if len(set(known)) < len(known) or "" in known:
                raise InputError(f"class_names: must differ, and none be empty, got {short(known)}; write the task again")
            if not isinstance(health, dict) or not all(isinstance(value, int | float) for value in health.values()):
                raise InputError(f"health: must be numbers by name, got {short(health)}; write the task again")
        except (EdgeclError, KeyError) as error:
            raise StoreError(f"task: does not fit the bundle ({error}); {RESTORE}") from error
        return task

    def enter(self, name: str, task: Snapshot) -> None:
        """Make a task the one in use, as the store has it. The replay memory is of one task, and starts empty."""
        self._show(task)
        self.task, self.unchanged = name, True
        if self.memory is not None:
            self.memory.clear()

    @contextmanager
    def visiting(self, task: Snapshot | None) -> Iterator[None]:
        """Inside, state and classes are those of another task; None is the one in use."""
        if task is None:
            yield
            return
        own = _task(self._engine.state(self._own), self.names, self.counts.tolist(), self.health)
        try:
            self._show(task)
            yield
        finally:
            self._show(own)

    @contextmanager
    def holding(self, state: Mapping[str, Array]) -> Iterator[None]:
        """Inside, some state tensors are others."""
        own = self._engine.state(state)
        try:
            self._engine.put(state)
            yield
        finally:
            self._engine.put(own)

    @property
    def _own(self) -> list[str]:
        return [spec.name for spec in self._manifest.state if spec.name not in self._stream]

    def _show(self, task: Snapshot) -> None:
        self._engine.put(task.under("state."))
        self.names, self.counts = list(task.meta["class_names"]), np.array(task.meta["class_counts"], np.int64)
        self.health = dict(task.meta.get("health", {}))

    def _check_classes(self, names: Any, counts: Any) -> None:
        most = self._manifest.max_classes
        if not isinstance(names, list) or len(names) != most or not all(isinstance(name, str | None) for name in names):
            raise InputError(f"class_names: must be {most} names or nulls, got {short(names)}; write the snapshot again")
        if not isinstance(counts, list) or len(counts) != most or not all(type(n) is int and 0 <= n < 1 << 62 for n in counts):
            raise InputError(f"class_counts: must be {most} integers of at least 0, got {short(counts)}; write the snapshot again")

    @contextmanager
    def reverting(self) -> Iterator[Snapshot]:
        """Go back to the present state, which it yields, when anything inside fails."""
        before = self.capture()
        try:
            yield before
        except BaseException:
            self.restore(before)
            raise

    @property
    def _due(self) -> bool:
        every = self._manifest.refresh_every
        return every > 0 and float(self._engine.state([AGE])[AGE]) >= every

    def _refresh(self) -> None:
        """Run ``refresh`` behind an update if it is due. Where it fails it stays due: the next update runs it first, and says why.

        The update itself is in the log by now, so that an error here must not look like one of the update.
        """
        if not self._due:
            return
        with suppress(Exception):
            if self._engine.run(REFRESH, self._aside())["finite"]:
                self._keep_refreshed()

    def _aside(self) -> dict[str, Array]:
        """Rows and integers for ``refresh``, if it takes any: what updates draw does not depend on whether it runs, or fails."""
        if self.memory is None or not self._manifest.steps[REFRESH].inputs:
            return {}
        return self.memory.draw_aside(REFRESH)

    def _keep_refreshed(self) -> None:
        self._engine.commit()
        self.refreshes += 1

    def _catch_up(self, what: str) -> bool:
        """Run a ``refresh`` that is still due before anything else is; returns whether it was."""
        late = self._due
        if late:
            self._run(REFRESH, self._aside(), what)
            self._keep_refreshed()
        return late

    def _run(self, step: str, values: Mapping[str, Array], what: str, late: bool = False) -> dict[str, Array]:
        """Run a step that writes state and refuse a result that must not be kept; ``late`` says that a ``refresh`` has run before it."""
        outputs = self._engine.run(step, values)
        loss = float(outputs.get("loss", np.float32(0)))
        cause = None
        if not outputs.get("finite", np.True_) or not np.isfinite(loss):
            cause = f"the new state or the loss ({loss:.4g}) is not finite; lower the learning rate or check the sample's scale"
            if step == ADAPT and self.memory is not None:
                cause += ", or call reset_adaptation() where a row of the memory is what is wrong"
        elif not np.isfinite(outputs.get("scores", np.float32(0))).all():
            cause = "the scores before the update are not finite: the state has grown too large; roll back, and lower the learning rate"
        elif not outputs.get("guard", np.True_):
            figures = ", ".join(f"health.{name} = {value:.4g}" for name, value in health_of(outputs).items()) or "no health figures"
            cause = f"the method's guard failed ({figures}); keeping it would spoil the state, leave this sample as it is"
        if cause is not None:
            self.refused += 1
            but = "but for changes that waited and were taken in" if late else ""
            raise UpdateRefusedError(f"{step}: refused for {what}: {cause}; the state is unchanged{but and f', {but}'}")
        return outputs


def _task(state: Mapping[str, Array], names: list[str | None], counts: list[int], health: Mapping[str, float]) -> Snapshot:
    tensors = {f"state.{name}": array for name, array in state.items()}
    return Snapshot(tensors, {"class_names": list(names), "class_counts": counts, "health": dict(health)})


def _memory(spec: ReplaySpec, classes: int, row_file: Path | None, token: bytes | None) -> ReplayMemory:
    file = None if row_file is None else RowFile(row_file, spec.fields, memory_layout(spec, classes)[0], token)
    return memory_of(spec, classes, file)


def _empty_rows(manifest: Manifest) -> dict[str, Array]:
    fields = manifest.replay.fields if manifest.replay else ()
    rows = {f"replay.{field.name}": np.empty((0, *field.shape), field.dtype) for field in fields}
    return {"replay.target": np.empty(0, np.int64), **rows}
