"""The device run: a bundle learns a stream on its runtime, and what a killed process left is gone on with."""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from edgecl.runs.trail import FOUND, LEARNED, PREDICTED, SAMPLE, TESTED, Trail
from edgecl.stream_result import StreamResult
from edgecl.streams import Stream
from edgecl.tally import Course, Tally
from edgecl_device import Learner
from edgecl_device.errors import BundleError, InputError, StoreError, StoreFullError, UpdateRefusedError
from edgecl_device.manifest import read_manifest

TRAIL, STORE, BUNDLE = "trail.jsonl", "store.db", "bundle"


@dataclass(frozen=True)
class Plan:
    """When a stream is tested: before it, every so many samples, and after each task.

    Attributes:
        points: Samples done at each test.
        current: Task of the last of them; that before the stream's first at the start.
    """

    points: list[int]
    current: list[int]

    @classmethod
    def of(cls, stream: Stream, every: int) -> "Plan":
        """The tests of a stream."""
        tasks = [sample.task for sample in stream]
        ends = [done for done in range(1, len(tasks)) if tasks[done] != tasks[done - 1]]
        points = sorted({*range(0, len(tasks), every), *ends, len(tasks)})
        return cls(points, [tasks[done - 1] if done else tasks[0] - 1 for done in points])


def device_run(folder: Path, tally: Tally, *, every: int, store: bool, progress: Callable[[int, int], None]) -> tuple[StreamResult, int]:
    """Predict, then learn, one sample at a time, from where the folder's store and trail stopped.

    Args:
        folder: Holds the bundle; store and trail are kept there.
        tally: Of the scenario's stream and its tests.
        every: Samples between two tests.
        store: Whether the learner has a store; without one it starts again.
        progress: Called with samples done and in all.

    Returns:
        What was found, and how many updates were refused. All but times and bytes written is that of a run without a break, to
        the bit.
    """
    stream = tally.stream
    plan = Plan.of(stream, every)
    if not store or not _resumable(folder, tally, plan):
        _start_again(folder)
    with Trail(folder / TRAIL, tally) as trail, _load(folder, store) as learner:
        learns = "learn" in read_manifest(folder / BUNDLE).steps

        def test(done: int) -> None:
            if done in plan.points and done not in trail.tests:
                trail.add({TESTED: done, FOUND: tally.test(learner)})

        for done, sample in enumerate(stream):
            if done < len(trail.predicted):
                continue
            test(done)
            progress(done, len(stream))
            start = perf_counter()
            seen = learner.predict(sample.x)
            told = tally.told(tally.outcome(seen, sample), sample)
            trail.add({SAMPLE: done, PREDICTED: told, "before": learner.report()["learned"]})
            trail.add({LEARNED: done, **_update(learner, seen.sample_id, sample.y, learns, start)})
        test(len(stream))
    updates = [entry for entry in trail.learned.values() if entry["kept"]]
    seconds, written = [entry["seconds"] for entry in updates], [entry["bytes"] for entry in updates]
    course = Course(plan.points, plan.current, seconds, written)
    found = tally.result(trail.predicted, [trail.tests[done] for done in plan.points], course)
    return found, _refused(trail) if learns else 0


def _resumable(folder: Path, tally: Tally, plan: Plan) -> bool:
    """Fit the trail to the store; False when there is nothing to go on with."""
    if not (folder / STORE).exists() or not (folder / TRAIL).exists():
        return False
    with _load(folder, store=True) as learner, Trail(folder / TRAIL, tally) as trail:
        return trail.fit(learner.report()["learned"], plan.points)


def _load(folder: Path, store: bool) -> Learner:
    """The learner of a run's folder; what the run itself has made there it also makes again.

    Raises:
        InputError: when its bundle or its store is damaged, or is not that of this run.
    """
    try:
        return Learner.load(folder / BUNDLE, folder / STORE if store else None)
    except (BundleError, StoreError) as error:
        if isinstance(error, StoreFullError) or isinstance(error.__cause__, sqlite3.OperationalError):  # in use, or may not be written
            raise
        cause = str(error).partition("; ")[0]  # the rest is a mend for who has no run to make it again
        raise InputError(f"{folder}: must be as the run left it, got {cause}; delete that folder, or run it again with --fresh") from error


def _start_again(folder: Path) -> None:
    for path in (folder / TRAIL, *folder.glob(f"{STORE}*")):
        path.unlink(missing_ok=True)


def _update(learner: Learner, sample_id: int, target: Any, learns: bool, start: float) -> dict[str, Any]:
    if not learns:
        return {"kept": False}
    try:
        report = learner.learn(sample_id, target)
    except UpdateRefusedError:
        return {"kept": False}
    return {"kept": True, "seconds": perf_counter() - start, "bytes": report.bytes_written}


def _refused(trail: Trail) -> int:
    return sum(not entry["kept"] for entry in trail.learned.values())
