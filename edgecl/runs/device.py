"""The device run: a bundle learns a stream on its runtime, and what a killed process left is gone on with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgecl.evaluate import StreamResult, accuracies
from edgecl.metrics import AccuracyMatrix, Prequential
from edgecl.runs.trail import LEARNED, PREDICTED, TESTED, Trail
from edgecl.streams import Stream
from edgecl_device import Learner
from edgecl_device.errors import UpdateRefusedError
from edgecl_device.manifest import read_manifest

TRAIL, STORE, BUNDLE = "trail.jsonl", "store.db", "bundle"

Tests = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


@dataclass(frozen=True)
class Plan:
    """When a stream is tested.

    Attributes:
        samples: In the stream.
        ends: Samples done at the end of each task, the base set's (0) first.
        curve: Samples done at each test along the stream, both ends included.
    """

    samples: int
    ends: tuple[int, ...]
    curve: tuple[int, ...]

    @classmethod
    def of(cls, stream: Stream, every: int) -> "Plan":
        """Test after each task, and every so many samples."""
        tasks = [sample.task for sample in stream]
        ends = [0, *(n for n in range(1, len(tasks)) if tasks[n] != tasks[n - 1]), len(tasks)]
        return cls(len(tasks), tuple(ends), tuple(sorted({*ends, *range(0, len(tasks) + 1, every)})))


def fixed_tests(stream: Stream, most: int | None) -> Tests:
    """Test samples and labels of each task: all, or one fixed random subset of ``most``, the same for every seed."""
    found: Tests = []
    for task in range(stream.tasks):
        x, y = stream.test(task)
        rows = np.sort(np.random.default_rng(task).permutation(len(y))[:most])
        found.append((x[rows], y[rows]))
    return found


def device_run(
    folder: Path, stream: Stream, tests: Tests, *, every: int, store: bool, progress: Callable[[int, int], None]
) -> tuple[StreamResult, int]:
    """Predict, then learn, one sample at a time, from where the folder's store and trail stopped.

    Args:
        folder: Holds the bundle; store and trail are kept there.
        stream: The scenario.
        tests: As :func:`fixed_tests` gives them.
        every: Samples between two tests.
        store: Whether the learner has a store; without one it starts again.
        progress: Called with samples done and in all.

    Returns:
        What was found, and how many updates were refused. All but times and bytes written is that of a run without a break, to
        the bit.
    """
    plan = Plan.of(stream, every)
    learns = "learn" in read_manifest(folder / BUNDLE).steps
    if not store or not _resumable(folder):
        _start_again(folder)
    with Trail(folder / TRAIL) as trail, Learner.load(folder / BUNDLE, folder / STORE if store else None) as learner:
        for done, sample in enumerate(stream):
            if done < len(trail.predicted):
                continue
            _test(trail, learner, tests, plan, done)
            progress(done, plan.samples)
            start = perf_counter()
            seen = learner.predict(sample.x)
            trail.add({PREDICTED: seen.label, "before": learner.report()["learned"]})
            trail.add({LEARNED: done, **_update(learner, seen.sample_id, sample.y, learns, start)})
        _test(trail, learner, tests, plan, plan.samples)
    return _result(trail, plan, tests, [sample.y for sample in stream]), _refused(trail) if learns else 0


def _resumable(folder: Path) -> bool:
    """Fit the trail to the store; False when there is nothing to go on with."""
    if not (folder / STORE).exists() or not (folder / TRAIL).exists():
        return False
    with Learner.load(folder / BUNDLE, folder / STORE) as learner, Trail(folder / TRAIL) as trail:
        return trail.fit(learner.report()["learned"])


def _start_again(folder: Path) -> None:
    for path in (folder / TRAIL, *folder.glob(f"{STORE}*")):
        path.unlink(missing_ok=True)


def _update(learner: Learner, sample_id: int, label: int, learns: bool, start: float) -> dict[str, Any]:
    if not learns:
        return {"kept": False}
    try:
        report = learner.learn(sample_id, label)
    except UpdateRefusedError:
        return {"kept": False}
    return {"kept": True, "seconds": perf_counter() - start, "bytes": report.bytes_written}


def _test(trail: Trail, learner: Learner, tests: Tests, plan: Plan, done: int) -> None:
    if done in plan.curve and done not in trail.tests:
        trail.add({TESTED: done, "accuracy": accuracies(learner, tests)})


def _refused(trail: Trail) -> int:
    return sum(not entry["kept"] for entry in trail.learned.values())


def _result(trail: Trail, plan: Plan, tests: Tests, labels: Sequence[int]) -> StreamResult:
    prequential = Prequential()
    for label, predicted in zip(labels, trail.predicted, strict=True):
        prequential.update(label, predicted)
    updates = [entry for entry in trail.learned.values() if entry["kept"]]
    last, sizes = trail.tests[plan.samples], np.array([len(y) for _, y in tests])
    curve = [trail.tests[done] for done in plan.curve]
    return StreamResult(
        AccuracyMatrix.from_rows([trail.tests[done] for done in plan.ends]),
        float(np.dot(last, sizes) / sizes.sum()),
        prequential.accuracy,
        prequential.last_label,
        {"samples": list(plan.curve), "tasks": [list(task) for task in zip(*curve, strict=True)]},
        [entry["seconds"] for entry in updates],
        [entry["bytes"] for entry in updates],
    )
