"""What the loaders of npz archives share: reading one whole, and names from it."""

import lzma
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl_device.errors import InputError

Arrays = dict[str, NDArray[Any]]

MOST_NAMES = 1 << 20
"""Names that are made from numbers."""


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str]) -> Arrays:
    """All arrays of an archive.

    Raises:
        InputError: when it cannot be read, lacks an array that it must have, or has one that is unknown.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            stored: dict[str, Any] = dict(file.items())
        if raw := [name for name, value in stored.items() if not isinstance(value, np.ndarray)]:  # bytes without the mark of an array
            raise ValueError(f"no array in {', '.join(raw)}")
    except (OSError, EOFError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        # RuntimeError: damaged flags call a member encrypted, or packed by a method that there is not
        raise InputError(f"{path}: must be an npz archive of plain arrays, got {error}; save it with np.savez, without objects") from error
    missing = [name for name in required if name not in stored]
    unknown = [name for name in stored if name not in {*required, *optional}]
    if missing or unknown:
        raise InputError(
            f"{path}: must hold the arrays {', '.join(required)} and, if wanted, {', '.join(optional)}; it lacks {missing} and has"
            f" {unknown} beside; rename them"
        )
    return stored


def texts(arrays: Arrays, name: str) -> tuple[str, ...]:
    """Names that an archive holds."""
    found = arrays[name]
    if found.dtype.kind != "U" or found.ndim != 1:
        raise InputError(f"{name}: must be text [K], got {found.dtype} {list(found.shape)}; convert it")
    return tuple(str(text) for text in found)


def names_of(arrays: Arrays, name: str, indices: Sequence[NDArray[Any]]) -> tuple[str, ...]:
    """Names from the archive, or the numbers that the indices use; what is no index the data set refuses."""
    if name in arrays:
        return texts(arrays, name)
    largest = max((int(values.max()) for values in indices if values.size and values.dtype == np.int64), default=-1)
    if largest >= MOST_NAMES:
        raise InputError(f"{name}: must be given where an index is above {MOST_NAMES - 1:,}, got {largest:,}; number them from 0")
    return tuple(map(str, range(largest + 1)))
