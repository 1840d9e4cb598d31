"""Files of a run's folder: each is written whole or not at all, and one process at a time works in it."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecl.streams import Dataset
from edgecl_device.checks import short
from edgecl_device.errors import InputError
from edgecl_device.manifest import Array

LOCK = "lock.db"
SEAL = "file_sha256"
"""Key of a stage's file: SHA-256 of the rest of it."""


AGAIN = "run it again with --fresh, or in a new folder"
"""What mends a run's folder."""


def read_json(path: Path, mend: str = AGAIN) -> Any:
    """A file's value.

    Args:
        path: The file.
        mend: What to do when it is no such file.

    Raises:
        InputError: when it cannot be read, or is no table.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be a JSON file of a run ({error}); {mend}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value, as :func:`write_bytes` does."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that whatever ends the process, or the power, leaves the old or the new one.

    Raises:
        InputError: when it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_bytes(content)
            with new.open("rb+") as file:
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def save_network(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a network's tensors, as :func:`write_bytes` does."""
    content = BytesIO()  # a file that cannot take them all makes torch raise what says nothing of it
    torch.save(weights, content)
    write_bytes(path, content.getvalue())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file, and the mend, when the disk is full or something else keeps it from being written."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path}: must be writable, got an error ({why}); make room or mend its permissions, and run it again") from error


def stage(path: Path, make: Callable[[], dict[str, Any]], mend: str = AGAIN) -> dict[str, Any]:
    """A stage's result: from its file, or made and written there, so that a resumed run sees what the first one saw.

    The file has a SHA-256 of the result beside it: no figure comes from a file that was damaged or edited.

    Args:
        path: The file.
        make: Makes the result.
        mend: What to do when the file was altered.

    Raises:
        InputError: when the file is not as it was written.
    """
    if not path.exists():
        made = json.loads(json.dumps(make()))  # as it will be read
        write_json(path, {**made, SEAL: _sha256(made)})
    found: dict[str, Any] = read_json(path, mend)
    seal = found.pop(SEAL, None)
    if seal != _sha256(found):
        raise InputError(f"{path}: must be as the run wrote it, the file was altered ({SEAL} differs); {mend}")
    return found


def _sha256(value: dict[str, Any]) -> str:
    """SHA-256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sha256_data(data: Dataset) -> str:
    """SHA-256 over the arrays of a data set, their types and shapes, its names, and the kind of its targets."""
    said = [] if data.kind == "class" else [data.kind, data.ignore, data.threshold]
    digest = hashlib.sha256(json.dumps([data.class_names, data.group_names, *said]).encode())
    arrays = (data.x, data.y, data.x_test, data.y_test, data.group, data.group_test)
    for array in (array for array in arrays if array is not None):
        digest.update(array_bytes(array))
    return digest.hexdigest()


def array_bytes(array: Array) -> bytes:
    """An array as bytes to hash: its type and shape, then its values."""
    return f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While inside, no other process works in the folder; a process that dies lets go.

    Raises:
        InputError: when another one does, or the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {short(str(folder))} cannot be made ({error.strerror}); choose another folder") from error
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(closing(sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None)))
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise InputError(f"--out: another process works in {folder} ({error}); wait for it, or choose another folder") from error
            mend = "delete it if it is there, and see that the folder can be written"
            raise InputError(f"--out: {folder / LOCK} must be a file to lock, got an error ({error}); {mend}") from error
        yield
