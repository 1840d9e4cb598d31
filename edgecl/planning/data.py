"""The samples that a plan is measured on: a validation part of the training data, never the test data."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from edgecl.streams import Dataset
from edgecl_device.errors import InputError

SHARE = 0.25
"""Share of the samples in use that is held out."""


def validation_split(data: Dataset, samples: int, seed: int = 0) -> Dataset:
    """A data set whose test samples are held-out training samples; the test samples of ``data`` are not looked at.

    Args:
        data: Its training samples are divided, class by class in equal shares.
        samples: Most held-out samples are a quarter of these.
        seed: Of the draw.

    Returns:
        All other training samples, in their order, and the held-out ones.

    Raises:
        InputError: when a class has fewer than two samples.

    >>> x, y = np.zeros((20, 2), np.float32), np.arange(20) % 2
    >>> part = validation_split(Dataset(x, y, x[:0], y[:0], ("a", "b")), samples=100)
    >>> len(part.y), part.y_test
    (16, array([1, 0, 0, 1]))
    """
    counts = np.bincount(data.y)
    lonely = np.flatnonzero(counts == 1).tolist()
    if lonely or not len(data.y):
        raise InputError(f"data: every class must have at least 2 samples, one to learn and one to test on, got classes {lonely} with one")
    held = drawn(data.y, min(samples, len(data.y)) * SHARE / len(data.y), seed)
    rest = np.setdiff1d(np.arange(len(data.y)), held)
    group_test = None if data.group is None else data.group[held]
    return dataclasses.replace(_chosen(data, rest), x_test=data.x[held], y_test=data.y[held], group_test=group_test)


def drawn(y: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Rows of a share of each class, at least one, in their order."""
    generator = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(y):
        mine = generator.permutation(np.flatnonzero(y == label))
        chosen.append(mine[: max(1, int(share * len(mine)))])
    return np.sort(np.concatenate(chosen))


def thinned(data: Dataset, samples: int) -> Dataset:
    """At most about so many training samples, in equal shares of every class; all held-out ones."""
    if samples >= len(data.y):
        return data
    return _chosen(data, drawn(data.y, max(samples, 0) / len(data.y), 0))


def _chosen(data: Dataset, rows: NDArray[np.int64]) -> Dataset:
    """Some of the training samples, all test samples."""
    return dataclasses.replace(data, x=data.x[rows], y=data.y[rows], group=None if data.group is None else data.group[rows])


def rows_of(data: Dataset, share: float, seed: int = 0) -> Dataset:
    """The same data set with row numbers for samples, the held-out ones behind the others; of the others a share is kept."""
    kept = np.arange(len(data.y)) if share >= 1 else drawn(data.y, share, seed)
    held = np.arange(len(data.y), len(data.y) + len(data.y_test))
    return dataclasses.replace(_chosen(data, kept), x=kept, x_test=held)
