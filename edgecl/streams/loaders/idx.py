"""MNIST and the sets in its layout (Fashion-MNIST, KMNIST): four idx files."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.dataset import Dataset
from edgecl.streams.loaders._files import DAMAGED, folder_of, read_bytes
from edgecl_device.errors import InputError

UBYTE = 0x08
"""The idx type code of unsigned bytes."""


def load_idx(folder: str | Path, class_names: Sequence[str] | None = None) -> Dataset:
    """Load ``{train,t10k}-images-idx3-ubyte`` and ``{train,t10k}-labels-idx1-ubyte``, as they are or with ``.gz``.

    Where a file lies there in both forms, the unpacked one is read.

    Args:
        folder: Holds the four files.
        class_names: Name of every class; the numbers 0, 1, ... up to the largest label by default.

    Returns:
        Images uint8 [N, H, W] and labels.

    Raises:
        InputError: when a file is missing, damaged, of another type or size, or labels and images differ in number.

    Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database, section "File formats".

    >>> import struct, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for part in ("train", "t10k"):
    ...         images = struct.pack(">4B3i", 0, 0, 8, 3, 1, 2, 2) + bytes([0, 64, 128, 255])
    ...         _ = (Path(folder) / f"{part}-images-idx3-ubyte").write_bytes(images)
    ...         _ = (Path(folder) / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, 1) + bytes([1]))
    ...     data = load_idx(folder)
    >>> data.x.tolist(), data.y.tolist(), data.class_names
    ([[[0, 64], [128, 255]]], [1], ('0', '1'))
    """
    place = folder_of(folder)
    (x, y), (x_test, y_test) = (_pair(place, part) for part in ("train", "t10k"))
    largest = max((int(labels.max()) for labels in (y, y_test) if labels.size), default=-1)
    names = tuple(map(str, range(largest + 1))) if class_names is None else tuple(class_names)
    return Dataset(x, y, x_test, y_test, names)


def _pair(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels of one part."""
    images, labels = (_file(folder, f"{part}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
    x, y = _array(images, 3), _array(labels, 1)
    if len(x) != len(y):
        raise InputError(f"{labels}: must have one label for each image, got {len(y)} for {len(x)} in {images.name}; get both again")
    return x, y.astype(np.int64)


def _file(folder: Path, name: str) -> Path:
    """The unpacked file, or else the packed one, there or not."""
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _array(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of one idx file: 0, 0, type, number of dimensions; each size as a big-endian int32; the bytes."""
    content, start = read_bytes(path), 4 + 4 * dimensions
    magic = bytes([0, 0, UBYTE, dimensions])
    if content[:4] != magic:
        raise InputError(f"{path}: must begin with the bytes {list(magic)}, got {list(content[:4])}; give an idx{dimensions} file of bytes")
    if len(content) < start:
        raise InputError(f"{path}: must have a header of {start} bytes, got {len(content)}; {DAMAGED}")
    sizes = [int(size) for size in np.frombuffer(content, ">i4", dimensions, 4)]
    if min(sizes) < 0 or len(content) != start + math.prod(sizes):
        wanted = f"{start} + {' * '.join(map(str, sizes))} bytes, as its header says"
        raise InputError(f"{path}: must have {wanted}, got {len(content)}; {DAMAGED}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
