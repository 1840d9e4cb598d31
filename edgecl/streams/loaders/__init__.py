"""Loaders for data sets as their publishers lay them out; each returns a :class:`edgecl.streams.Dataset`, or files of corrupted images.

``docs/streams.md`` describes every layout byte by byte and column by column.
"""

from edgecl.streams.loaders.arrays import load_arrays
from edgecl.streams.loaders.cifar import load_cifar10, load_cifar100
from edgecl.streams.loaders.corrupted import CorruptedFiles, load_corrupted
from edgecl.streams.loaders.idx import load_idx
from edgecl.streams.loaders.wavs import load_wavs
from edgecl.streams.loaders.windows import load_windows

__all__ = [
    "CorruptedFiles",
    "load_arrays",
    "load_cifar10",
    "load_cifar100",
    "load_corrupted",
    "load_idx",
    "load_wavs",
    "load_windows",
]
