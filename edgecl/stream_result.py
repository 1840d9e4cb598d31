"""What a run over a stream found."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl.metrics import AccuracyMatrix, AccuracyTrace

Flags = NDArray[np.bool_]
Tests = list[tuple[NDArray[Any], NDArray[Any]]]
"""Test samples [M, ...] and targets [M, ...] of every task."""


@dataclass
class StreamResult:
    """What a run over a stream found: accuracies as fractions, or the scores of another kind of target (:mod:`edgecl.scoring`).

    Attributes:
        trace: Test score on every task at every evaluation: before the stream, every so many samples, and after each task.
        met: Score on the test samples of all tasks met so far at each evaluation; of the first task before any is.
        samples: Stream samples learned before each evaluation.
        prequential: Share of stream samples predicted right before they were learned, or the score of these predictions. None, as
            the three that follow, where the stream's targets do not define it.
        prequential_windowed: The same over the last 100 samples.
        last_label: The same over all samples for a baseline that repeats the previous label or target.
        majority: The same for a baseline that repeats the most frequent of the last 100 labels; of classes only.
        update_seconds: Wall time of each update, the trunk included.
        update_bytes: Bytes that each update wrote to the store; zeros without one.
        sizes: Test samples of every task.
        initial: Score on every task of the learner at its initialisation, before its base set; None when not known.
        right: Of classes, whether each test sample was right at each evaluation, bool [evaluations, test samples], task by task; else None.
        along: Of other kinds, every figure at each evaluation, of all test samples together.
        parts: Of other kinds, the figures of every label, value or class at the end.
    """

    trace: AccuracyTrace
    met: list[float]
    samples: list[int]
    prequential: float | None
    prequential_windowed: float | None
    last_label: float | None
    majority: float | None
    update_seconds: list[float]
    update_bytes: list[int]
    sizes: list[int]
    initial: list[float] | None
    right: Flags | None = None
    along: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def matrix(self) -> AccuracyMatrix:
        """Test score R[i, j] on task j after task i."""
        return self.trace.matrix

    @property
    def accuracy(self) -> float:
        """Share of all test samples that are right at the end, samples count the same, not tasks; or the score of all of them."""
        return self.met[-1]

    @property
    def curve(self) -> dict[str, Any]:
        """Test score along the stream: ``samples`` seen, ``tasks`` (one list of scores a task).

        Of other kinds than classes ``met``, too, which does not follow from the tasks' scores, and ``figures``: ``along``.
        """
        found: dict[str, Any] = {"samples": self.samples, "tasks": self.trace.values.T.tolist()}
        return found if self.right is not None else {**found, "met": self.met, "figures": self.along}

    @property
    def seen_accuracy(self) -> list[float]:
        """Score on the test samples of all tasks met so far, after each task."""
        return [self.met[np.flatnonzero(self.trace.current == task)[-1]] for task in range(self.trace.tasks)]
