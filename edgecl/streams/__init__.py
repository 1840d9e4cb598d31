"""Data sets and the streams that a learner meets."""

from edgecl.streams.blurry import Blurry
from edgecl.streams.class_incremental import ClassIncremental, TaskIncremental
from edgecl.streams.corrupted import Corrupted
from edgecl.streams.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from edgecl.streams.dataset import Dataset
from edgecl.streams.domain_incremental import DomainIncremental
from edgecl.streams.downloads import DownloadError, fetch
from edgecl.streams.fashion_mnist import fashion_mnist_subset
from edgecl.streams.in_time import OneTask, TimeOrdered
from edgecl.streams.loaders import (
    CorruptedFiles,
    load_arrays,
    load_cifar10,
    load_cifar100,
    load_corrupted,
    load_idx,
    load_wavs,
    load_windows,
)
from edgecl.streams.recurring import Recurring
from edgecl.streams.shifts import Stretch
from edgecl.streams.stream import Sample, Stream

__all__ = [
    "CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "Blurry",
    "ClassIncremental",
    "Corrupted",
    "CorruptedFiles",
    "Dataset",
    "DomainIncremental",
    "DownloadError",
    "OneTask",
    "Recurring",
    "Sample",
    "Stream",
    "Stretch",
    "TaskIncremental",
    "TimeOrdered",
    "corrupt",
    "fashion_mnist_subset",
    "fetch",
    "load_arrays",
    "load_cifar10",
    "load_cifar100",
    "load_corrupted",
    "load_idx",
    "load_wavs",
    "load_windows",
]
