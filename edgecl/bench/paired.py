"""Paired differences: of two cases on the same seeds, or of two ways to learn on the same tasks."""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student


def paired(mine: Sequence[float], base: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean difference of equally long figures, and its 95 % interval by Student's t; no interval for one pair.

    >>> paired([2.0, 4.0], [1.0, 1.0])
    (2.0, [-10.70..., 14.70...])
    """
    pairs = [a - b for a, b in zip(mine, base, strict=True)]
    mean = statistics.fmean(pairs)
    if len(pairs) == 1:
        return mean, None
    half = float(student.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return mean, [mean - half, mean + half]


def points(ends: Sequence[float] | None) -> str:
    """An interval of shares, as points of percent."""
    return "-" if ends is None else " to ".join(f"{100 * end:+.1f}" for end in ends)
