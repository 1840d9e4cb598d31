"""The crash-safe store: a log of learned samples and snapshots, in one SQLite file.

Every operation is one transaction: after a crash the store is as it was after some operation, never between two. Recovery
loads the automatic snapshot and replays the events after it. With ``durability="normal"`` (write-ahead log,
synchronous=NORMAL) a killed process loses nothing, and a power cut may lose the last samples since the last ``save``,
``forget``, ``relabel`` or ``rollback``, which are synced to the disk; ``"full"`` syncs every sample.

Deleted content is overwritten with zeros in the file (secure_delete), and the write-ahead log that may still hold it is
emptied: by :meth:`Store.fold`, or at the next start when the process died in between. Blocks that a file system has freed
and what a flash controller keeps in worn ones are beyond it. One process at a time may have a store open.
"""

import dataclasses
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgecl_device.checks import as_path, short
from edgecl_device.errors import InputError, StoreError, StoreFullError, StoreMismatchError
from edgecl_device.event import EVENT_OVERHEAD, Event, crc

APPLICATION_ID = 0x6564676C  # "edgl"
SCHEMA = 2
AUTOMATIC = ""
_ID_BLOCK = 1024
_WAL_LIMIT_BYTES = 4 << 20
_SMALLEST_FILE_BYTES = 512  # SQLite takes what is smaller for a new database
_PAGE_BYTES = 1024  # a transaction writes whole pages: with SQLite's usual 4096 a small sample costs three times the flash writes
_DURABILITY = {"normal": "NORMAL", "full": "FULL"}
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE events (seq INTEGER PRIMARY KEY, kind TEXT, sample_id INTEGER, label INTEGER, weight REAL, lr REAL, name TEXT, features BLOB,
    crc BLOB);
CREATE TABLE snapshots (name TEXT PRIMARY KEY, seq INTEGER, blob BLOB, crc BLOB);
"""
_EVENT = "seq, kind, sample_id, label, weight, lr, name, features, crc"
_DAMAGED = "restore it from a copy, or delete it to start afresh"
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
        self._seq = self._log_bytes = self._replayed_bytes = 0
        self._erasure_due = False
        self._synchronous = _DURABILITY[durability]
        self._where = str(self.path or "store in memory")
        if self.path is not None and self.path.is_file() and self.path.stat().st_size < _SMALLEST_FILE_BYTES:
            raise StoreError(f"{self._where}: is damaged (cut to {self.path.stat().st_size} bytes, what it held is lost); {_DAMAGED}")
        with self._typed_errors():
            self._db = sqlite3.connect(self.path or ":memory:", timeout=0, isolation_level=None, check_same_thread=False)
        try:
            with self._typed_errors():
                self._open(bundle_id)
        except StoreError:
            self._db.close()
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
        """False while the write-ahead log may still hold erased content because it could not be emptied; :meth:`fold` tries again."""
        return not self._erasure_due

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

    def new_id(self) -> int:
        """A sample id that no sample of this store ever had, not even one lost in a crash: ids are reserved in blocks.

        Raises:
            StoreFullError: when the next block cannot be reserved.
        """
        if self._next_id == self._reserved:
            with self.transaction(sync=True):  # an id must not come again after a power cut either
                self._set_meta("reserved_ids", self._reserved + _ID_BLOCK)
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
        before = self._seq, self._log_bytes, self._replayed_bytes, self._erasure_due
        with self._typed_errors():
            try:
                if sync:
                    self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._seq, self._log_bytes, self._replayed_bytes, self._erasure_due = before
                if self._db.in_transaction:  # SQLite rolls some errors back by itself
                    self._db.execute("ROLLBACK")
                raise
            finally:
                if sync:
                    self._db.execute(f"PRAGMA synchronous = {self._synchronous}")

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
        """Why :meth:`sample` finds nothing."""
        if not self.handed_out(sample_id):
            return f"sample {sample_id} was never handed out; pass the sample_id of a learned sample"
        if sample_id < self.evicted_before:
            return (
                f"sample {sample_id} is not in the log any more: its cap of {self.log_capacity_bytes} bytes dropped it "
                "(if it was learned at all); export with a larger log_capacity_bytes"
            )
        return f"sample {sample_id} was not learned, or is forgotten already, or was rolled back; nothing is left to change"

    def events_after(self, seq: int) -> Iterator[Event]:
        """The events after number ``seq``, in order."""
        with self._typed_errors():
            for row in self._db.execute(f"SELECT {_EVENT} FROM events WHERE seq > ? ORDER BY seq", (seq,)):
                yield self._event(row)

    def erase(self, event: Event) -> None:
        """Take one event out of the log. Call inside a transaction, and :meth:`fold` after it."""
        self._db.execute("DELETE FROM events WHERE seq = ?", (event.seq,))
        self._log_bytes -= event.nbytes
        self._erasure_due = True

    def set_label(self, event: Event, label: int) -> None:
        """Change the label of a learned sample. Call inside a transaction."""
        relabelled = dataclasses.replace(event, label=label)
        self._db.execute("UPDATE events SET label = ?, crc = ? WHERE seq = ?", (label, relabelled.crc, event.seq))

    def snapshots(self) -> dict[str, int]:
        """Every snapshot's event number by name; the automatic one has the empty name."""
        with self._typed_errors():
            found = dict(self._db.execute("SELECT name, seq FROM snapshots ORDER BY seq, name").fetchall())
        if not all(isinstance(seq, int) for seq in found.values()):
            raise StoreError(f"{self._where}: is damaged (a snapshot has no number); {_DAMAGED}")
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
            raise StoreError(f"{self._where}: is damaged ({what} differs from its CRC-32); {_DAMAGED}")
        return blob

    def put_snapshot(self, name: str, seq: int, blob: bytes) -> None:
        """Write or replace a snapshot; the automatic one is of the present. Call inside a transaction."""
        values = (name, seq, blob, _snapshot_crc(name, seq, blob))
        self._db.execute("INSERT OR REPLACE INTO snapshots (name, seq, blob, crc) VALUES (?, ?, ?, ?)", values)
        if name == AUTOMATIC:
            self._replayed_bytes = 0

    def drop_after(self, seq: int) -> None:
        """Drop every event and snapshot after number ``seq``: the history stays a line. Call inside a transaction."""
        self._db.execute("DELETE FROM events WHERE seq > ?", (seq,))
        self._db.execute("DELETE FROM snapshots WHERE seq > ?", (seq,))
        self._seq = seq
        self._log_bytes = self._sum_bytes("1")

    def wal_bytes(self) -> int:
        """Size of the write-ahead log; it grows by what each transaction writes until :meth:`fold`."""
        wal = Path(f"{self.path}-wal")
        return wal.stat().st_size if self.persistent and wal.exists() else 0

    def fold(self, force: bool = False) -> None:
        """Move the write-ahead log into the database and empty it, when that is due or it is over 4 MiB; writes each page once more.

        Nothing is lost when that fails: the write-ahead log stays as it is, and the next call tries again. A full disk raises
        nothing.

        Args:
            force: Do it in any case, after a transaction that is done: no error is raised for what follows it. :attr:`erased`
                tells whether it went well after :meth:`erase`.

        Raises:
            StoreError: when SQLite fails for another reason, unless ``force``.
        """
        with suppress(StoreError if force else StoreFullError), self._typed_errors():
            if force or self._erasure_due or self.wal_bytes() > _WAL_LIMIT_BYTES:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._erasure_due &= self.wal_bytes() > 0

    def close(self) -> None:
        """Close the file; SQLite folds the write-ahead log into it."""
        self._db.close()

    def _open(self, bundle_id: str) -> None:
        run = self._db.execute
        # Before the first access: the lock is then held until the end, and no shared memory file is needed.
        run("PRAGMA locking_mode = EXCLUSIVE")
        run(f"PRAGMA synchronous = {self._synchronous}")
        run("PRAGMA secure_delete = ON")
        tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and run("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{self._where}: is an SQLite database of another program; pass another path")
        version = run("PRAGMA user_version").fetchone()[0]
        if tables and version != SCHEMA:
            raise StoreError(f"{self._where}: store schema is {version}, this package reads {SCHEMA}; use the version that wrote it")
        if tables:
            problem = run("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise StoreError(f"{self._where}: is damaged ({problem}); {_DAMAGED}")
            owner = self._meta("bundle_id")
            if owner != bundle_id:
                raise StoreMismatchError(
                    f"{self._where}: belongs to bundle {owner}, not to {bundle_id}; pass that bundle, or another path for a new store"
                )
        if not tables:
            run(f"PRAGMA page_size = {_PAGE_BYTES}")
        run("PRAGMA journal_mode = WAL").fetchone()
        run("PRAGMA wal_autocheckpoint = 0")  # fold() does it, so that a transaction's bytes can be told
        if not tables:
            with self.transaction():
                run(f"PRAGMA application_id = {APPLICATION_ID}")
                run(f"PRAGMA user_version = {SCHEMA}")
                for statement in _TABLES.split(";"):
                    run(statement)
                self._set_meta("bundle_id", bundle_id)
                self._set_meta("reserved_ids", 0)
                self._set_meta("evicted_before", 0)
        with self.transaction():  # takes the lock, though nothing is to be written
            pass
        self._erasure_due = self.wal_bytes() > 0  # a process that died may have erased something and not emptied it
        self.fold()
        self._next_id = self._reserved = self._number("reserved_ids")
        self._number("evicted_before")
        last_event, last_snapshot = run("SELECT (SELECT max(seq) FROM events), (SELECT max(seq) FROM snapshots)").fetchone()
        self._seq = max(last_event or 0, last_snapshot or 0)
        self._log_bytes = self._sum_bytes("1")
        self._replayed_bytes = self._sum_bytes(f"seq > {_LAST_SNAPSHOT}")

    def _event(self, row: tuple[Any, ...]) -> Event:
        event = Event(*row[:-1])
        if not isinstance(row[-2], bytes | None) or event.crc != row[-1]:
            raise StoreError(f"{self._where}: is damaged (event {event.seq} differs from its CRC-32); {_DAMAGED}")
        return event

    def _meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise StoreError(f"{self._where}: is damaged ({key} is missing); {_DAMAGED}")
        return row[0]

    def _number(self, key: str) -> int:
        value = self._meta(key)
        if not isinstance(value, int) or value < 0:
            raise StoreError(f"{self._where}: is damaged ({key} is {short(value)}); {_DAMAGED}")
        return value

    def _set_meta(self, key: str, value: str | int) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

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
        self._set_meta("evicted_before", max(self.evicted_before, highest_id + 1))

    def _sum_bytes(self, where: str) -> int:
        return int(self._db.execute(f"SELECT coalesce(sum({_SIZE}), 0) FROM events WHERE {where}").fetchone()[0])

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise StoreFullError(f"{self._where}: no space left ({error}), nothing was written; free space and try again") from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreError(f"{self._where}: another learner has it open; close that one or pass another path") from error
            if code == sqlite3.SQLITE_CANTOPEN:
                raise StoreError(f"{self._where}: cannot be opened; check that its folder exists and can be written") from error
            if code == sqlite3.SQLITE_READONLY or (self.path is not None and not os.access(self.path.parent, os.W_OK)):
                raise StoreError(f"{self._where}: is read-only; make the file and its folder writable") from error
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise StoreError(f"{self._where}: is damaged or not a store ({error}); {_DAMAGED}") from error
            raise StoreError(f"{self._where}: SQLite failed ({error}); check the disk and try again") from error
        except UnicodeDecodeError as error:  # in a text column
            raise StoreError(f"{self._where}: is damaged ({error}); {_DAMAGED}") from error


def _snapshot_crc(name: str, seq: Any, blob: bytes) -> bytes:
    return crc(repr((name, seq)).encode(), blob)
