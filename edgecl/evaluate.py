"""Run a device learner over a stream: predict, then learn, one sample at a time; test on one fixed set along the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgecl.metrics import AccuracyMatrix, Prequential
from edgecl.streams import Stream
from edgecl_device import Learner
from edgecl_device.errors import InputError


@dataclass
class StreamResult:
    """What a run over a stream found; accuracies are fractions.

    Attributes:
        matrix: Test accuracy R[i, j] on task j after task i; task 0 is the base set.
        accuracy: Share of all test images that are right at the end; images count the same, not tasks.
        prequential: Share of stream samples predicted right before they were learned.
        last_label: The same for a baseline that repeats the previous label.
        curve: Test accuracy along the stream: ``samples`` seen, ``tasks`` (one list of accuracies a task).
        update_seconds: Wall time of each update, the trunk included.
        update_bytes: Bytes that each update wrote to the store; zeros without one.
    """

    matrix: AccuracyMatrix
    accuracy: float
    prequential: float
    last_label: float
    curve: dict[str, list[Any]] = field(default_factory=dict)
    update_seconds: list[float] = field(default_factory=list)
    update_bytes: list[int] = field(default_factory=list)


def run_stream(
    learner: Learner, stream: Stream, *, every: int = 50, learns: bool = True, progress: Callable[[int], None] | None = None
) -> StreamResult:
    """Drive a learner through a stream.

    Args:
        learner: On any engine.
        stream: The scenario; its base set must have been taken in before.
        every: Samples between two tests.
        learns: False for a method without a ``learn`` step, which only predicts.
        progress: Called with the samples done.

    Raises:
        InputError: when the stream is empty.
    """
    if not len(stream):
        raise InputError("stream: must have at least one sample, got none")
    tests = [stream.test(task) for task in range(stream.tasks)]
    rows = [accuracies(learner, tests)]
    samples, curve = [0], [list(rows[0])]
    prequential, seconds, written, previous = Prequential(), [], [], 1
    for done, sample in enumerate(stream, start=1):
        if sample.task != previous:
            rows.append(accuracies(learner, tests))
            previous = sample.task
        if learns:
            report = learner.learn(sample.x, sample.y)
            prequential.update(sample.y, report.predicted)
            seconds.append(report.seconds)
            written.append(report.bytes_written)
        else:
            prequential.update(sample.y, learner.predict(sample.x).label)
        if done % every == 0 or done == len(stream):
            samples.append(done)
            curve.append(accuracies(learner, tests))
        if progress is not None:
            progress(done)
    rows.append(curve[-1])
    sizes = np.array([len(y) for _, y in tests])
    return StreamResult(
        AccuracyMatrix.from_rows(rows),
        float(np.dot(rows[-1], sizes) / sizes.sum()),
        prequential.accuracy,
        prequential.last_label,
        {"samples": samples, "tasks": [list(task) for task in zip(*curve, strict=True)]},
        seconds,
        written,
    )


def accuracies(learner: Learner, tests: Sequence[tuple[Any, Any]]) -> list[float]:
    """Test accuracy on each task, from its samples and labels."""
    return [float(np.mean([learner.predict(x).label == label for x, label in zip(xs, ys, strict=True)])) for xs, ys in tests]
