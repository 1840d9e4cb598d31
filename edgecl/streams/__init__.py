"""Data sets and the streams that a learner meets."""

from edgecl.streams.dataset import Dataset
from edgecl.streams.downloads import DownloadError, fetch
from edgecl.streams.fashion_mnist import fashion_mnist_subset
from edgecl.streams.loaders import load_cifar10, load_cifar100, load_idx, load_wavs, load_windows
from edgecl.streams.scenarios import ClassIncremental, Sample, Stream

__all__ = [
    "ClassIncremental",
    "Dataset",
    "DownloadError",
    "Sample",
    "Stream",
    "fashion_mnist_subset",
    "fetch",
    "load_cifar10",
    "load_cifar100",
    "load_idx",
    "load_wavs",
    "load_windows",
]
