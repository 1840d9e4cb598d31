"""Keeps what a learner knows and its store in step: every change is in both or in neither."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgecl_device.adaptation import Adapted
from edgecl_device.core import Core
from edgecl_device.errors import RESTORE, EdgeclError, ForgetRefusedError, StoreError, UpdateRefusedError
from edgecl_device.event import Event
from edgecl_device.manifest import Array
from edgecl_device.pending import Pending
from edgecl_device.record import Record, Sample
from edgecl_device.snapshot import Snapshot
from edgecl_device.store import AUTOMATIC, Store

TASK_KINDS = ("add_task", "switch_task", "drop_task")


class Journal:
    """The changes of a learner, each written to the store before it becomes the present.

    Attributes:
        changed: Whether anything happened since the last automatic snapshot.
        interrupted: An interrupt came while the store was being written. Whether the change is in it, only a new start can
            tell: nothing more may be done with this learner.
    """

    def __init__(self, core: Core, pending: Pending, store: Store, record: Record) -> None:
        self._core = core
        self._record = record
        self._pending = pending
        self._store = store
        self.changed = False
        self.interrupted = False

    def start(self) -> None:
        """Go on where the store stopped, or write a new store's first snapshot. Until it is sure to go on, nothing is written.

        Raises:
            StoreError: when what is in it does not fit together.
        """
        if self._store.new:
            if self._store.persistent:
                self.save(AUTOMATIC)
            return
        try:
            self._recover(self._store.snapshots()[AUTOMATIC])
        except StoreError:
            raise
        except (EdgeclError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise StoreError(f"store: its content does not fit the bundle ({error}); {RESTORE}") from error
        self._core.place()
        self._store.fold()  # what a process that died has erased

    def learn(self, sample: Sample) -> dict[str, Array]:
        """Learn a sample, log it and keep what it found; returns the step's outputs.

        Raises:
            UpdateRefusedError: when its result must not be kept.
            StoreFullError: when it cannot be logged.
        """
        event = self._record.event(self._store.seq + 1, sample, self._core.stream)
        renewed = self._room(event)
        counter, commits = self._core.counter, self._store.commits
        try:
            outputs = self._core.propose(sample)
            with self.whole():
                self._append(event, renewed)
                self._core.keep(sample, outputs)
                self._pending.discard(sample.id)
        except BaseException:
            if self._store.commits == commits:
                self._core.counter = counter
            raise
        self.changed = True
        return outputs

    def adapt(self, sample: Sample) -> Adapted:
        """Adapt to a sample without a target, log it and keep what it found.

        Raises:
            UpdateRefusedError: when its result must not be kept.
            StoreFullError: when it cannot be logged.
        """
        assert self._core.adaptation is not None
        event = self._record.event(self._store.seq + 1, sample, self._core.stream)
        renewed = self._room(event)
        commits, adapted = self._store.commits, None
        try:
            with self.whole():  # an interrupt may come while the memory takes a row for the update, or gives it back
                adapted = self._core.adaptation.propose(sample)
                self._append(event, renewed)
                self._core.keep_adapted(sample, adapted)
                self._pending.discard(sample.id)
        except BaseException:
            if adapted is not None and self._store.commits == commits:
                adapted.take_back()
            raise
        self.changed = True
        return adapted

    def reset_adaptation(self) -> None:
        """Go back to the bundle's initial state."""
        event = Event(self._store.seq + 1, "reset_adaptation")
        renewed = self._room(event)
        with self.whole():
            self._append(event, renewed)
            self._core.reset_adaptation()
        self.changed = True

    def add_class(self, name: str, label: int) -> None:
        """Name a class."""
        event = Event(self._store.seq + 1, "add_class", label=label, name=name)
        renewed = self._room(event)
        with self.whole():
            self._append(event, renewed)
            self._name(label, name)
        self.changed = True

    def tasks(self) -> list[str]:
        """Names of all tasks, the one in use among them."""
        return sorted({self._core.task, *self._store.tasks.versions()})

    def task(self, name: str) -> bytes:
        """One of them, as :meth:`edgecl_device.core.Core.read_task` reads it."""
        if name == self._core.task:
            return self._core.pack_task()
        return self._store.tasks.blob(name, self._store.tasks.versions()[name])

    def add_task(self, name: str, like: str | None) -> None:
        """Add a task that starts as the bundle does, or as another one is now."""
        event = Event(self._store.seq + 1, "add_task", name=name, features=None if like is None else like.encode())
        blob = self._core.new_task() if like is None else self.task(like)
        self._log(event, lambda: self._store.tasks.put(name, event.seq, blob))

    def bring_task(self, name: str, blob: bytes) -> None:
        """Add a task that no event can make again: the automatic snapshot is renewed, so that none has to."""
        event = Event(self._store.seq + 1, "add_task", name=name)

        def write() -> None:
            self._store.tasks.put(name, event.seq, blob)
            self._checkpoint()

        self._log(event, write)
        self._core.settle()

    def switch_task(self, name: str) -> None:
        """Write the task in use to the store, if it is not there as it is, and go on with another one."""
        core, table = self._core, self._store.tasks
        event = Event(self._store.seq + 1, "switch_task", name=name)
        entered, left, before = core.read_task(self.task(name)), core.task, None if core.unchanged else core.pack_task()

        def write() -> None:
            if before is not None:
                table.put(left, event.seq, before)

        self._log(event, write, lambda: core.enter(name, entered))

    def drop_task(self, name: str) -> None:
        """Drop a task that is not in use."""
        event = Event(self._store.seq + 1, "drop_task", name=name)

        def drop() -> None:
            self._store.tasks.drop(name, event.seq)
            self._store.erasure_due = True

        self._log(event, drop)
        self._store.fold(force=True)

    def _log(self, event: Event, write: Callable[[], None], then: Callable[[], None] = lambda: None) -> None:
        """Append an event and do what else it writes in one transaction, then make it the present."""
        renewed = self._room(event)
        with self.whole():
            self._append(event, renewed, write)
            then()
        self.changed = True

    def _name(self, label: int, name: str | None) -> None:
        self._core.names[label] = name
        self._core.unchanged = False

    def reset_stream(self) -> None:
        """Let the stream begin anew."""
        event = Event(self._store.seq + 1, "reset_stream")
        renewed = self._room(event)
        with self.whole():
            self._append(event, renewed)
            self._core.stream = self._core.stream_start
        self.changed = True

    def revise(self, sample_id: int, step: str, target: Array | None) -> None:
        """Unlearn a sample (``target`` None) or give it another target, here and in every named snapshot.

        What waits with the features of an unlearned sample is discarded.

        Raises:
            ForgetRefusedError: when it is not in the log.
            UpdateRefusedError: when the step refuses, here or in a named snapshot.
        """
        core, store = self._core, self._store
        event = store.sample(sample_id)
        if event is None:
            raise ForgetRefusedError(f"{step}: {store.why_missing(sample_id)}")
        sample = self._record.sample(event)
        store.fold()
        with self.whole(), core.reverting() as before, self._pending.reverting(), store.transaction(sync=True):
            for name, seq in store.snapshots().items():
                if name != AUTOMATIC and seq >= event.seq:
                    core.restore(Snapshot.unpack(store.snapshot(name)))
                    core.revise(sample, step, target, f"sample {sample_id} in snapshot {name!r}")
                    store.put_snapshot(name, seq, core.capture().pack())
            core.restore(before)
            core.revise(sample, step, target, f"sample {sample_id}")
            if target is None:
                store.erase(event)
                self._discard_alike(self._record.features(event))
            else:
                store.replace(event, self._record.relabelled(event, target))
            self._checkpoint()
        core.settle()
        store.fold(force=True)  # the write-ahead log still holds what was erased

    def discard(self, sample_id: int) -> None:
        """Discard a prediction that waits, and every other of its features, here and in the automatic snapshot."""
        features = self._pending.pack(self._pending.get(sample_id))
        self._store.fold()
        with self.whole(), self._pending.reverting(), self._store.transaction(sync=True):
            self._discard_alike(features)
            self._store.erasure_due = True
            self._checkpoint()
        self._core.settle()
        self._store.fold(force=True)

    def save(self, name: str) -> None:
        """Write a snapshot, and leave it in the store's own file, which may be copied by itself then."""
        self._store.fold()
        with self._store.transaction(sync=True):
            self._store.put_snapshot(name, self._store.seq, self._pack(name))
        if name == AUTOMATIC:
            self._core.settle()
        self._store.fold(force=True)
        self.changed = self.changed and name != AUTOMATIC

    def rollback(self, name: str) -> None:
        """Go back to a snapshot, which must exist, and drop what came later."""
        with self.whole(), self._core.reverting(), self._store.transaction(sync=True):
            heard = self._core.stream
            self._core.restore(Snapshot.unpack(self._store.snapshot(name)))
            self._core.stream = heard  # what was heard does not change with what is known
            self._store.drop_after(self._store.snapshots()[name])
            self._checkpoint()
        self._core.settle()
        self._store.fold(force=True)

    def _discard_alike(self, features: bytes) -> None:
        for sample_id in self._pending.alike(features):
            self._pending.discard(sample_id)

    def _recover(self, seq: int) -> None:
        snapshot = Snapshot.unpack(self._store.snapshot(AUTOMATIC))
        self._core.restore(snapshot)
        self._pending.restore(snapshot.tensors)
        left: dict[str, bytes] = {}
        for number, event in enumerate(self._store.events_after(seq), start=seq + 1):
            if event.seq != number:  # a write-ahead log beside a file that is not its own can do that
                raise StoreError(f"store: is damaged (event {number} is missing); {RESTORE}")
            if event.kind == "add_class":
                self._name(int(event.label or 0), event.name)
                continue
            if event.kind in TASK_KINDS:
                self._repeat(event, seq, left)
                continue
            if event.kind == "reset_stream":
                self._core.stream = self._core.stream_start
                continue
            if event.kind == "reset_adaptation":
                self._core.reset_adaptation()
                continue
            sample = self._record.sample(event)
            try:
                if self._core.adaptation is not None and sample.target is None:
                    self._core.keep_adapted(sample, self._core.adaptation.propose(sample))
                else:
                    self._core.keep(sample, self._core.propose(sample))
            except UpdateRefusedError as error:
                raise StoreError(f"store: event {event.seq} cannot be replayed ({error}); use the runtime version that wrote it") from error
            self._core.stream = self._record.stream(event)
            self._pending.discard(sample.id)

    def _repeat(self, event: Event, seq: int, left: dict[str, bytes]) -> None:
        """Do again what an event behind the snapshot of number ``seq`` did to tasks.

        Args:
            event: The event.
            seq: Of the snapshot.
            left: Tasks that were written behind it; the store may have newer versions of them by now.
        """
        core, name = self._core, str(event.name)

        def found(task: str) -> bytes:
            if task == core.task:
                return core.pack_task()
            return left[task] if task in left else self._store.tasks.blob(task, self._store.tasks.versions(seq)[task])

        if event.kind == "add_task":
            left[name] = core.new_task() if event.features is None else found(event.features.decode())
        elif event.kind == "switch_task":
            entered = core.read_task(found(name))
            left[core.task] = core.pack_task()
            core.enter(name, entered)
            core.unchanged = False  # the store may have an older version of it
        else:
            left.pop(name, None)

    def _room(self, event: Event) -> bytes | None:
        """A new automatic snapshot, packed, when the log has no room for the event without one."""
        return None if self._store.has_room(event.nbytes) else self._pack(AUTOMATIC)

    def _append(self, event: Event, renewed: bytes | None, write: Callable[[], None] = lambda: None) -> None:
        with self._store.transaction(sync=renewed is not None):
            if renewed is not None:
                self._store.put_snapshot(AUTOMATIC, self._store.seq, renewed)
            self._store.append(event)
            write()
        if renewed is not None:
            self._core.settle()

    def _checkpoint(self) -> None:
        """Renew the automatic snapshot inside a transaction; in memory only when there is one, as nothing is recovered from it."""
        if self._store.persistent or AUTOMATIC in self._store.snapshots():
            self._store.put_snapshot(AUTOMATIC, self._store.seq, self._pack(AUTOMATIC))

    def _pack(self, name: str) -> bytes:
        snapshot = self._core.capture()
        if name == AUTOMATIC:
            snapshot.tensors.update(self._pending.snapshot())
        return snapshot.pack()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Notice an interrupt: any other error leaves store and core as they were.

        An error behind the commit can only be one, too: a signal handler may raise whatever it likes.
        """
        commits = self._store.commits
        try:
            yield
        except BaseException as error:
            self.interrupted |= self._store.commits != commits or not isinstance(error, Exception)
            raise
