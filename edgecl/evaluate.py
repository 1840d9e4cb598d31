"""Run a device learner over a stream: predict, then learn, one sample at a time; test on one fixed set along the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl import metrics
from edgecl.metrics import AccuracyMatrix, AccuracyTrace, Prequential
from edgecl.streams import Stream
from edgecl_device import Learner, Prediction
from edgecl_device.checks import best_class
from edgecl_device.errors import InputError

Tests = list[tuple[NDArray[Any], NDArray[np.int64]]]
"""Test samples [M, ...] and labels [M] of every task."""


@dataclass
class StreamResult:
    """What a run over a stream found; accuracies are fractions.

    Attributes:
        trace: Test accuracy on every task at every evaluation: before the stream, every so many samples, and after each task.
        right: Whether each test sample was right at each evaluation, bool [evaluations, test samples], task by task.
        samples: Stream samples learned before each evaluation.
        prequential: Share of stream samples predicted right before they were learned.
        prequential_windowed: The same over the last 100 samples.
        last_label: The same over all samples for a baseline that repeats the previous label.
        majority: The same for a baseline that repeats the most frequent of the last 100 labels.
        update_seconds: Wall time of each update, the trunk included.
        update_bytes: Bytes that each update wrote to the store; zeros without one.
        sizes: Test samples of every task.
        initial: Accuracy on every task of the learner at its initialisation, before its base set; None when not known.
    """

    trace: AccuracyTrace
    right: NDArray[np.bool_]
    samples: list[int]
    prequential: float
    prequential_windowed: float
    last_label: float
    majority: float
    update_seconds: list[float]
    update_bytes: list[int]
    sizes: list[int]
    initial: list[float] | None

    @property
    def matrix(self) -> AccuracyMatrix:
        """Test accuracy R[i, j] on task j after task i."""
        return self.trace.matrix

    @property
    def accuracy(self) -> float:
        """Share of all test samples that are right at the end; samples count the same, not tasks."""
        return float(self.right[-1].mean())

    @property
    def curve(self) -> dict[str, list[Any]]:
        """Test accuracy along the stream: ``samples`` seen, ``tasks`` (one list of accuracies a task)."""
        return {"samples": self.samples, "tasks": self.trace.values.T.tolist()}

    @property
    def seen_accuracy(self) -> list[float]:
        """Share of the test samples of all tasks met so far that are right, after each task."""
        ends, upto = self.matrix.values * self.sizes, np.cumsum(self.sizes)
        return [float(row[: task + 1].sum() / upto[task]) for task, row in enumerate(ends)]


def run_stream(
    learner: Learner,
    stream: Stream,
    *,
    every: int = 50,
    learns: bool = True,
    per_task: int | None = None,
    seed: int = 0,
    initial: Sequence[float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> StreamResult:
    """Drive a learner through a stream.

    It is tested before the stream, every ``every`` samples, and after each task, always on the same samples. Where the stream
    says which classes a task has (:class:`~edgecl.streams.TaskIncremental`), a prediction is the highest score among them.

    Args:
        learner: On any engine.
        stream: The scenario; its base set must have been taken in before.
        every: Samples between two tests.
        learns: False for a method without a ``learn`` step, which only predicts.
        per_task: Test samples of each task, drawn once; None for all. A test costs one prediction for each.
        seed: Of that draw; tasks with the same test set get the same samples.
        initial: Accuracy on every task of the learner before its base set [T], for forward transfer; measured here when there
            is no base set.
        progress: Called with the samples done.

    Raises:
        InputError: when the stream is empty, a task has no test sample, ``every`` or ``per_task`` is below 1.
    """
    if not len(stream):
        raise InputError("stream: must have at least one sample, got none")
    if every < 1:
        raise InputError(f"every: must be at least 1 sample, got {every}; pass 50")
    tests = evaluation_set(stream, per_task, seed)
    samples: list[int] = []
    current: list[int] = []
    right: list[NDArray[np.bool_]] = []

    def test(done: int, task: int) -> None:
        samples.append(done)
        current.append(task)
        right.append(right_of(learner, stream, tests))

    task = next(iter(stream)).task - 1
    test(0, task)
    prequential, seconds, written = Prequential(), [], []
    for done, sample in enumerate(stream, start=1):
        if sample.task != task and samples[-1] != done - 1:
            test(done - 1, task)
        task, choices = sample.task, stream.choices(sample.task)
        predicted = None if learns and choices is None else predict_among(learner, sample.x, choices)
        if learns:
            report = learner.learn(sample.x, sample.y)
            predicted = report.predicted if choices is None else predicted
            seconds.append(report.seconds)
            written.append(report.bytes_written)
        prequential.update(sample.y, predicted)
        if done % every == 0 or done == len(stream):
            test(done, task)
        if progress is not None:
            progress(done)
    return result_of(tests, samples, current, right, prequential, seconds, written, initial)


def result_of(
    tests: Tests,
    samples: list[int],
    current: list[int],
    right: Sequence[NDArray[np.bool_]],
    prequential: Prequential,
    seconds: list[float],
    written: list[int],
    initial: Sequence[float] | None = None,
) -> StreamResult:
    """A run's result from what its evaluations and updates gave.

    Args:
        tests: The samples of every evaluation.
        samples: Stream samples learned before each evaluation.
        current: Task of the last of them; that before the stream's first at the start.
        right: Whether each test sample was right at each evaluation, bool [test samples], task by task.
        prequential: Of all samples.
        seconds: Wall time of each update.
        written: Bytes that each update wrote.
        initial: As in :func:`run_stream`.
    """
    sizes = [len(y) for _, y in tests]
    flags = np.stack(right)
    values = np.stack([part.mean(1) for part in np.split(flags, np.cumsum(sizes)[:-1], axis=1)], axis=1)
    start = values[0].tolist() if current[0] < 0 and initial is None else initial
    return StreamResult(
        trace=AccuracyTrace(values, current),
        right=flags,
        samples=samples,
        prequential=prequential.accuracy,
        prequential_windowed=prequential.windowed,
        last_label=prequential.last_label,
        majority=prequential.majority,
        update_seconds=seconds,
        update_bytes=written,
        sizes=sizes,
        initial=None if start is None else list(start),
    )


def evaluation_set(stream: Stream, per_task: int | None = None, seed: int = 0) -> Tests:
    """The test samples that every evaluation of a run uses, at most ``per_task`` of each task, in the data set's order.

    Raises:
        InputError: when a task has no test sample, or ``per_task`` is below 1.
    """
    if per_task is not None and per_task < 1:
        raise InputError(f"per_task: must be at least 1 test sample, got {per_task}; pass None for all")
    tests = [stream.test(task) for task in range(stream.tasks)]
    empty = [task for task, (_, y) in enumerate(tests) if not len(y)]
    if empty:
        raise InputError(f"stream: every task must have a test sample, got none in {empty}; leave those classes or groups out")
    if per_task is None:
        return tests
    chosen = [np.sort(np.random.default_rng(seed).permutation(len(y))[:per_task]) for _, y in tests]
    return [(x[rows], y[rows]) for (x, y), rows in zip(tests, chosen, strict=True)]


def figures(result: StreamResult, *, offline: Sequence[float] | None = None, window: int = 10, beta: int = 10) -> dict[str, float]:
    """Every metric of a run by name; ``docs/metrics.md`` has the formulas.

    Left out is what the run does not define: figures of two tasks on one task, ``forward_transfer`` without initial accuracies,
    ``omega_all`` without ``offline`` or where one of its accuracies is 0, ``learning_curve_area`` when a task has fewer than ``beta``
    evaluations.

    Args:
        result: Of :func:`run_stream`.
        offline: Accuracy on the classes seen after each task of a learner trained offline on all samples up to then [T].
        window: Evaluations within which the windowed figures look for a fall or rise.
        beta: Evaluations of a task that its learning curve takes in.

    Raises:
        InputError: when ``offline``, ``window`` or ``beta`` does not fit.
    """
    trace, matrix = result.trace, result.matrix
    found = {
        "accuracy": result.accuracy,
        "prequential": result.prequential,
        "prequential_windowed": result.prequential_windowed,
        "last_label": result.last_label,
        "majority": result.majority,
        "average_accuracy": metrics.average_accuracy(matrix),
        "average_incremental_accuracy": metrics.average_incremental_accuracy(matrix),
        "average_anytime_accuracy": metrics.average_anytime_accuracy(trace),
        f"windowed_forgetting_{window}": metrics.windowed_forgetting(trace, window),
        f"windowed_plasticity_{window}": metrics.windowed_plasticity(trace, window),
        "negative_flips": metrics.negative_flips(result.right[0], result.right[-1]),
        "negative_flips_between_evaluations": float(
            np.mean([metrics.negative_flips(a, b) for a, b in zip(result.right[:-1], result.right[1:], strict=True)])
        ),
    }
    if offline is not None and 0 not in offline:
        found["omega_all"] = metrics.omega_all(result.seen_accuracy, offline)
    if metrics.evaluations_per_task(trace) >= beta:
        for variant in metrics.LEARNING_CURVE_VARIANTS:
            found[f"learning_curve_area_{beta}_{variant}"] = metrics.learning_curve_area(trace, beta, variant)
    if trace.tasks > 1:
        found |= _transfer(result)
    return found


def _transfer(result: StreamResult) -> dict[str, float]:
    """What takes two tasks."""
    trace, matrix = result.trace, result.matrix
    found = {
        "backward_transfer": metrics.backward_transfer(matrix),
        "forward_transfer_raw": metrics.forward_transfer_raw(matrix),
        **{f"forgetting_{variant}": metrics.forgetting(matrix, variant) for variant in metrics.FORGETTING_VARIANTS},
        "minimum_accuracy": metrics.minimum_accuracy(trace),
        "worst_case_accuracy": metrics.worst_case_accuracy(trace),
        "stability_gap": metrics.stability_gap(trace),
    }
    if result.initial is not None:
        found["forward_transfer"] = metrics.forward_transfer(matrix, result.initial)
    return found


def right_of(learner: Learner, stream: Stream, tests: Tests) -> NDArray[np.bool_]:
    """Whether each test sample is right, bool [test samples], task by task."""
    return np.array(
        [
            predict_among(learner, x, stream.choices(task)) == label
            for task, (xs, ys) in enumerate(tests)
            for x, label in zip(xs, ys, strict=True)
        ]
    )


def predict_among(learner: Learner, x: NDArray[Any], choices: Sequence[int] | None) -> int | None:
    """The class predicted, of those to choose from; None while none of them was learned."""
    return among(learner.predict(x), choices)


def among(seen: Prediction, choices: Sequence[int] | None) -> int | None:
    """A prediction's class of those to choose from, all where that is None; None while none of them was learned."""
    if choices is None:
        return seen.label
    best = best_class(seen.scores[list(choices)])
    return None if best is None else choices[best]
