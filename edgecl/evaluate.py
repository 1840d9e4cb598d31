"""Run a device learner over a stream: predict, then learn, one sample at a time; test on one fixed set along the way."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgecl import metrics
from edgecl.scoring import Scoring
from edgecl.stream_result import StreamResult, Tests
from edgecl.streams import Stream
from edgecl.tally import Course, tally_of
from edgecl_device import Learner
from edgecl_device.errors import InputError

__all__ = ["StreamResult", "Tests", "evaluation_set", "figures", "named", "run_stream"]


def run_stream(
    learner: Learner,
    stream: Stream,
    *,
    every: int = 50,
    learns: bool = True,
    per_task: int | None = None,
    seed: int = 0,
    scoring: Scoring | None = None,
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
        scoring: For other targets than one class a sample, their scoring (:func:`edgecl.streams.Dataset.scoring`).
        initial: Accuracy on every task of the learner before its base set [T], for forward transfer; measured here when there
            is no base set.
        progress: Called with the samples done.

    Raises:
        InputError: when the stream is empty, a task has no test sample, ``every`` or ``per_task`` is below 1, or other targets than one
            class a sample come without ``scoring``.
    """
    if not len(stream):
        raise InputError("stream: must have at least one sample, got none")
    if every < 1:
        raise InputError(f"every: must be at least 1 sample, got {every}; pass 50")
    first = next(iter(stream))
    if scoring is None and np.ndim(first.y):
        raise InputError(f"scoring: must be given for targets of shape {list(np.shape(first.y))}, got None; pass dataset.scoring()")
    tally = tally_of(stream, evaluation_set(stream, per_task, seed), scoring)
    course = Course([], [], [], [], initial)
    told: list[Any] = []
    tested: list[Any] = []

    def test(done: int, task: int) -> None:
        course.samples.append(done)
        course.current.append(task)
        tested.append(tally.test(learner))

    task = first.task - 1
    test(0, task)
    for done, sample in enumerate(stream, start=1):
        if sample.task != task and course.samples[-1] != done - 1:
            test(done - 1, task)
        task, chosen = sample.task, stream.choices(sample.task) is not None
        outcome = tally.outcome(learner.predict(sample.x), sample) if chosen or not learns else None
        if learns:
            report = learner.learn(sample.x, sample.y)
            outcome = outcome if chosen else report.predicted
            course.seconds.append(report.seconds)
            course.written.append(report.bytes_written)
        told.append(tally.told(outcome, sample))
        if done % every == 0 or done == len(stream):
            test(done, task)
        if progress is not None:
            progress(done)
    return tally.result(told, tested, course)


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
        mend = "leave those classes or groups out, take fewer tasks, or hold more samples out"
        raise InputError(f"stream: every task must have a test sample, got none in {empty}; {mend}")
    if per_task is None:
        return tests
    chosen = [np.sort(np.random.default_rng(seed).permutation(len(y))[:per_task]) for _, y in tests]
    return [(x[rows], y[rows]) for (x, y), rows in zip(tests, chosen, strict=True)]


def figures(result: StreamResult, *, offline: Sequence[float] | None = None, window: int = 10, beta: int = 10) -> dict[str, float]:
    """Every metric of a run by name; ``docs/metrics.md`` has the formulas.

    Left out is what the run does not define: figures of two tasks on one task, ``forward_transfer`` without initial accuracies,
    ``omega_all`` without ``offline`` or where one of its accuracies is 0, ``learning_curve_area`` when a task has fewer than ``beta``
    evaluations. Of other targets than classes, figures are called by their score (:func:`named`), and those of their kind at the end
    stand in front.

    Args:
        result: Of :func:`run_stream`.
        offline: Accuracy on the classes seen after each task of a learner trained offline on all samples up to then [T].
        window: Evaluations within which the windowed figures look for a fall or rise.
        beta: Evaluations of a task that its learning curve takes in.

    Raises:
        InputError: when ``offline``, ``window`` or ``beta`` does not fit.
    """
    trace, matrix = result.trace, result.matrix
    found: dict[str, float | None] = {
        "accuracy": result.accuracy,
        "prequential": result.prequential,
        "prequential_windowed": result.prequential_windowed,
        "last_label": result.last_label,
        "majority": result.majority,
        "average_accuracy": metrics.average_accuracy(matrix),
        "average_incremental_accuracy": metrics.average_incremental_accuracy(matrix),
        "average_anytime_accuracy": metrics.average_anytime_accuracy(trace),
        "average_anytime_accuracy_by_sample": float(np.mean(np.array(result.met)[trace.current >= 0])),
        f"windowed_forgetting_{window}": metrics.windowed_forgetting(trace, window),
        f"windowed_plasticity_{window}": metrics.windowed_plasticity(trace, window),
    }
    if offline is not None and 0 not in offline:
        found["omega_all"] = metrics.omega_all(result.seen_accuracy, offline)
    if metrics.evaluations_per_task(trace) >= beta:
        for variant in metrics.LEARNING_CURVE_VARIANTS:
            found[f"learning_curve_area_{beta}_{variant}"] = metrics.learning_curve_area(trace, beta, variant)
    if trace.tasks > 1:
        found |= _transfer(result)
    if result.right is not None:
        pairs = zip(result.right[:-1], result.right[1:], strict=True)
        found["negative_flips"] = metrics.negative_flips(result.right[0], result.right[-1])
        found["negative_flips_between_evaluations"] = float(np.mean([metrics.negative_flips(a, b) for a, b in pairs]))
    ends = {name: values[-1] for name, values in result.along.items()}
    return ends | {named(name, result.right is not None): value for name, value in found.items() if value is not None}


def named(name: str, classes: bool) -> str:
    """What a figure is called: as it is for one class a sample, by its score for other targets.

    >>> named("average_accuracy", True), named("average_accuracy", False)
    ('average_accuracy', 'average_score')
    """
    return name if classes else name.replace("accuracy", "score").replace("last_label", "last_target")


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
