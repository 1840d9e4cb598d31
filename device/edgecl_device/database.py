"""The SQLite file of a store: made whole or not at all, checked before anything is written to it, its errors typed."""

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_device.errors import RESTORE, StoreError, StoreFullError, StoreMismatchError

APPLICATION_ID = 0x6564676C  # "edgl"
SCHEMA = 2
TOKEN_BYTES = 16
_SMALLEST_FILE_BYTES = 512  # SQLite takes what is smaller for a new database
_MAGIC = b"SQLite format 3\0"  # the start of every database, of a damaged one more often than not
_PAGE_BYTES = 1024  # a transaction writes whole pages: with SQLite's usual 4096 a small sample costs three times the flash writes
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_TABLES = (
    "meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "events (seq INTEGER PRIMARY KEY, kind TEXT, sample_id INTEGER, label INTEGER, weight REAL, lr REAL, name TEXT, features BLOB, "
    "crc BLOB)",
    "snapshots (name TEXT PRIMARY KEY, seq INTEGER, blob BLOB, crc BLOB)",
)


def connect(path: Path | None, bundle_id: str, synchronous: str) -> sqlite3.Connection:
    """Open a store's database, made when there is none; None is one in memory. The lock is held until it is closed.

    Nothing is written to a file that is there, not even by closing it after a refusal.

    Args:
        path: The file, resolved.
        bundle_id: The bundle to which it must belong, or will.
        synchronous: SQLite's level, ``NORMAL`` or ``FULL``.

    Raises:
        StoreMismatchError: when the file belongs to another bundle.
        StoreError: when it cannot be opened or made, is empty or damaged, is no store, or is in use.
    """
    if path is not None and path.exists() and not path.is_file():
        raise StoreError(f"{path}: must be a file, is a folder or a device; pass another path")
    if path is not None and path.is_file() and path.stat().st_size < _SMALLEST_FILE_BYTES:
        raise StoreError(f"{path}: is damaged (cut to {path.stat().st_size} bytes, what it held is lost); {RESTORE}")
    if path is not None and not path.exists():
        _make(path, bundle_id)
    with typed_errors(path):
        db = _open(path or ":memory:", synchronous)
    try:
        with typed_errors(path):
            if path is None:
                _fill(db, bundle_id)
            else:
                _check(db, path, bundle_id)
            db.execute("PRAGMA journal_mode = WAL").fetchone()
            db.execute("PRAGMA wal_autocheckpoint = 0")  # Store.fold does it, so that a transaction's bytes can be told
            db.execute("BEGIN IMMEDIATE")  # takes the lock, though nothing is to be written
            db.execute("COMMIT")
    except BaseException:
        leave(db, path)
        raise
    return db


def leave(db: sqlite3.Connection, path: Path | None) -> None:
    """Close a database without moving its write-ahead log into it: both files of a refused store stay as they are."""
    wal = wal_of(path) if path is not None else None
    content = wal.read_bytes() if wal is not None and wal.exists() else b""
    if sys.version_info >= (3, 12):
        db.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, bool(content))
    else:
        db.interrupt()  # the last checkpoint heeds it
    db.close()
    if wal is not None and content and not wal.exists():  # SQLite deletes one without a single whole frame
        with suppress(OSError):
            wal.write_bytes(content)


def meta(db: sqlite3.Connection, key: str, where: object) -> Any:
    """A value of the table ``meta``.

    Raises:
        StoreError: when it is missing.
    """
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise StoreError(f"{where}: is damaged ({key} is missing); {RESTORE}")
    return row[0]


def set_meta(db: sqlite3.Connection, key: str, value: str | int | bytes) -> None:
    """Set a value of the table ``meta``."""
    db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))


def wal_of(path: Path) -> Path:
    """The write-ahead log beside a database."""
    return Path(f"{path}-wal")


def wal_bytes(path: Path | None) -> int:
    """Size of the write-ahead log; 0 when there is none."""
    try:
        return wal_of(path).stat().st_size if path is not None else 0
    except FileNotFoundError:
        return 0


def checkpoint_bytes(path: Path | None) -> int:
    """What moving the write-ahead log into the database writes: each page in it once, however often it is there.

    Source: https://sqlite.org/fileformat2.html#the_write_ahead_log
    """
    if path is None or wal_bytes(path) <= _WAL_HEADER_BYTES:
        return 0
    content = np.fromfile(wal_of(path), np.uint8)
    page = int.from_bytes(content[8:12].tobytes(), "big")
    frame = _FRAME_HEADER_BYTES + page
    n = (len(content) - _WAL_HEADER_BYTES) // frame
    frames = content[_WAL_HEADER_BYTES : _WAL_HEADER_BYTES + n * frame].reshape(n, frame)
    return page * len(np.unique(np.ascontiguousarray(frames[:, :4]).view(">u4")))


@contextmanager
def typed_errors(path: Path | None) -> Iterator[None]:
    """SQLite's errors as StoreError, StoreFullError where the disk is full."""
    where = str(path or "store in memory")
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreFullError(f"{where}: no space left ({error}), nothing was written; free space and try again") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreError(f"{where}: another learner has it open; close that one or pass another path") from error
        if code == sqlite3.SQLITE_CANTOPEN:
            raise StoreError(f"{where}: cannot be opened; check that its folder exists and can be written") from error
        if code == sqlite3.SQLITE_READONLY or (path is not None and not os.access(path.parent, os.W_OK)):
            raise StoreError(f"{where}: is read-only; make the file and its folder writable") from error
        if code == sqlite3.SQLITE_NOTADB and path is not None and not _is_database(path):
            raise StoreError(f"{where}: is no store, but a file of another kind; pass another path") from error
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise StoreError(f"{where}: is damaged or not a store ({error}); {RESTORE}") from error
        raise StoreError(f"{where}: SQLite failed ({error}); check the disk and try again") from error
    except UnicodeDecodeError as error:  # in a text column
        raise StoreError(f"{where}: is damaged ({error}); {RESTORE}") from error


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _open(path: str | Path, synchronous: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    # Before the first access: the lock is then held until the end, and no shared memory file is needed.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute("PRAGMA secure_delete = ON")
    return db


def _make(path: Path, bundle_id: str) -> None:
    """Make a new store under another name and move it into place when it is whole and on the disk.

    A process that dies meanwhile, or a full disk, leaves ``*-new``, which the next start takes up. Two processes that do this
    at once exclude each other by SQLite's lock; what the faster one moved into place is never written over.
    """
    new = Path(f"{path}-new")
    with typed_errors(new), closing(_open(new, "FULL")) as db:
        _fill(db, bundle_id)
        if not path.exists():
            for stray in (wal_of(path), Path(f"{path}-journal")):  # of a store that was deleted: SQLite would apply them to this one
                stray.unlink(missing_ok=True)
    try:
        with suppress(FileNotFoundError):  # another process was faster
            new.unlink() if path.exists() else new.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be made ({error}); check its folder and try again") from error
    with suppress(OSError):  # where folders cannot be synced, the next sync of the write-ahead log has to do
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _fill(db: sqlite3.Connection, bundle_id: str) -> None:
    """The tables of a store that nothing was learned in; harmless when they are there."""
    db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    db.execute("BEGIN EXCLUSIVE")
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA}")
    for table in _TABLES:
        db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    for key, value in (("bundle_id", bundle_id), ("reserved_ids", 0), ("evicted_before", 0), ("token", os.urandom(TOKEN_BYTES))):
        set_meta(db, key, value)
    db.execute("COMMIT")


def _check(db: sqlite3.Connection, path: Path, bundle_id: str) -> None:
    db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # an error when it is no database, or in use
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError(f"{path}: is an SQLite database of another program; pass another path")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA:
        raise StoreError(f"{path}: store schema is {version}, this package reads {SCHEMA}; use the version that wrote it")
    problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise StoreError(f"{path}: is damaged ({' '.join(problem.split())}); {RESTORE}")
    owner = meta(db, "bundle_id", path)
    if owner != bundle_id:
        raise StoreMismatchError(
            f"{path}: belongs to bundle {str(owner)[:80]}, not to {bundle_id}; pass that bundle, or another path for a new store"
        )
