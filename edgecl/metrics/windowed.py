"""Windowed forgetting and plasticity: the largest fall and rise of accuracy within a short time."""

from collections import deque
from collections.abc import Iterable

import numpy as np

from edgecl.metrics.trace import AccuracyTrace
from edgecl_device.errors import InputError


def largest_fall(values: Iterable[float], window: int) -> float:
    """Largest ``values[a] - values[b]`` with a before b among the last ``window`` values; 0 when they never fall.

    One pass with a deque of the window's running maximum: O(1) amortised for each value.

    Raises:
        InputError: when ``window`` is below 2.

    >>> largest_fall([0.5, 0.75, 0.5, 0.0], window=2), largest_fall([0.5, 0.75, 0.5, 0.0], window=3)
    (0.5, 0.75)
    """
    if window < 2:
        raise InputError(f"window: must be at least 2 evaluations, got {window}; pass 10")
    largest = 0.0
    highest: deque[tuple[int, float]] = deque()  # values that no later one exceeds, so the first is the window's maximum
    for at, value in enumerate(values):
        if highest and highest[0][0] <= at - window:
            highest.popleft()
        while highest and highest[-1][1] <= value:
            highest.pop()
        highest.append((at, value))
        largest = max(largest, highest[0][1] - value)
    return largest


def largest_rise(values: Iterable[float], window: int) -> float:
    """Largest ``values[b] - values[a]`` with a before b among the last ``window`` values; 0 when they never rise.

    Raises:
        InputError: when ``window`` is below 2.

    >>> largest_rise([0.75, 0.0, 0.5], window=3)
    0.5
    """
    return largest_fall((-value for value in values), window)


def windowed_forgetting(trace: AccuracyTrace, window: int = 10) -> float:
    """WF^w: mean over tasks of the largest fall of accuracy within ``window`` evaluations.

    A task is followed from the last evaluation before its first sample.

    Raises:
        InputError: when ``window`` is below 2.

    Source: De Lange, van de Ven, Tuytelaars, Continual evaluation for lifelong learning: Identifying the stability gap, 2023.

    >>> windowed_forgetting(AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1]))
    0.25
    """
    return float(np.mean([largest_fall(trace.values[trace.start(task) :, task].tolist(), window) for task in range(trace.tasks)]))


def windowed_plasticity(trace: AccuracyTrace, window: int = 10) -> float:
    """WP^w: mean over tasks of the largest rise of accuracy within ``window`` evaluations.

    The authors' code passes over pairs with a shortcut that holds for falls only: of [0.9, 0.1, 0.8] it makes 0 and not 0.7.

    Raises:
        InputError: when ``window`` is below 2.

    Source: De Lange, van de Ven, Tuytelaars, Continual evaluation for lifelong learning: Identifying the stability gap, 2023.

    >>> windowed_plasticity(AccuracyTrace([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]], current=[0, 1, 1]))
    0.625
    """
    return float(np.mean([largest_rise(trace.values[trace.start(task) :, task].tolist(), window) for task in range(trace.tasks)]))
