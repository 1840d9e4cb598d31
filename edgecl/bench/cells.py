"""A folder of figures: each is a file of its own, made once, so that a run that was stopped goes on where it was."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import edgecl
import edgecl_device
import edgecl_export
from edgecl.console import Step, silent
from edgecl.figures import machine, threads, versions
from edgecl.given import check_device
from edgecl.runs.files import locked, sha256_file, stage
from edgecl_device.checks import short
from edgecl_device.errors import InputError

START, LABEL, BESIDE = "start.json", "figure", "beside_sha256"
"""File of what all figures depend on; keys of a figure's file: which it is, and SHA-256 of the file beside it."""


@dataclass(frozen=True)
class Cell:
    """A figure that takes time.

    Attributes:
        path: Its file.
        label: What it is, for progress.
        make: Makes it; other processes get it pickled. ``seconds`` is added to what it returns.
        beside: A file that it writes beside, which other figures need.
    """

    path: Path
    label: str
    make: Callable[[], dict[str, Any]]
    beside: Path | None = None

    def read(self) -> dict[str, Any]:
        """The figure: from its file, or made and written there.

        Raises:
            InputError: when the file, or the one beside it, is not as it was written, or that of another figure.
        """
        found = stage(self.path, self._made, f"delete it, and {self.label!r} is made again")
        if (label := found.pop(LABEL, None)) != self.label:
            raise InputError(f"{self.path}: must be the figure {self.label!r}, got {short(label)}; delete it, and it is made again")
        if self.beside is not None and found.pop(BESIDE, None) != (sha256_file(self.beside) if self.beside.is_file() else None):
            raise InputError(
                f"{self.beside}: must be as {self.label!r} wrote it, it is gone or altered; delete {self.path} to make it again"
            )
        return found

    def _made(self) -> dict[str, Any]:
        began = time.perf_counter()
        made = {**self.make(), LABEL: self.label, "seconds": time.perf_counter() - began}
        return made if self.beside is None else {**made, BESIDE: sha256_file(self.beside)}


@contextmanager
def one_setting(
    folder: Path, *packages: str, device: str | None = "cpu", complete: bool = False, **setting: Any
) -> Iterator[dict[str, Any]]:
    """While inside, no other command works in the folder, PyTorch has one thread, and all figures are of one setting.

    They are of one version as well, and of one machine unless ``device`` is None.

    Args:
        folder: Of the figures.
        packages: On which figures depend besides PyTorch, ONNX Runtime and NumPy.
        device: PyTorch's device; None where figures may be of several machines, as none is a time, and say so themselves.
        complete: Whether no figure is missing: then they may be of other versions than these, for they are only read.
        setting: What figures depend on, as values for JSON; how many there are of them is no part of it.

    Yields:
        The setting of the figures with versions, a hash of the code, and the machine if it is one.

    Raises:
        InputError: when the folder's figures are of another setting, version or machine, or one that is not known any more, or PyTorch
            has no such device here.
    """
    if device is not None:
        check_device(device)
        setting["machine"] = machine(device)
    known = {**versions("onnx"), **{name: version(name) for name in packages}, "sources": _sources()}
    start: dict[str, Any] = json.loads(json.dumps({**setting, "versions": known}))  # as it will be read
    with locked(folder), threads(1):
        if not (folder / START).exists() and (some := next(folder.rglob("*.json"), None)) is not None:
            raise InputError(f"--out: {folder} holds {some.name} without {START}, which says of what setting it is; choose an empty folder")
        found = stage(folder / START, lambda: start, "choose another folder")
        here, there = _flat(start), _flat(found)
        apart = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
        if apart and not (complete and all(key.startswith("versions.") for key in apart)):
            other = ", ".join(f"{key} (there {short(there.get(key))}, here {short(here.get(key))})" for key in apart)
            raise InputError(f"--out: {folder} holds figures of other {other}; choose another folder")
        yield found


def fill(cells: Sequence[Cell], jobs: int = 1, progress: Step = silent) -> None:
    """Make the figures that are missing, several at a time, each on one thread.

    Args:
        cells: The figures, none of which needs another; those that are there are read. Other processes get all of them at once, and what
            they share once.
        jobs: Processes. When one fails, or this one is interrupted, the others end; what they had not finished is made by the next run.
        progress: Called with what runs, of several at a time with what was made, how many are done, and how many there are.

    Raises:
        InputError: as a figure does, its label in front.
    """
    missing = [cell for cell in cells if not cell.path.exists()]
    for cell in cells:
        if cell.path.exists():
            _made(cell)  # it is refused before others take their time
    if jobs == 1 or len(missing) < 2:
        for number, cell in enumerate(missing):
            progress(cell.label, number, len(missing))
            _made(cell)
        return
    progress(f"{len(missing)} figures, {jobs} at a time", 0, len(missing))
    # A forked copy of a process in which PyTorch has threads may wait for ever.
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(missing)), _begin, (missing,)) as pool:
        for done, label in enumerate(pool.imap_unordered(_make, range(len(missing))), start=1):
            progress(label, done, len(missing))


_cells: Sequence[Cell] = ()
"""In a process of a pool, the figures."""


def _begin(cells: Sequence[Cell]) -> None:
    """A process of a pool begins: results alone go to stdout, an interrupt is its parent's affair, and it ends with its parent."""
    global _cells
    _cells = cells
    torch.set_num_threads(1)
    sys.stdout = sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make(number: int) -> str:
    _made(_cells[number])
    return _cells[number].label


def _made(cell: Cell) -> None:
    try:
        cell.read()
    except InputError as error:
        raise InputError(f"{cell.label}: {error}") from error


def check_known(parameter: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuse names of lines that there are not.

    Raises:
        InputError: with the names that there are.
    """
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(f"{parameter}: must be some of {sorted(known)}, got {unknown}; leave it empty for all")


def as_file(label: str) -> str:
    """A label as a file's name.

    >>> as_file("TENT, share .1")
    'tent--share--1'
    """
    return "".join(c if c.isalnum() else "-" for c in label.lower()).strip("-")


def _flat(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting with its versions each by itself."""
    rest = {key: value for key, value in setting.items() if key != "versions"}
    return {**rest, **{f"versions.{name}": value for name, value in setting["versions"].items()}}


def _sources() -> str:
    """SHA-256 over the code of all packages: figures of two versions do not mix."""
    digest = hashlib.sha256()
    for package in (edgecl, edgecl_export, edgecl_device):
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
