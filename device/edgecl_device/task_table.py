"""The tasks of a store: each a blob of its own, written when the learner leaves the task, and never with another.

A version of a task holds from the event that wrote it until the one that replaced or dropped it, both by their numbers in the log. So
the tasks as they were at a snapshot are the versions that held at its number, and nothing of them is in the snapshot itself. Versions
that held at no snapshot and do not hold now are deleted. The tables are made with the first task beside the bundle's own.
"""

import sqlite3
from pathlib import Path

from edgecl_device import database
from edgecl_device.checks import short
from edgecl_device.errors import RESTORE, StoreError
from edgecl_device.event import crc

_TABLES = (
    "tasks (name TEXT, seq INTEGER, until INTEGER, crc BLOB, PRIMARY KEY (name, seq)) WITHOUT ROWID",
    "task_blobs (name TEXT, seq INTEGER, blob BLOB, PRIMARY KEY (name, seq))",
)
"""Two, because a number that changes in a row makes SQLite write the whole row anew, its blob included."""
_NEEDLESS = "until IS NOT NULL AND NOT EXISTS (SELECT 1 FROM snapshots WHERE snapshots.seq >= tasks.seq AND snapshots.seq < tasks.until)"


class TaskTable:
    """Versions of tasks. All that write must run inside a transaction of the store, which owns the database.

    Args:
        db: The store's database.
        path: Its file, or None.
    """

    def __init__(self, db: sqlite3.Connection, path: Path | None) -> None:
        self._db = db
        self._path = path

    def versions(self, seq: int | None = None) -> dict[str, int]:
        """The versions that held at event ``seq``, by task; None is now. That of the task in use may be an older state of it."""
        now = "SELECT name, seq FROM tasks WHERE until IS NULL ORDER BY name"
        held = "SELECT name, seq FROM tasks WHERE seq <= ?1 AND (until IS NULL OR until > ?1) ORDER BY name"
        with database.typed_errors(self._path):
            if not self._there:
                return {}
            return dict((self._db.execute(now) if seq is None else self._db.execute(held, (seq,))).fetchall())

    def blob(self, name: str, seq: int) -> bytes:
        """A version's blob, which must be there.

        Raises:
            StoreError: when its CRC-32 says that it is damaged, or it is missing.
        """
        both = "SELECT blob, crc FROM tasks JOIN task_blobs USING (name, seq) WHERE name = ? AND seq = ?"
        with database.typed_errors(self._path):
            blob, expected = self._db.execute(both, (name, seq)).fetchone() or (None, None)
        if not isinstance(blob, bytes) or _crc(name, seq, blob) != expected:
            raise StoreError(f"{self._path or 'store in memory'}: is damaged (task {short(name)} differs from its CRC-32); {RESTORE}")
        return blob

    def put(self, name: str, seq: int, blob: bytes) -> None:
        """Write a version that holds from event ``seq`` on."""
        for table in _TABLES:
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        self.drop(name, seq)
        self._db.execute("INSERT INTO tasks (name, seq, crc) VALUES (?, ?, ?)", (name, seq, _crc(name, seq, blob)))
        self._db.execute("INSERT INTO task_blobs (name, seq, blob) VALUES (?, ?, ?)", (name, seq, blob))

    def drop(self, name: str, seq: int) -> None:
        """Let a task hold until event ``seq`` only."""
        if self._there:
            self._db.execute("UPDATE tasks SET until = ? WHERE name = ? AND until IS NULL", (seq, name))
            self.tidy()

    def go_back(self, seq: int) -> None:
        """Forget what came after event ``seq``, and the snapshots after it with it."""
        if self._there:
            self._db.execute("DELETE FROM task_blobs WHERE seq > ?", (seq,))
            self._db.execute("DELETE FROM tasks WHERE seq > ?", (seq,))
            self._db.execute("UPDATE tasks SET until = NULL WHERE until > ?", (seq,))
            self.tidy()

    def tidy(self) -> None:
        """Delete the versions that nothing needs any more."""
        if self._there:
            for name, seq in self._db.execute(f"SELECT name, seq FROM tasks WHERE {_NEEDLESS}").fetchall():
                self._db.execute("DELETE FROM task_blobs WHERE name = ? AND seq = ?", (name, seq))
                self._db.execute("DELETE FROM tasks WHERE name = ? AND seq = ?", (name, seq))

    @property
    def _there(self) -> bool:
        return self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'tasks'").fetchone() is not None


def _crc(name: str, seq: int, blob: bytes) -> bytes:
    return crc(repr((name, seq)).encode(), blob)
