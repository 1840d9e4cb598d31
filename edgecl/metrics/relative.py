"""Accuracy relative to a learner that had everything at once."""

from collections.abc import Sequence

import numpy as np

from edgecl_device.errors import InputError


def omega_all(accuracies: Sequence[float], offline: Sequence[float]) -> float:
    """Mean ratio to an offline learner: ``1/T sum_t alpha[t] / alpha_offline[t]``; above 1 when it is beaten.

    Args:
        accuracies: Accuracy on the classes seen so far, after every task [T].
        offline: The same of a learner trained offline on all samples up to then, with the same trunk [T].

    Raises:
        InputError: when there is none, the lengths differ, or an offline accuracy is 0.

    Source: Kemker et al., Measuring Catastrophic Forgetting in Neural Networks, 2018; Hayes et al., REMIND, 2020.

    >>> omega_all([0.75, 0.25], offline=[0.75, 0.5])
    0.75
    """
    ours, theirs = np.asarray(accuracies, np.float64), np.asarray(offline, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or not ours.size or not (theirs > 0).all():
        raise InputError(
            f"offline: must have an accuracy above 0 for each of {len(ours)} tasks, got {list(offline)}; evaluate it after the same tasks"
        )
    return float((ours / theirs).mean())
