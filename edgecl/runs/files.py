"""Files of a run's folder: each is written whole or not at all, and one process at a time works in it."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecl.streams import Dataset
from edgecl_device.errors import InputError

LOCK = "lock.db"


def read_json(path: Path) -> Any:
    """A file's value.

    Raises:
        InputError: when it cannot be read, or is no table.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be a JSON file of a run ({error}); run it again with --fresh") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value, as :func:`write_bytes` does."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that whatever ends the process, or the power, leaves the old or the new one."""
    _written(path, lambda new: new.write_bytes(content))


def save_network(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a network's tensors, as :func:`write_bytes` does."""
    _written(path, lambda new: torch.save(weights, new))


def _written(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    try:
        write(new)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def stage(path: Path, make: Callable[[], Any], holds: Iterable[str]) -> Any:
    """A stage's result: from its file, or made and written there, so that a resumed run sees what the first one saw.

    Args:
        path: The file.
        make: Makes the result.
        holds: Keys that the result has.

    Raises:
        InputError: when the file is damaged or lacks a key.
    """
    if not path.exists():
        write_json(path, make())
    found = read_json(path)
    check_keys(path, "", found, holds)
    return found


def check_keys(path: Path, where: str, value: Any, holds: Iterable[str]) -> None:
    """Refuse what a run's file has at the place ``where`` when it is no table, or lacks a key."""
    missing = [key for key in holds if not isinstance(value, dict) or key not in value]
    if missing:
        raise InputError(f"{path}: {where}must hold {', '.join(missing)}, the file was altered; run it again with --fresh")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sha256_data(data: Dataset) -> str:
    """SHA-256 over the arrays of a data set, their types and shapes, its names, and the kind of its targets."""
    said = [] if data.kind == "class" else [data.kind, data.ignore, data.threshold]
    digest = hashlib.sha256(json.dumps([data.class_names, data.group_names, *said]).encode())
    arrays = (data.x, data.y, data.x_test, data.y_test, data.group, data.group_test)
    for array in (array for array in arrays if array is not None):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While inside, no other process works in the folder; a process that dies lets go.

    Raises:
        InputError: when another one does, or the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be made ({error.strerror}); choose another folder") from error
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
