"""CIFAR-10-C, CIFAR-100-C and sets in their layout: one array of images for each corruption, severity by severity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl.streams.corruptions.table import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, check_corruption, check_severity
from edgecl.streams.loaders._files import DAMAGED, folder_of
from edgecl_device.errors import InputError

LABELS = "labels.npy"


@dataclass(frozen=True, eq=False)
class CorruptedFiles:
    """Corrupted test images of a publisher; they stay on disk until they are asked for.

    Attributes:
        folder: Where the files are.
        labels: Label of every test image, int64 [N].
        arrays: Images of every corruption that is there, uint8 [5 N, H, W, 3], severities 1 to 5 one after the other.
    """

    folder: Path
    labels: NDArray[np.int64]
    arrays: dict[str, NDArray[np.uint8]]

    def images(self, corruption: str, severity: int, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Test images [n, H, W, 3] of these indices.

        Raises:
            InputError: when the corruption has no file, the severity is none, or an index is out of range.
        """
        check_corruption("corruption", corruption)
        check_severity("severity", severity)
        if corruption not in self.arrays:
            has = ", ".join(self.arrays)
            raise InputError(f"corruption: must be one of those in {self.folder}, {has}, got {corruption!r}; put {corruption}.npy there")
        count = len(self.labels)
        if index.size and not 0 <= index.min() <= index.max() < count:
            raise InputError(
                f"index: must be in 0..{count - 1}, got {index.min()}..{index.max()}; take the test images that the files have"
            )
        return np.array(self.arrays[corruption][(severity - 1) * count + index])


def load_corrupted(folder: str | Path) -> CorruptedFiles:
    """Open ``labels.npy`` and ``<corruption>.npy``, those that are there.

    A file of images has the severities 1 to 5 in blocks of as many images, each block in the order of the clean test set (10,000 in
    CIFAR-10-C and CIFAR-100-C); ``labels.npy`` has the labels of all blocks. Images are read when they are asked for.

    Args:
        folder: Holds the files, ``CIFAR-10-C`` in the archive.

    Raises:
        InputError: when a file is missing, damaged, of another type or shape, or its blocks differ in their labels.

    Source: Hendrycks & Dietterich, 2019; the data sets' pages, "CIFAR-10-C" and "CIFAR-100-C" on Zenodo.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(Path(folder) / "labels.npy", np.array([3, 8] * 5, np.uint8))
    ...     np.save(Path(folder) / "fog.npy", np.repeat(np.arange(10, dtype=np.uint8), 3072).reshape(10, 32, 32, 3))
    ...     files = load_corrupted(folder)
    ...     files.labels.tolist(), files.images("fog", 5, np.array([1, 0]))[:, 0, 0, 0].tolist()
    ([3, 8], [9, 8])
    """
    place = folder_of(folder)
    labels = _opened(place / LABELS)
    blocks = labels.reshape(SEVERITIES, -1) if labels.ndim == 1 and len(labels) and len(labels) % SEVERITIES == 0 else None
    if blocks is None or labels.dtype.kind not in "iu":
        got = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{place / LABELS}: must be integers, five times as many as test images, got {got}; {DAMAGED}")
    if blocks.min() < 0 or (blocks != blocks[0]).any():
        raise InputError(f"{place / LABELS}: must have the same labels from 0 for each of the five severities, got others; {DAMAGED}")
    present = [name for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS) if (place / f"{name}.npy").exists()]
    if not present:
        raise InputError(f"{place}: must have {CORRUPTIONS[0]}.npy and the like or some of them, got none; unpack the archive there")
    arrays: dict[str, NDArray[np.uint8]] = {}
    for name in present:
        images = arrays[name] = _opened(place / f"{name}.npy")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
            raise InputError(
                f"{place / f'{name}.npy'}: must be uint8 [{len(labels)}, H, W, 3], an image for each label, got {images.dtype}"
                f" {list(images.shape)}; {DAMAGED}"
            )
    return CorruptedFiles(place, np.asarray(blocks[0], np.int64), arrays)


def _opened(path: Path) -> NDArray[Any]:
    """An array that stays on disk."""
    try:
        opened: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: must be there, got no such file; put the publisher's file there under its own name") from error
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: must be an npy file of a plain array, got {error}; {DAMAGED}") from error
    return opened
