"""Keeps what a learner knows and its store in step: every change is in both or in neither."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from edgecl_device.core import Core
from edgecl_device.errors import EdgeclError, ForgetRefusedError, StoreError, UpdateRefusedError
from edgecl_device.event import Event
from edgecl_device.manifest import Array
from edgecl_device.pending import Pending
from edgecl_device.snapshot import Snapshot
from edgecl_device.store import AUTOMATIC, Store


class Journal:
    """The changes of a learner, each written to the store before it becomes the present.

    Attributes:
        changed: Whether anything happened since the last automatic snapshot.
        interrupted: An interrupt came while the store was being written. Whether the change is in it, only a new start can
            tell: nothing more may be done with this learner.
    """

    def __init__(self, core: Core, pending: Pending, store: Store) -> None:
        self._core = core
        self._pending = pending
        self._store = store
        self.changed = False
        self.interrupted = False

    def start(self) -> None:
        """Go on where the store stopped, or write a new store's first snapshot.

        Raises:
            StoreError: when what is in it does not fit together.
        """
        known = self._store.snapshots()
        if AUTOMATIC not in known and (known or self._store.seq or self._store.handed_out(0)):
            raise StoreError("store: is damaged (the automatic snapshot is missing); restore it from a copy, or delete it to start afresh")
        if AUTOMATIC not in known:
            if self._store.persistent:
                self.save(AUTOMATIC)
            return
        try:
            self._recover(known[AUTOMATIC])
        except StoreError:
            raise
        except (EdgeclError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise StoreError(f"store: its content does not fit the bundle ({error}); restore it from a copy, or delete it") from error

    def learn(self, event: Event, z: Mapping[str, Array]) -> dict[str, Array]:
        """Run a ``learn`` event, log it and keep what it found; returns the step's outputs.

        Raises:
            UpdateRefusedError: when its result must not be kept.
            StoreFullError: when it cannot be logged.
        """
        renewed = self._room(event)
        counter, writing, written = self._core.counter, False, False
        try:
            outputs = self._core.propose(event, z)
            writing = True
            self._append(event, renewed)
            written = True
            self._core.keep(event, outputs)
            self._pending.discard(int(event.sample_id or 0))
        except BaseException as error:
            if written or (writing and not isinstance(error, Exception)):
                self.interrupted = True
            self._core.counter = counter
            raise
        self.changed = True
        return outputs

    def add_class(self, name: str, label: int) -> None:
        """Name a class."""
        event = Event(self._store.seq + 1, "add_class", label=label, name=name)
        renewed = self._room(event)
        with self._whole():
            self._append(event, renewed)
            self._core.names[label] = name
        self.changed = True

    def revise(self, sample_id: int, step: str, label: int | None) -> None:
        """Unlearn a sample (``label`` None) or give it another label, here and in every named snapshot.

        Raises:
            ForgetRefusedError: when it is not in the log.
            UpdateRefusedError: when the step refuses, here or in a named snapshot.
        """
        core, store = self._core, self._store
        event = store.sample(sample_id)
        if event is None:
            raise ForgetRefusedError(f"{step}: {store.why_missing(sample_id)}")
        z = self._pending.unpack(event.features or b"")
        store.fold()
        with self._whole(), core.reverting() as before, store.transaction(sync=True):
            for name, seq in store.snapshots().items():
                if name != AUTOMATIC and seq >= event.seq:
                    core.restore(Snapshot.unpack(store.snapshot(name)))
                    core.revise(event, z, step, label, f"sample {sample_id} in snapshot {name!r}")
                    store.put_snapshot(name, seq, core.capture().pack())
            core.restore(before)
            core.revise(event, z, step, label, f"sample {sample_id}")
            if label is None:
                store.erase(event)
            else:
                store.set_label(event, label)
            self._checkpoint()
        store.fold(force=True)  # the write-ahead log still holds what was erased

    def save(self, name: str) -> None:
        """Write a snapshot, and leave it in the store's own file, which may be copied by itself then."""
        self._store.fold()
        with self._store.transaction(sync=True):
            self._store.put_snapshot(name, self._store.seq, self._pack(name))
        self._store.fold(force=True)
        self.changed = self.changed and name != AUTOMATIC

    def rollback(self, name: str) -> None:
        """Go back to a snapshot, which must exist, and drop what came later."""
        with self._whole(), self._core.reverting(), self._store.transaction(sync=True):
            self._core.restore(Snapshot.unpack(self._store.snapshot(name)))
            self._store.drop_after(self._store.snapshots()[name])
            self._checkpoint()

    def _recover(self, seq: int) -> None:
        snapshot = Snapshot.unpack(self._store.snapshot(AUTOMATIC))
        self._core.restore(snapshot)
        self._pending.restore(snapshot.tensors)
        for event in self._store.events_after(seq):
            if event.kind == "add_class":
                self._core.names[int(event.label or 0)] = event.name
                continue
            try:
                self._core.keep(event, self._core.propose(event, self._pending.unpack(event.features or b"")))
            except UpdateRefusedError as error:
                raise StoreError(f"store: event {event.seq} cannot be replayed ({error}); use the runtime version that wrote it") from error
            self._pending.discard(int(event.sample_id or 0))

    def _room(self, event: Event) -> bytes | None:
        """A new automatic snapshot, packed, when the log has no room for the event without one."""
        return None if self._store.has_room(event.nbytes) else self._pack(AUTOMATIC)

    def _append(self, event: Event, renewed: bytes | None) -> None:
        with self._store.transaction(sync=renewed is not None):
            if renewed is not None:
                self._store.put_snapshot(AUTOMATIC, self._store.seq, renewed)
            self._store.append(event)

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
    def _whole(self) -> Iterator[None]:
        """Notice an interrupt: any other error leaves store and core as they were."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.interrupted = True
            raise
