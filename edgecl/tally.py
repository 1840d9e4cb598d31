"""What a run keeps of its predictions and tests, as values for a file, and the result that they add up to.

Of one class a sample it keeps the class predicted and, of every test, which samples were right. Of other targets it keeps the sums of
their scoring (:mod:`edgecl.scoring`): of each prediction, and of each task at every test.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl.metrics import AccuracyTrace, Prequential, mean_average_precision
from edgecl.scoring import LabelScoring, Scoring
from edgecl.stream_result import Flags, StreamResult, Tests
from edgecl.streams import Stream
from edgecl.streams.stream import Sample
from edgecl_device import Learner, Prediction
from edgecl_device.checks import best_class
from edgecl_device.errors import InputError

WINDOW = 100
"""Last samples of the windowed prequential score."""


@dataclass(frozen=True)
class Course:
    """What a run has done, apart from predictions and tests.

    Attributes:
        samples: Stream samples learned before each evaluation.
        current: Task of the last of them; that before the stream's first at the start.
        seconds: Wall time of each update.
        written: Bytes that each update wrote.
        initial: Score on every task before the base set, where known.
    """

    samples: list[int]
    current: list[int]
    seconds: list[float]
    written: list[int]
    initial: Sequence[float] | None = None


class Tally(ABC):
    """The tests and predictions of one run over a stream.

    Args:
        stream: The scenario.
        tests: As :func:`edgecl.evaluate.evaluation_set` gives them.
    """

    def __init__(self, stream: Stream, tests: Tests) -> None:
        self.stream, self.tests = stream, tests

    @abstractmethod
    def told(self, outcome: Any, sample: Sample) -> Any:
        """What is kept of the prediction of a stream sample, before it was learned."""

    @abstractmethod
    def outcome(self, seen: Prediction, sample: Sample) -> Any:
        """What a prediction says, as :meth:`told` takes it."""

    @abstractmethod
    def test(self, learner: Learner) -> Any:
        """What is kept of one test on all test samples."""

    @abstractmethod
    def check_told(self, value: Any) -> None:
        """Refuse what :meth:`told` cannot have given.

        Raises:
            ValueError: when that is so.
        """

    @abstractmethod
    def check_test(self, value: Any) -> None:
        """Refuse what :meth:`test` cannot have given.

        Raises:
            ValueError: when that is so.
        """

    @abstractmethod
    def result(self, told: Sequence[Any], tested: Sequence[Any], course: Course) -> StreamResult:
        """The result of a whole run.

        Args:
            told: Of every stream sample.
            tested: Of every evaluation.
            course: The rest.
        """

    def _result(self, values: NDArray[np.float64], least: float, course: Course, **found: Any) -> StreamResult:
        start = values[0].tolist() if course.current[0] < 0 and course.initial is None else course.initial
        return StreamResult(
            trace=AccuracyTrace(values, course.current, least),
            samples=course.samples,
            update_seconds=course.seconds,
            update_bytes=course.written,
            sizes=[len(y) for _, y in self.tests],
            initial=None if start is None else list(start),
            **found,
        )


class ClassTally(Tally):
    """One class a sample."""

    def told(self, outcome: Any, sample: Sample) -> int | None:
        """The class, None when there was none."""
        return None if outcome is None else int(outcome)

    def outcome(self, seen: Prediction, sample: Sample) -> int | None:
        """The class, of those to choose from."""
        return among(seen, self.stream.choices(sample.task))

    def test(self, learner: Learner) -> str:
        """Which test samples were right, packed."""
        return pack(right_of(learner, self.stream, self.tests))

    def check_told(self, value: Any) -> None:
        """A whole number or None."""
        if not isinstance(value, int | None):
            raise ValueError(f"{value!r} is no class")

    def check_test(self, value: Any) -> None:
        """Flags of all test samples."""
        self._flags(value)

    def _flags(self, value: Any) -> Flags:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no text")
        return unpack(value, sum(len(y) for _, y in self.tests))

    def result(self, told: Sequence[Any], tested: Sequence[Any], course: Course) -> StreamResult:
        """Accuracies."""
        prequential = Prequential(WINDOW)
        for sample, predicted in zip(self.stream, told, strict=True):
            prequential.update(sample.y, predicted)
        flags = np.stack([self._flags(value) for value in tested])
        ends = np.cumsum([len(y) for _, y in self.tests])
        values = np.stack([part.mean(1) for part in np.split(flags, ends[:-1], axis=1)], axis=1)
        return self._result(
            values,
            0.0,
            course,
            right=flags,
            met=[float(row[: ends[max(task, 0)]].mean()) for row, task in zip(flags, course.current, strict=True)],
            prequential=prequential.accuracy,
            prequential_windowed=prequential.windowed,
            last_label=prequential.last_label,
            majority=prequential.majority,
        )


class SumTally(Tally):
    """Targets of another kind.

    Args:
        stream: As of :class:`Tally`.
        tests: As there.
        scoring: Of the kind.

    Raises:
        InputError: when the targets of a task's tests do not define the score.
    """

    def __init__(self, stream: Stream, tests: Tests, scoring: Scoring) -> None:
        super().__init__(stream, tests)
        self.scoring = scoring
        self._references = [scoring.reference(y) for _, y in tests]
        zero: NDArray[Any] = np.zeros(scoring.width, scoring.dtype)
        undefined = [task for task, reference in enumerate(self._references) if scoring.score(zero, reference) is None]
        if undefined:
            raise InputError(f"stream: the tests of every task must have {scoring.needs}, got none in {undefined}; test on more samples")

    def told(self, outcome: Any, sample: Sample) -> list[Any]:
        """The sums of the prediction."""
        found: list[Any] = self.scoring.sums(outcome, sample.y).tolist()
        return found

    def outcome(self, seen: Prediction, sample: Sample) -> Any:
        """Values, labels or map."""
        return seen.outcome

    def test(self, learner: Learner) -> dict[str, Any]:
        """The sums of each task; of labels the mean average precision, too, which does not add up."""
        sums, scores = [], []
        for xs, ys in self.tests:
            seen = [learner.predict(x) for x in xs]
            sums.append(np.sum([self.scoring.sums(one.outcome, y) for one, y in zip(seen, ys, strict=True)], 0).tolist())
            scores += [one.scores for one in seen] if isinstance(self.scoring, LabelScoring) else []
        if not scores:
            return {"sums": sums}
        return {"sums": sums, "map": mean_average_precision(np.stack(scores), np.concatenate([y for _, y in self.tests]))}

    def check_told(self, value: Any) -> None:
        """Sums of one sample."""
        self._checked(value, (self.scoring.width,))

    def check_test(self, value: Any) -> None:
        """Sums of each task."""
        precise = ["map"] if isinstance(self.scoring, LabelScoring) else []
        if not isinstance(value, dict) or list(value) != ["sums", *precise] or not all(type(value[key]) is float for key in precise):
            raise ValueError(f"{value!r} is no test")
        self._checked(value["sums"], (len(self.tests), self.scoring.width))

    def _checked(self, value: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        found = np.array(value)  # ValueError where rows differ in length
        ok = found.shape == shape and found.dtype == self.scoring.dtype and np.isfinite(found).all() and (found >= 0).all()
        if not ok:
            raise ValueError(f"{value!r} are no sums")
        return found

    def result(self, told: Sequence[Any], tested: Sequence[Any], course: Course) -> StreamResult:
        """Scores, and every other figure at each evaluation, of all test samples together."""
        score, references = self.scoring.score, self._references
        sums = np.array([value["sums"] for value in tested])  # [evaluations, tasks, W]
        whole = self.scoring.reference(np.concatenate([y for _, y in self.tests]))
        count = sum(len(y) for _, y in self.tests)
        met = []
        for row, task in zip(sums, course.current, strict=True):
            targets = np.concatenate([y for _, y in self.tests[: max(task, 0) + 1]])
            met.append(_defined(score(row[: max(task, 0) + 1].sum(0), self.scoring.reference(targets))))
        along = [self.scoring.figures(row.sum(0), whole, count) for row in sums]
        for found, value in zip(along, tested, strict=True):
            found |= {"mean_average_precision": value["map"]} if "map" in value else {}
        values = np.array([[_defined(score(one, ref)) for one, ref in zip(row, references, strict=True)] for row in sums])
        return self._result(
            values,
            self.scoring.least,
            course,
            met=met,
            along={name: [found[name] for found in along] for name in along[0]},
            parts=self.scoring.parts(sums[-1].sum(0), whole, count),
            **self._prequential(np.array(told)),
        )

    def _prequential(self, told: NDArray[Any]) -> dict[str, float | None]:
        """The score of the stream's predictions, of the last of them, and of repeating the previous target."""
        targets = [sample.y for sample in self.stream]
        before = [self.scoring.nothing, *(self._as_outcome(y) for y in targets[:-1])]
        last = np.array([self.scoring.sums(outcome, y) for outcome, y in zip(before, targets, strict=True)])

        def score(sums: NDArray[Any], count: int) -> float | None:
            return self.scoring.score(sums[-count:].sum(0), self.scoring.reference(np.stack(targets[-count:])))

        every = len(targets)
        return {
            "prequential": score(told, every),
            "prequential_windowed": score(told, min(WINDOW, every)),
            "last_label": score(last, every),
            "majority": None,
        }

    def _as_outcome(self, target: NDArray[Any]) -> Any:
        return np.flatnonzero(target) if isinstance(self.scoring, LabelScoring) else target


def tally_of(stream: Stream, tests: Tests, scoring: Scoring | None) -> Tally:
    """The tally of one class a sample, where ``scoring`` is None, or of another kind of target."""
    return ClassTally(stream, tests) if scoring is None else SumTally(stream, tests, scoring)


def pack(flags: Flags) -> str:
    """Flags as text, four to a digit.

    >>> pack(np.array([True, False, True]))
    'a0'
    """
    return np.packbits(flags).tobytes().hex()


def unpack(text: str, count: int) -> Flags:
    """The ``count`` flags that :func:`pack` made a text of.

    Raises:
        ValueError: when the text is not of so many flags.

    >>> unpack("a0", 3).tolist()
    [True, False, True]
    """
    flags = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
    if pack(flags) != text:  # unpackbits fills up or cuts
        raise ValueError(f"{text!r} is not of {count} flags")
    return flags


def right_of(learner: Learner, stream: Stream, tests: Tests) -> Flags:
    """Whether each test sample is right, bool [test samples], task by task."""
    return np.array(
        [
            among(learner.predict(x), stream.choices(task)) == label
            for task, (xs, ys) in enumerate(tests)
            for x, label in zip(xs, ys, strict=True)
        ]
    )


def among(seen: Prediction, choices: Sequence[int] | None) -> int | None:
    """A prediction's class of those to choose from, all where that is None; None while none of them was learned."""
    if choices is None:
        return seen.label
    best = best_class(seen.scores[list(choices)])
    return None if best is None else choices[best]


def _defined(value: float | None) -> float:
    assert value is not None  # the constructor has checked the targets
    return value
