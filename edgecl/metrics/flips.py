"""Negative flips: what an update breaks that was right before."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgecl_device.errors import InputError


def negative_flips(before: Sequence[bool] | NDArray[np.bool_], after: Sequence[bool] | NDArray[np.bool_]) -> float:
    """Share of samples that were right before and are wrong after: ``1/N sum 1[before right, after wrong]``.

    Accuracy can stay the same while users see errors where there were none.

    Args:
        before: Whether each sample was right before the update, bool [N].
        after: Whether the same sample is right after it, bool [N].

    Raises:
        InputError: when there is no sample, or the shapes differ.

    Source: Yan et al., Positive-Congruent Training: Towards Regression-Free Model Updates, 2021 (negative flip rate).

    >>> negative_flips([True, True, False, False], [True, False, True, False])
    0.25
    """
    old, new = np.asarray(before, np.bool_), np.asarray(after, np.bool_)
    if old.ndim != 1 or old.shape != new.shape or not old.size:
        raise InputError(
            f"before, after: must be bool [samples] of one set, got {list(old.shape)} and {list(new.shape)}; evaluate the same samples"
        )
    return float((old & ~new).mean())
