"""The crash-safe store: a log of learned samples and snapshots, in one SQLite file.

Every operation is one transaction: after a crash the store is as it was after some operation, never between two. Recovery
loads the automatic snapshot and replays the events after it. With ``durability="normal"`` (write-ahead log,
synchronous=NORMAL) a killed process loses nothing, and a power cut may lose the last samples since the last ``save``,
``forget``, ``relabel`` or ``rollback``, which are synced to the disk; ``"full"`` syncs every sample.

Deleted content is overwritten with zeros in the file (secure_delete), but not before the write-ahead log is moved into it
and emptied (:meth:`Store.fold`): at once after ``forget`` and ``rollback``, or at the next start when the process died in
between; for what the log's cap drops, whenever that comes next. Blocks that a file system has freed and what a flash
controller keeps in worn ones are beyond it. One process at a time may have a store open.
"""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from edgecl_device import database
from edgecl_device.checks import as_path, short
from edgecl_device.errors import RESTORE, InputError, StoreError, StoreFullError
from edgecl_device.event import EVENT_OVERHEAD, Event, crc
from edgecl_device.task_table import TaskTable

AUTOMATIC = ""
_ID_BLOCK = 1024
_WAL_LIMIT_BYTES = 4 << 20
_DURABILITY = {"normal": "NORMAL", "full": "FULL"}
_EVENT = "seq, kind, sample_id, label, weight, lr, name, features, crc"
_SIZE = f"{EVENT_OVERHEAD} + coalesce(length(features), 0) + coalesce(length(cast(name AS BLOB)), 0)"
_LAST_SNAPSHOT = f"(SELECT coalesce(max(seq), -1) FROM snapshots WHERE name = '{AUTOMATIC}')"


class Store:
    """A log and snapshots in one file, or in memory.

    Args:
        path: The file, made when there is none; None keeps everything in memory (an SQLite database there, whose log
            takes up to its cap), and nothing is recovered from it.
        bundle_id: The bundle to which the store belongs.
        log_capacity_bytes: Cap of the log.
        durability: ``normal`` or ``full``.

    Attributes:
        erasure_due: Something was removed that the write-ahead log may still hold; set it inside the transaction, and call
            :meth:`fold` after it.
        tasks: Blobs of the tasks that are not in use. Only the journal may use it.
        commits: Transactions done. After an exception that a signal handler raised, it tells whether the last one was.
        written: Bytes written so far: what each transaction appended to the write-ahead log, and what :meth:`fold` moved into
            the database.

    Raises:
        InputError: when ``path`` is no path, or ``durability`` none of the two.
        StoreMismatchError: when the file belongs to another bundle.
        StoreError: when it cannot be opened, is empty or damaged, is not a store, or is in use.
    """

    def __init__(self, path: str | Path | None, bundle_id: str, log_capacity_bytes: int, durability: str = "normal") -> None:
        if durability not in tuple(_DURABILITY):
            raise InputError(f"durability: must be 'normal' or 'full', got {short(durability)}; pass one of them")
        # Resolved, as the files beside it are found by its name, whatever link or working folder it was given by.
        self.path = None if path is None else as_path("store", path).resolve()
        self.persistent = path is not None
        self.log_capacity_bytes = log_capacity_bytes
        self.commits = 0
        self._seq = self._log_bytes = self._replayed_bytes = 0
        self._synchronous = _DURABILITY[durability]
        self._where = str(self.path or "store in memory")
        new = self.path is not None and not self.path.exists()
        self._db = database.connect(self.path, bundle_id, self._synchronous)
        self.tasks = TaskTable(self._db, self.path)
        self.written = self.path.stat().st_size if new and self.path is not None else 0
        self.erasure_due = self.wal_bytes() > 0  # a process that died may have erased something and not emptied it
        try:
            with self._typed_errors():
                self._read()
        except BaseException:
            self.leave()
            raise

    @property
    def seq(self) -> int:
        """Number of the last event."""
        return self._seq

    @property
    def log_bytes(self) -> int:
        """What the log holds, as its cap counts it."""
        return self._log_bytes

    @property
    def erased(self) -> bool:
        """False while the write-ahead log may still hold what was forgotten or rolled back, as it could not be emptied.

        :meth:`fold` tries again. What the log's cap dropped does not count.
        """
        return not self.erasure_due

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open: outside of one, the sign that an interrupt has kept it from its end."""
        return self._db.in_transaction

    def report(self) -> dict[str, int | bool]:
        """Figures of the log, whether it is in memory, and :attr:`erased`."""
        return {
            "last_event": self._seq,
            "bytes": self._log_bytes,
            "capacity_bytes": self.log_capacity_bytes,
            "in_memory": not self.persistent,
            "erased": self.erased,
        }

    @property
    def evicted_before(self) -> int:
        """No sample id at or above this was dropped by the log's cap."""
        return self._number("evicted_before")

    @property
    def token(self) -> bytes:
        """16 random bytes that no other store has but a copy of this one: its file of replay rows carries them.

        Raises:
            StoreError: when they are damaged.
        """
        with self._typed_errors():
            token = database.meta(self._db, "token", self._where)
        if not isinstance(token, bytes) or len(token) != database.TOKEN_BYTES:
            raise StoreError(f"{self._where}: is damaged (token is {short(token)}); {RESTORE}")
        return token

    @property
    def new(self) -> bool:
        """Whether it has no automatic snapshot yet, from which a learner goes on.

        Raises:
            StoreError: when it has other content, so that the snapshot was lost.
        """
        known = self.snapshots()
        if AUTOMATIC not in known and (known or self._seq or self.handed_out(0)):
            raise StoreError(f"{self._where}: is damaged (the automatic snapshot is missing); {RESTORE}")
        return AUTOMATIC not in known

    def new_id(self) -> int:
        """A sample id that no sample of this store ever had, not even one lost in a crash: ids are reserved in blocks.

        Raises:
            StoreFullError: when the next block cannot be reserved.
        """
        if self._next_id == self._reserved:
            with self.transaction(sync=True):  # an id must not come again after a power cut either
                database.set_meta(self._db, "reserved_ids", self._reserved + _ID_BLOCK)
            self._reserved += _ID_BLOCK
        self._next_id += 1
        return self._next_id - 1

    def handed_out(self, sample_id: int) -> bool:
        """Whether :meth:`new_id` may have returned this id."""
        return 0 <= sample_id < self._next_id

    @contextmanager
    def transaction(self, sync: bool = False) -> Iterator[None]:
        """All writes inside become permanent together, or none does.

        Args:
            sync: Wait until the disk has it, whatever the durability.

        Raises:
            StoreFullError: when the disk is full.
            StoreError: when SQLite cannot write.
        """
        before = self._seq, self._log_bytes, self._replayed_bytes, self.erasure_due
        commits, wal, ending = self.commits, self.wal_bytes(), False
        with self._typed_errors():
            try:
                if sync:
                    self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("BEGIN IMMEDIATE")
                yield
                ending = True
                self._db.execute("COMMIT")
                self.commits = commits + 1
            except BaseException as error:
                if ending and not self._db.in_transaction and not isinstance(error, sqlite3.Error):
                    self.commits = commits + 1  # a signal handler has raised this behind the commit
                else:
                    self._seq, self._log_bytes, self._replayed_bytes, self.erasure_due = before
                if self._db.in_transaction:  # SQLite rolls some errors back by itself
                    self._db.execute("ROLLBACK")
                raise
            finally:
                if sync:
                    self._db.execute(f"PRAGMA synchronous = {self._synchronous}")
                self.written += max(0, self.wal_bytes() - wal)

    def has_room(self, nbytes: int) -> bool:
        """Whether an event of so many bytes fits once old ones are dropped; if not, an automatic snapshot has to be taken first.

        Raises:
            StoreError: when it is larger than the whole log.
        """
        if nbytes > self.log_capacity_bytes:
            raise StoreError(
                f"log_capacity_bytes: must be at least {nbytes} for one sample, got {self.log_capacity_bytes}; export with a larger one"
            )
        return not self.persistent or self._replayed_bytes + nbytes <= self.log_capacity_bytes

    def append(self, event: Event) -> None:
        """Append an event, dropping old ones when the cap asks for it. Call inside a transaction, after :meth:`has_room`."""
        if self._log_bytes + event.nbytes > self.log_capacity_bytes:
            self._drop_oldest(event.nbytes)
        values = (*vars(event).values(), event.crc)
        self._db.execute(f"INSERT INTO events ({_EVENT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        self._seq = event.seq
        self._log_bytes += event.nbytes
        self._replayed_bytes += event.nbytes

    def sample(self, sample_id: int) -> Event | None:
        """The event by which a sample was learned, with its present label, or None when it is not in the log."""
        if not self.handed_out(sample_id):
            return None
        with self._typed_errors():
            row = self._db.execute(f"SELECT {_EVENT} FROM events WHERE sample_id = ? AND kind = 'learn'", (sample_id,)).fetchone()
        return self._event(row) if row else None

    def why_missing(self, sample_id: int) -> str:
        """Why :meth:`sample` finds nothing.

        Raises:
            StoreError: when the log is damaged, so that it may hold the sample under another id.
        """
        if not self.handed_out(sample_id):
            return f"sample {sample_id} was never handed out; pass the sample_id of a learned sample"
        if sample_id < self.evicted_before:
            return (
                f"sample {sample_id} is not in the log any more: its cap of {self.log_capacity_bytes} bytes dropped it (if it was "
                "learned at all), so that it stays learned; its features leave the files with the next save(). "
                "Export with a larger log_capacity_bytes to forget further back"
            )
        for event in self.events_after(0):  # checks every one
            if event.sample_id == sample_id and event.kind == "adapt":
                return f"sample {sample_id} was adapted to without a target, which cannot be taken out; its features go with the log's cap"
        return (
            f"sample {sample_id} was not learned, or is forgotten already, or was rolled back: there is nothing to change; "
            "what a file may still hold of it goes with the next save()"
        )

    def events_after(self, seq: int) -> Iterator[Event]:
        """The events after number ``seq``, in order."""
        with self._typed_errors():
            for row in self._db.execute(f"SELECT {_EVENT} FROM events WHERE seq > ? ORDER BY seq", (seq,)):
                yield self._event(row)

    def erase(self, event: Event) -> None:
        """Take one event out of the log. Call inside a transaction, and :meth:`fold` after it."""
        self._db.execute("DELETE FROM events WHERE seq = ?", (event.seq,))
        self._log_bytes -= event.nbytes
        self.erasure_due = True

    def replace(self, event: Event, changed: Event) -> None:
        """Replace label, and features where they differ, of a learned sample. Call inside a transaction."""
        self._db.execute("UPDATE events SET label = ?, crc = ? WHERE seq = ?", (changed.label, changed.crc, event.seq))
        if changed.features != event.features:  # SQLite would write them anew
            self._db.execute("UPDATE events SET features = ? WHERE seq = ?", (changed.features, event.seq))

    def snapshots(self) -> dict[str, int]:
        """Every snapshot's event number by name; the automatic one has the empty name."""
        with self._typed_errors():
            found = dict(self._db.execute("SELECT name, seq FROM snapshots ORDER BY seq, name").fetchall())
        if not all(isinstance(seq, int) for seq in found.values()):
            raise StoreError(f"{self._where}: is damaged (a snapshot has no number); {RESTORE}")
        return found

    def snapshot(self, name: str) -> bytes:
        """A snapshot's blob. The name must exist.

        Raises:
            StoreError: when its CRC-32 says that it is damaged.
        """
        with self._typed_errors():
            seq, blob, expected = self._db.execute("SELECT seq, blob, crc FROM snapshots WHERE name = ?", (name,)).fetchone()
        if not isinstance(blob, bytes) or _snapshot_crc(name, seq, blob) != expected:
            what = f"snapshot {short(name)}" if name else "the automatic snapshot"
            raise StoreError(f"{self._where}: is damaged ({what} differs from its CRC-32); {RESTORE}")
        return blob

    def put_snapshot(self, name: str, seq: int, blob: bytes) -> None:
        """Write or replace a snapshot; the automatic one is of the present. Call inside a transaction."""
        values = (name, seq, blob, _snapshot_crc(name, seq, blob))
        self._db.execute("INSERT OR REPLACE INTO snapshots (name, seq, blob, crc) VALUES (?, ?, ?, ?)", values)
        self.tasks.tidy()
        if name == AUTOMATIC:
            self._replayed_bytes = 0

    def drop_after(self, seq: int) -> None:
        """Drop every event and snapshot after number ``seq``: the history stays a line.

        Call inside a transaction, and :meth:`fold` after it.
        """
        self._db.execute("DELETE FROM events WHERE seq > ?", (seq,))
        self._db.execute("DELETE FROM snapshots WHERE seq > ?", (seq,))
        self.tasks.go_back(seq)
        self._seq = seq
        self._log_bytes = self._sum_bytes("1")
        self.erasure_due = True

    def wal_bytes(self) -> int:
        """Size of the write-ahead log; it grows by what each transaction writes until :meth:`fold`."""
        return database.wal_bytes(self.path)

    def fold(self, force: bool = False) -> None:
        """Move the write-ahead log into the database and empty it, when that is due or it is over 4 MiB or half of the free space.

        Writes each page in it once more. Nothing is lost when that fails: the write-ahead log stays as it is, and the next call
        tries again. A full disk raises nothing.

        Args:
            force: Do it in any case, after a transaction that is done: no error is raised for what follows it. :attr:`erased`
                tells whether it went well.

        Raises:
            StoreError: when SQLite fails for another reason, unless ``force``.
        """
        with suppress(StoreError if force else StoreFullError), self._typed_errors():
            if force or self.erasure_due or self.wal_bytes() > self._wal_limit():
                nbytes = database.checkpoint_bytes(self.path)
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if not self.wal_bytes():
                    self.written += nbytes
                    self.erasure_due = False

    def close(self) -> None:
        """Close the file; SQLite folds the write-ahead log into it."""
        self._db.close()

    def leave(self) -> None:
        """Close the file and leave it and its write-ahead log as they are: for a store that is refused."""
        database.leave(self._db, self.path)

    def _wal_limit(self) -> int:
        """Half of the free space at most: the log repeats pages, and moving it into the database needs room for each of them once."""
        return 0 if self.path is None else min(_WAL_LIMIT_BYTES, shutil.disk_usage(self.path.parent).free // 2)

    def _read(self) -> None:
        self._next_id = self._reserved = self._number("reserved_ids")
        self._number("evicted_before")
        numbers = self._db.execute("SELECT (SELECT max(seq) FROM events), (SELECT max(seq) FROM snapshots)").fetchone()
        self._seq = max(number or 0 for number in numbers)
        self._log_bytes = self._sum_bytes("1")
        self._replayed_bytes = self._sum_bytes(f"seq > {_LAST_SNAPSHOT}")

    def _event(self, row: tuple[Any, ...]) -> Event:
        event = Event(*row[:-1])
        if not isinstance(row[-2], bytes | None) or event.crc != row[-1]:
            raise StoreError(f"{self._where}: is damaged (event {event.seq} differs from its CRC-32); {RESTORE}")
        return event

    def _number(self, key: str) -> int:
        value = database.meta(self._db, key, self._where)
        if not isinstance(value, int) or value < 0:
            raise StoreError(f"{self._where}: is damaged ({key} is {short(value)}); {RESTORE}")
        return value

    def _drop_oldest(self, nbytes: int) -> None:
        """Make room for ``nbytes`` and a sixteenth of the log, so that pages are rewritten rarely."""
        spare = self._log_bytes + nbytes + self.log_capacity_bytes // 16 - self.log_capacity_bytes
        before = _LAST_SNAPSHOT if self.persistent else "(SELECT max(seq) FROM events)"
        last, highest_id = -1, -1
        for seq, sample_id, size in self._db.execute(f"SELECT seq, sample_id, {_SIZE} FROM events WHERE seq <= {before} ORDER BY seq"):
            if spare <= 0:
                break
            last, highest_id, spare = seq, max(highest_id, -1 if sample_id is None else sample_id), spare - size
            self._log_bytes -= size
        self._db.execute("DELETE FROM events WHERE seq <= ?", (last,))
        database.set_meta(self._db, "evicted_before", max(self.evicted_before, highest_id + 1))

    def _typed_errors(self) -> AbstractContextManager[None]:
        return database.typed_errors(self.path)

    def _sum_bytes(self, where: str) -> int:
        return int(self._db.execute(f"SELECT coalesce(sum({_SIZE}), 0) FROM events WHERE {where}").fetchone()[0])


def _snapshot_crc(name: str, seq: Any, blob: bytes) -> bytes:
    return crc(repr((name, seq)).encode(), blob)
