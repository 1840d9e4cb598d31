"""The crash-safe store: a log of learned samples and snapshots, in one SQLite file.

Every operation is one transaction: after a crash the store is as it was after some operation, never between two. Recovery
loads the automatic snapshot and replays the events after it. With ``durability="normal"`` (write-ahead log,
synchronous=NORMAL) a killed process loses nothing, and a power cut may lose the last samples since the last ``save``,
``forget``, ``relabel`` or ``rollback``, which are synced to the disk; ``"full"`` syncs every sample.

Deleted content is overwritten with zeros in the file (secure_delete); what a flash controller keeps in worn blocks is
beyond any file system. One process at a time may have a store open.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgecl_device.errors import InputError, StoreError, StoreFullError, StoreMismatchError

APPLICATION_ID = 0x6564676C  # "edgl"
SCHEMA = 1
AUTOMATIC = ""
EVENT_OVERHEAD = 64
"""Bytes that the log's cap counts for one event beside its features and name: its row's integers and SQLite's cell."""
_ID_BLOCK = 1024
_WAL_LIMIT_BYTES = 4 << 20
_PAGE_BYTES = 1024  # a transaction writes whole pages: with SQLite's usual 4096 a small sample costs three times the flash writes
_DURABILITY = {"normal": "NORMAL", "full": "FULL"}
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE events (seq INTEGER PRIMARY KEY, kind TEXT, sample_id INTEGER, label INTEGER, weight REAL, lr REAL, name TEXT, features BLOB);
CREATE TABLE snapshots (name TEXT PRIMARY KEY, seq INTEGER, blob BLOB);
"""
_EVENT = "seq, kind, sample_id, label, weight, lr, name, features"
_SIZE = f"{EVENT_OVERHEAD} + coalesce(length(features), 0) + coalesce(length(cast(name AS BLOB)), 0)"
_LAST_SNAPSHOT = f"(SELECT coalesce(max(seq), -1) FROM snapshots WHERE name = '{AUTOMATIC}')"


@dataclass(frozen=True)
class Event:
    """One entry of the log.

    Attributes:
        seq: Its number; they rise by one.
        kind: ``learn`` or ``add_class``. Forgetting and relabelling change the log itself and renew the snapshot, so that
            nothing is left to replay.
        sample_id: The sample, or None.
        label: Class index, or None.
        weight: Sample weight, or None.
        lr: Learning rate, or None.
        name: Class name, or None.
        features: The encoded sample's raw little-endian bytes, or None.
    """

    seq: int
    kind: str
    sample_id: int | None = None
    label: int | None = None
    weight: float | None = None
    lr: float | None = None
    name: str | None = None
    features: bytes | None = None

    @property
    def nbytes(self) -> int:
        """What the log's cap counts for it."""
        return EVENT_OVERHEAD + len(self.features or b"") + len((self.name or "").encode())


class Store:
    """A log and snapshots in one file, or in memory.

    Args:
        path: The file, made when there is none; None keeps everything in memory, and nothing is recovered from it.
        bundle_id: The bundle to which the store belongs.
        log_capacity_bytes: Cap of the log.
        durability: ``normal`` or ``full``.

    Raises:
        StoreMismatchError: when the file belongs to another bundle.
        StoreError: when it cannot be opened, is damaged, is not a store, or is in use.
    """

    def __init__(self, path: str | Path | None, bundle_id: str, log_capacity_bytes: int, durability: str = "normal") -> None:
        if durability not in _DURABILITY:
            raise InputError(f"durability: must be 'normal' or 'full', got {durability!r}; pass one of them")
        self.path = None if path is None else Path(path)
        self.persistent = path is not None
        self.log_capacity_bytes = log_capacity_bytes
        self._seq = self._log_bytes = self._replayed_bytes = 0
        self._fold_due = False
        self._synchronous = _DURABILITY[durability]
        self._where = str(self.path or "store in memory")
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
    def evicted_before(self) -> int:
        """No sample id at or above this was dropped by the log's cap."""
        return int(self._meta("evicted_before"))

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
        before = self._seq, self._log_bytes, self._replayed_bytes
        with self._typed_errors():
            try:
                if sync:
                    self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._seq, self._log_bytes, self._replayed_bytes = before
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
        values = (event.seq, event.kind, event.sample_id, event.label, event.weight, event.lr, event.name, event.features)
        self._db.execute(f"INSERT INTO events ({_EVENT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        self._seq = event.seq
        self._log_bytes += event.nbytes
        self._replayed_bytes += event.nbytes

    def sample(self, sample_id: int) -> Event | None:
        """The event by which a sample was learned, with its present label, or None when it is not in the log."""
        with self._typed_errors():
            row = self._db.execute(f"SELECT {_EVENT} FROM events WHERE sample_id = ? AND kind = 'learn'", (sample_id,)).fetchone()
        return Event(*row) if row else None

    def events_after(self, seq: int) -> Iterator[Event]:
        """The events after number ``seq``, in order."""
        with self._typed_errors():
            for row in self._db.execute(f"SELECT {_EVENT} FROM events WHERE seq > ? ORDER BY seq", (seq,)):
                yield Event(*row)

    def erase(self, event: Event) -> None:
        """Take one event out of the log. Call inside a transaction."""
        self._db.execute("DELETE FROM events WHERE seq = ?", (event.seq,))
        self._log_bytes -= event.nbytes

    def set_label(self, event: Event, label: int) -> None:
        """Change the label of a learned sample. Call inside a transaction."""
        self._db.execute("UPDATE events SET label = ? WHERE seq = ?", (label, event.seq))

    def snapshots(self) -> dict[str, int]:
        """Every snapshot's event number by name; the automatic one has the empty name."""
        with self._typed_errors():
            return dict(self._db.execute("SELECT name, seq FROM snapshots ORDER BY seq, name").fetchall())

    def snapshot(self, name: str) -> bytes:
        """A snapshot's blob. The name must exist."""
        with self._typed_errors():
            return bytes(self._db.execute("SELECT blob FROM snapshots WHERE name = ?", (name,)).fetchone()[0])

    def put_snapshot(self, name: str, seq: int, blob: bytes) -> None:
        """Write or replace a snapshot; the automatic one is of the present. Call inside a transaction."""
        self._db.execute("INSERT OR REPLACE INTO snapshots (name, seq, blob) VALUES (?, ?, ?)", (name, seq, blob))
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
        """Move the write-ahead log into the database and empty it, when it is over 4 MiB or ``force``; writes each page once more."""
        self._fold_due |= force or self.wal_bytes() > _WAL_LIMIT_BYTES
        # Nothing is lost on a full disk: the write-ahead log stays as it is, and the next call tries again.
        with suppress(StoreFullError), self._typed_errors():
            if self._fold_due:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._fold_due = False

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
            raise StoreError(f"{self._where}: store schema is {version}, this package reads {SCHEMA}; update edgecl on the device")
        if tables:
            problem = run("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise StoreError(f"{self._where}: is damaged ({problem}); restore it from a copy or delete it to start afresh")
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
                for statement in _TABLES.strip().splitlines():
                    run(statement)
                self._set_meta("bundle_id", bundle_id)
                self._set_meta("reserved_ids", 0)
                self._set_meta("evicted_before", 0)
        with self.transaction():  # takes the lock, though nothing is to be written
            pass
        self._next_id = self._reserved = int(self._meta("reserved_ids"))
        last_event, last_snapshot = run("SELECT (SELECT max(seq) FROM events), (SELECT max(seq) FROM snapshots)").fetchone()
        self._seq = max(last_event or 0, last_snapshot or 0)
        self._log_bytes = self._sum_bytes("1")
        self._replayed_bytes = self._sum_bytes(f"seq > {_LAST_SNAPSHOT}")

    def _meta(self, key: str) -> str | int:
        row: tuple[str | int] | None = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise StoreError(f"{self._where}: is damaged ({key} is missing); restore it from a copy or delete it to start afresh")
        return row[0]

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
            if code == sqlite3.SQLITE_READONLY:
                raise StoreError(f"{self._where}: is read-only; make the file and its folder writable") from error
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise StoreError(
                    f"{self._where}: is damaged or not a store ({error}); restore it from a copy, or delete it to start afresh"
                ) from error
            raise StoreError(f"{self._where}: SQLite failed ({error}); check the disk and try again") from error
