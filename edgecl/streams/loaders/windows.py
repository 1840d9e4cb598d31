"""Windows of sensor channels, from an npz archive or a csv table."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from edgecl.streams.dataset import Dataset
from edgecl.streams.loaders._files import DAMAGED, index
from edgecl.streams.loaders._npz import names_of, read_npz
from edgecl_device.checks import as_path
from edgecl_device.errors import InputError

REQUIRED = ("x", "y", "x_test", "y_test")
OPTIONAL = ("class_names", "group", "group_test", "group_names")
KEYS = ("window", "label", "split")
"""Columns that a table must have; ``group`` may be there, all others are channels."""
SPLITS = ("train", "test")
LARGEST = float(np.finfo(np.float32).max)


def load_windows(path: str | Path) -> Dataset:
    r"""Load windows of equal length: C channels, T time steps.

    An ``.npz`` file holds ``x`` float32 [N, C, T], ``y`` int64 [N], ``x_test`` and ``y_test``; if wanted ``class_names``
    (text [K]), and ``group``, ``group_test`` (int64) with ``group_names`` (text). Names are the numbers by default.

    A ``.csv`` file (UTF-8, a header, commas) has one row a time step. Columns ``window``, ``label`` and ``split`` (``train``
    or ``test``) must be there, ``group`` may be; every other column is a channel, in order. The rows of a window follow each
    other and agree in label, split and group. Labels and groups are any text; their order is by value when all are whole
    numbers, else by text.

    Returns:
        Windows float32 [N, C, T] in the file's order, labels, and groups where the file has them.

    Raises:
        InputError: when the file is missing or damaged, lacks an array or a column, a window differs in length, or a value is
            not finite.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "motion.csv"
    ...     rows = "a,walk,ann,train,0.1,9.8", "a,walk,ann,train,0.2,9.7", "b,run,bob,test,3,8", "b,run,bob,test,4,7"
    ...     _ = path.write_text("\n".join(["window,label,group,split,x,y", *rows]))
    ...     data = load_windows(path)
    >>> data.x.shape, data.class_names, data.y, data.group_names
    ((1, 2, 2), ('run', 'walk'), array([1]), ('ann', 'bob'))
    """
    place = as_path("path", path)
    if place.suffix not in {".npz", ".csv"}:
        raise InputError(f"path: must end in .npz or .csv, got {str(path)!r}; give such a file")
    if not place.is_file():
        raise InputError(f"{place}: must be there, got no such file; give the path of an .npz or .csv file")
    return _from_npz(place) if place.suffix == ".npz" else _from_csv(place)


def _from_npz(path: Path) -> Dataset:
    arrays = read_npz(path, REQUIRED, OPTIONAL)
    for name in ("x", "x_test"):
        x = arrays[name]
        if x.dtype != np.float32 or x.ndim != 3 or 0 in x.shape[1:]:
            raise InputError(f"{path}: {name} must be float32 [windows, channels, steps], got {x.dtype} {list(x.shape)}; convert it")
        if (wrong := np.argwhere(~np.isfinite(x))).size:
            at = wrong[0].tolist()
            raise InputError(f"{path}: {name} must be finite, got {x[tuple(at)]} at [window, channel, step] {at}; fill or drop it")
    groups = [arrays[name] for name in ("group", "group_test") if name in arrays]
    try:
        return Dataset(
            arrays["x"],
            arrays["y"],
            arrays["x_test"],
            arrays["y_test"],
            class_names=names_of(arrays, "class_names", [arrays["y"], arrays["y_test"]]),
            group=arrays.get("group"),
            group_test=arrays.get("group_test"),
            group_names=names_of(arrays, "group_names", groups),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@dataclass
class _Window:
    """One window of a table: its name, what its rows must agree in, and the rows so far."""

    name: str
    facts: tuple[str, ...]
    line: int
    rows: list[list[float]] = field(default_factory=list)


def _from_csv(path: Path) -> Dataset:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            windows = list(_windows(path, file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: must be a table with commas in UTF-8, got {error}; save it so") from error
    if not windows:
        raise InputError(f"{path}: must have at least one row under its header, got none; {DAMAGED}")
    steps = len(windows[0].rows)
    for window in windows:
        if len(window.rows) != steps:
            raise InputError(
                f"{path}: line {window.line}: every window must have {steps} rows as the first one, got {len(window.rows)} in"
                f" {window.name!r}; cut or pad it"
            )
    x = np.array([window.rows for window in windows], np.float32).transpose(0, 2, 1)
    columns = list(zip(*(window.facts for window in windows), strict=True))
    y, class_names = index(columns[0])
    test = np.array([split == "test" for split in columns[1]])
    parts = np.ascontiguousarray(x[~test]), y[~test], np.ascontiguousarray(x[test]), y[test], class_names
    if len(columns) == 2:
        return Dataset(*parts)
    group, group_names = index(columns[2])
    return Dataset(*parts, group[~test], group[test], group_names)


def _windows(path: Path, file: TextIO) -> Iterator[_Window]:
    """The windows of a table in order; facts are label, split and, where the table has it, group."""
    reader = csv.reader(file, strict=True)
    header = next(reader, [])
    if any(name not in header for name in KEYS) or len(set(header)) != len(header) or "" in header:
        raise InputError(f"{path}: line 1: must name the columns {', '.join(KEYS)} and the channels, each once, got {header}; mend it")
    keys = [header.index(name) for name in (*KEYS, *(["group"] if "group" in header else []))]
    channels = [i for i in range(len(header)) if i not in keys]
    if not channels:
        raise InputError(f"{path}: line 1: must name at least one channel beside {header}, got none; add its column")
    seen: set[str] = set()
    window: _Window | None = None
    for row in reader:
        place = f"{path}: line {reader.line_num}"
        if len(row) != len(header):
            raise InputError(f"{place}: must have {len(header)} values as the header, got {len(row)}; {DAMAGED}")
        name, *facts = (row[i] for i in keys)
        if window is None or window.name != name:
            if window is not None:
                yield window
            if name in seen:
                raise InputError(f"{place}: the rows of a window must follow each other, got {name!r} again; sort the table by window")
            if facts[1] not in SPLITS:
                raise InputError(f"{place}: split must be train or test, got {facts[1]!r}; write one of them")
            if "" in facts:
                raise InputError(f"{place}: label and group must be names, got {facts[::2]}; fill in the empty one")
            seen.add(name)
            window = _Window(name, tuple(facts), reader.line_num)
        if window.facts != tuple(facts):
            raise InputError(f"{place}: the rows of window {name!r} must agree, got {facts} after {list(window.facts)}; name windows apart")
        window.rows.append([_number(place, header[i], row[i]) for i in channels])
    if window is not None:
        yield window


def _number(place: str, column: str, text: str) -> float:
    try:
        value = float(text if text.isascii() and "_" not in text else "nan")  # Python takes 1_5 for 15, and digits of any script
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        raise InputError(f"{place}: {column} must be a finite float32, got {text!r}; fill or drop it")
    return value
