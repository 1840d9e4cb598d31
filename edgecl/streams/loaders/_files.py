"""What the loaders share: reading files whole, and names as indices."""

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecl_device.checks import as_path
from edgecl_device.errors import InputError

MOST_DIGITS = 18
"""A name of more digits is text."""

DAMAGED = "the file is damaged or cut off; get it again"


def folder_of(folder: str | Path) -> Path:
    """The folder, which must be there."""
    path = as_path("folder", folder)
    if not path.is_dir():
        raise InputError(f"folder: must be a folder, got {str(path)!r}; give the one that holds the data set's files")
    return path


def read_bytes(path: Path) -> bytes:
    """All bytes of a file, unpacked when its name ends in ``.gz``."""
    try:
        packed = path.read_bytes()
        return gzip.decompress(packed) if path.suffix == ".gz" else packed
    except FileNotFoundError as error:
        raise InputError(f"{path}: must be there, got no such file; put the publisher's file there under its own name") from error
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise InputError(f"{path}: must be readable{' gzip' if path.suffix == '.gz' else ''}, got {error}; {DAMAGED}") from error


def index(names: Iterable[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Each name's position among the distinct names in order, by value when all are whole numbers, else by text.

    >>> index(["10", "9", "10"])
    (array([1, 0, 1]), ('9', '10'))
    """
    listed = list(names)
    whole = all(name.isascii() and name.isdigit() and len(name) <= MOST_DIGITS for name in listed)
    distinct = sorted(set(listed), key=lambda name: (int(name) if whole else 0, name))
    position = {name: i for i, name in enumerate(distinct)}
    return np.array([position[name] for name in listed], np.int64), tuple(distinct)
