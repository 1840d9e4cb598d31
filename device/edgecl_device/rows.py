"""Where replay rows lie: in arrays, or in a file that is larger than the memory of the device.

A file holds one version of the rows: that of the store's last automatic snapshot. What changes after it waits in memory, and the next
snapshot carries it along; only when that snapshot is in the store for good is it written into the file (:meth:`RowFile.settle`). So a
process may die at any moment: either the file is that version still, or the snapshot in the store says what to write once more. A
snapshot copies the rows that changed since the one before, never all of them; what waits is bounded by the log's cap, as every change is
an event in it.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_device.checks import as_path, short
from edgecl_device.errors import RESTORE, InputError, StoreError
from edgecl_device.manifest import Array, Manifest, TensorSpec

ROW = "memory.row."
HEADER_BYTES = 64
_MAGIC = b"edgecl rows 1\n\0\0"
_SIDE_FILES = ("-wal", "-journal", "-shm", "-new")
_ZEROS = bytes(1 << 20)


class Rows:
    """Rows in arrays of their own.

    Args:
        fields: One row's tensors.
        count: Rows that there is room for.

    Attributes:
        arrays: Every row by field, [count, ...].
    """

    def __init__(self, fields: tuple[TensorSpec, ...], count: int) -> None:
        self.arrays = {field.name: np.zeros((count, *field.shape), field.dtype) for field in fields}
        self._fields = fields

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(array.nbytes for array in self.arrays.values())

    def write(self, slot: int, row: Mapping[str, Array]) -> None:
        """Replace one row."""
        for name, array in self.arrays.items():
            array[slot] = row[name]

    def read(self, slots: Array) -> dict[str, Array]:
        """Copies of some rows: [n, ...] by field."""
        return {name: array[slots] for name, array in self.arrays.items()}

    def fill(self, values: Mapping[str, Array]) -> None:
        """Set the first rows."""
        for name, array in self.arrays.items():
            array[: len(values[name])] = values[name]

    def snapshot(self, used: int) -> dict[str, Array]:
        """Copies of the first ``used`` rows."""
        return {f"{ROW}{name}": array[:used].copy() for name, array in self.arrays.items()}

    def specs(self, snapshot: Mapping[str, Array], used: int) -> list[TensorSpec]:
        """What a snapshot must hold of the rows."""
        return [TensorSpec(f"{ROW}{field.name}", (used, *field.shape), field.dtype) for field in self._fields]

    def restore(self, snapshot: Mapping[str, Array], used: int) -> None:
        """Take over a snapshot, checked against :meth:`specs`; other rows become zero."""
        for name, array in self.arrays.items():
            array[:used] = snapshot[f"{ROW}{name}"]
            array[used:] = 0


class RowFile:
    """The same rows in a file, of which the system keeps in memory what it has room for.

    64 bytes of header (magic, token, epoch, rows, bytes of a row), then one record a row. The epoch counts the snapshots that were
    written into the file, the token is its store's (:attr:`edgecl_device.store.Store.token`). Rows have no checksum.

    Args:
        path: The file.
        fields: One row's tensors.
        count: Rows that there is room for; all of the file is allocated when it is made.
        token: 16 bytes of a new store, whose file is to be made; None where the store has one.

    Attributes:
        written: Bytes written so far: what was filled in, and the pages that each :meth:`settle` changed.

    Raises:
        StoreError: when a file is there that is not this store's, the store's own is missing or damaged, or it cannot be made.
    """

    def __init__(self, path: Path, fields: tuple[TensorSpec, ...], count: int, token: bytes | None) -> None:
        self.path = path
        self._new = Path(f"{path}-new")
        self._record = np.dtype([(f.name, np.dtype(f.dtype).newbyteorder("<"), f.shape) for f in fields])
        self._fields, self._count = fields, count
        self._changed: dict[int, Any] = {}
        self.written = 0
        if token is not None:
            self._make(token)
        elif not path.exists() and not self._new.exists():
            raise StoreError(f"{path}: the store's row file is missing; put it back beside the store, or start with a new store")
        # A process died, or none ran, or the disk failed, between the first snapshot and the move into place
        self._unsettled = token is not None or not path.exists()
        self._open(self._new if self._unsettled else path)
        if token not in (None, self._token.tobytes()):
            raise StoreError(f"{self._new}: another store has made its file there meanwhile; pass another path")

    @property
    def nbytes(self) -> int:
        """Bytes of memory beside what waits to be written."""
        return 0

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return HEADER_BYTES + self._count * self._record.itemsize

    @property
    def waiting(self) -> int:
        """Rows that wait in memory for the next snapshot."""
        return len(self._changed)

    def write(self, slot: int, row: Mapping[str, Array]) -> None:
        """Replace one row, in memory for now."""
        record = np.zeros((), self._record)
        for name in self._record.names or ():
            record[name] = row[name]
        self._changed[slot] = record

    def read(self, slots: Array) -> dict[str, Array]:
        """Copies of some rows: [n, ...] by field."""
        records = self._rows[slots]
        for i, slot in enumerate(slots.tolist()):
            if slot in self._changed:
                records[i] = self._changed[slot]
        return {field.name: records[field.name].astype(field.dtype) for field in self._fields}

    def fill(self, values: Mapping[str, Array]) -> None:
        """Set the first rows of a new file."""
        for field in self._fields:
            self._rows[field.name][: len(values[field.name])] = values[field.name]
            self.written += values[field.name].nbytes
        self._rows.flush()  # before the first snapshot, which does not hold them

    def snapshot(self, used: int) -> dict[str, Array]:
        """What changed since the version in the file, and which version that is."""
        slots = np.array(sorted(self._changed), np.int32)
        version = {"memory.file": self._token.copy(), "memory.epoch": np.array(self._epoch, np.int64), "memory.changed": slots}
        changed = np.array([self._changed[slot] for slot in slots.tolist()], self._record)
        return {**version, **{f"{ROW}{field.name}": changed[field.name].astype(field.dtype) for field in self._fields}}

    def specs(self, snapshot: Mapping[str, Array], used: int) -> list[TensorSpec]:
        """What a snapshot must hold of the rows.

        Raises:
            InputError: when it is of another file or version.
        """
        slots, token, epoch = (snapshot.get(f"memory.{name}") for name in ("changed", "file", "epoch"))
        if slots is None or slots.dtype != np.int32 or slots.ndim != 1 or (slots < 0).any() or (slots >= self._count).any():
            raise InputError(f"memory.changed: must be slots below {self._count}, int32; restore a copy of the store")
        if token is None or token.tobytes() != self._token.tobytes():
            raise InputError(f"rows: {self.path} belongs to another store; pass the file that was made with this one")
        if epoch is None or epoch.shape != () or int(epoch) not in (self._epoch - 1, self._epoch):
            raise InputError(f"rows: {self.path} is of another time than the store; restore copies that were made together")
        return [TensorSpec(f"{ROW}{field.name}", (len(slots), *field.shape), field.dtype) for field in self._fields]

    def restore(self, snapshot: Mapping[str, Array], used: int) -> None:
        """Take over a snapshot, checked against :meth:`specs`."""
        # Also when they are in the file already: to write them once more does no harm.
        self._changed = {}
        for i, slot in enumerate(snapshot["memory.changed"].tolist()):
            self.write(slot, {field.name: snapshot[f"{ROW}{field.name}"][i] for field in self._fields})

    def settle(self) -> None:
        """Write what the store's automatic snapshot has for good into the file; call it when that snapshot is committed.

        When the disk fails nothing is lost: the rows stay in memory and in the snapshot, and the next call tries again.
        """
        with suppress(OSError):
            for slot, record in self._changed.items():
                self._rows[slot] = record
            self._rows.flush()
            self._header["epoch"] = self._epoch + 1
            self._header.flush()
            self.written += PAGESIZE * len({0, *(page for slot in self._changed for page in self._pages(slot))})
            self._move()
            self._epoch += 1
            self._changed = {}

    def place(self) -> None:
        """Move a file into its place that is there under its first name; call it when a snapshot that goes with it is in the store.

        When that fails, the next :meth:`settle` tries again.
        """
        with suppress(OSError):
            self._move()

    def _move(self) -> None:
        if not self._unsettled:
            return
        if not self._is_own() or self.path.exists():
            raise FileExistsError(f"{self.path}: another file is there")
        self._new.replace(self.path)
        self._unsettled = False

    def _is_own(self) -> bool:
        """Whether the new file is this store's still, and none that somebody has put in its place."""
        with self._new.open("rb") as file:
            return _header_of(file.read(HEADER_BYTES))["token"].tobytes() == self._token.tobytes()

    def _pages(self, slot: int) -> range:
        start = HEADER_BYTES + slot * self._record.itemsize
        return range(start // PAGESIZE, (start + self._record.itemsize - 1) // PAGESIZE + 1)

    def close(self) -> None:
        """Let go of the file."""
        del self._rows, self._header

    def remove(self) -> None:
        """Let go of a new file and delete it, before any snapshot tells of it."""
        self.close()
        with suppress(OSError):
            if self._is_own():
                self._new.unlink()

    def _make(self, token: bytes) -> None:
        if self.path.exists():
            raise StoreError(f"{self.path}: exists, but the store is new; pass the store that it was made with, or another path")
        if not self._free(token):
            raise StoreError(
                f"{self._new}: exists, and is not of this store, which is new; start the store that it was made with, which moves it to "
                f"{self.path.name}, delete it if there is none any more, or pass another path"
            )
        header = np.zeros((), _HEADER)
        header["magic"], header["token"] = _MAGIC, np.frombuffer(token, np.uint8)
        header["rows"], header["record"] = self._count, self._record.itemsize
        try:
            self._new.unlink(missing_ok=True)
            with self._new.open("xb") as file:  # fails where another process has been faster
                file.write(header.tobytes().ljust(HEADER_BYTES, b"\0"))
                file.flush()  # from here on it can be told whose it is
                left = self.file_bytes - HEADER_BYTES
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.file_bytes)
                else:  # a hole in the file would end the process where the disk is full
                    while left:
                        left -= file.write(_ZEROS[: min(left, len(_ZEROS))])
                os.fsync(file.fileno())
            self.written += self.file_bytes - left
        except OSError as error:
            with suppress(OSError, StoreError):
                if self._free(token):
                    self._new.unlink()  # it may have taken what room there was
            what = f"{self.path} cannot be made with {self.file_bytes} bytes ({error})"
            raise StoreError(f"rows: {what}; make room or pass another path") from error

    def _free(self, token: bytes) -> bool:
        """Whether nothing is lost where the file is made: none is there, all of it is zero, or this very store has not settled it."""
        try:
            with self._new.open("rb") as file:
                start = file.read(HEADER_BYTES)
                header = _header_of(start)
                if header["magic"].tobytes() == _MAGIC:  # of another store all rows may be in it, and of a settled one of this store
                    return header["token"].tobytes() == token and header["epoch"] == 0
                if os.fstat(file.fileno()).st_size > self.file_bytes:
                    return False
                return not any(chunk.strip(b"\0") for chunk in chain([start], iter(lambda: file.read(len(_ZEROS)), b"")))
        except FileNotFoundError:
            return True
        except OSError as error:
            raise StoreError(f"{self._new}: cannot be read ({error}); make room for the file of rows, or pass another path") from error

    def _open(self, path: Path) -> None:
        try:
            ok = path.stat().st_size == self.file_bytes  # first, as numpy would lengthen a shorter file
            if ok:
                self._header = np.memmap(path, _HEADER, "r+", shape=())
                ok = self._header["magic"].tobytes() == _MAGIC and self._header["rows"] == self._count
            if not ok or self._header["record"] != self._record.itemsize:
                raise StoreError(f"{path}: is damaged or no row file of this bundle; {RESTORE}")
            self._rows = np.memmap(path, self._record, "r+", offset=HEADER_BYTES, shape=(self._count,))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be opened ({error}); {RESTORE}") from error
        self._token, self._epoch = np.array(self._header["token"]), int(self._header["epoch"])


def row_file_of(manifest: Manifest, bundle: Path, store: str | Path | None, rows: str | Path | None) -> Path | None:
    """The file of the replay rows that :meth:`edgecl_device.Learner.load` was given, or None where the bundle keeps them in memory.

    Raises:
        InputError: when it is not what bundle and store ask for.
    """
    in_file = manifest.replay is not None and manifest.replay.in_file
    if rows is None:
        if in_file:
            raise InputError("rows: is needed, this bundle keeps its replay rows in a file beside the store; name one, as rows.bin")
        return None
    path = as_path("rows", rows).resolve()
    if not in_file:
        raise InputError(f"rows: this bundle keeps no replay rows in a file, got {short(rows)}; leave it out, or export with rows_in_file")
    if store is None:
        raise InputError(f"rows: a file of rows goes with a store, got {short(rows)} without one; name a store, too")
    if path.is_relative_to(bundle.resolve()) or path == as_path("store", store).resolve() or path.is_dir():
        raise InputError(f"rows: must be a file of its own, outside of the bundle, got {short(rows)}; pass another path")
    if path.name.lower().endswith(_SIDE_FILES):  # the start of a store deletes strays of these names beside it
        raise InputError(
            f"rows: must not end in {', '.join(_SIDE_FILES)}, as files beside a store do, which come and go, got {short(rows)}; "
            "pass another path, or rename the file"
        )
    return path


_HEADER = np.dtype([("magic", "S16"), ("token", "u1", (16,)), ("epoch", "<i8"), ("rows", "<i8"), ("record", "<i8")])


def _header_of(start: bytes) -> Array:
    return np.frombuffer(start.ljust(HEADER_BYTES, b"\0"), _HEADER, 1).reshape(())
