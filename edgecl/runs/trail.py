"""What a device run has found so far, kept in a file line by line, so that a killed run goes on where it stopped.

The learner's store has every sample that was learned, but not what was predicted before, nor the tests. The trail has those. A
prediction is written before its sample is learned: of all that a kill may leave, only whether the last sample of the trail is in
the store is then open, and the store's count tells. What a power cut or anything else has damaged is not gone on with: every line
must follow from those before it, and have the checksum of what it says.
"""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from edgecl.runs.files import write_bytes, writing

SAMPLE, PREDICTED, LEARNED, TESTED, FOUND = "sample", "predicted", "learned", "tested", "found"
CHECK = "crc32"
"""Key of a line: CRC-32 of the JSON of its entry."""


class Form(Protocol):
    """What a run keeps of predictions and tests: an :class:`edgecl.tally.Tally`."""

    def check_told(self, value: Any) -> None:
        """Raise ValueError for what is kept of no prediction."""

    def check_test(self, value: Any) -> None:
        """Raise ValueError for what is kept of no test."""


def _line(entry: dict[str, Any]) -> str:
    """An entry as a line of the file."""
    return json.dumps({**entry, CHECK: _check(entry)}) + "\n"


def _check(entry: Any) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def _checked(value: Any) -> Any:
    """The entry of a line.

    Raises:
        ValueError: when it has not the checksum of what it says.
    """
    if not isinstance(value, dict) or value.pop(CHECK, None) != _check(value):
        raise ValueError(f"{value!r} has not its checksum")
    return value


class Trail:
    """Predictions, updates and tests of one run over a stream.

    Args:
        path: The file, made when there is none.
        form: What predictions and tests are kept as.

    Attributes:
        predicted: What is kept of the prediction for each sample before it was learned.
        before: Samples that the learner had learned before each prediction.
        learned: By number of the sample: whether its update was ``kept``, wall time, bytes written; a sample whose update the end
            of a process fell on has no entry.
        tests: By samples done: what is kept of the test.
    """

    def __init__(self, path: Path, form: Form) -> None:
        self.path, self.form = path, form
        self.predicted: list[Any] = []
        self.before: list[int] = []
        self.learned: dict[int, dict[str, Any]] = {}
        self.tests: dict[int, Any] = {}
        with writing(path):
            self._whole = self._read()
            self._file = path.open("a", encoding="utf-8")

    def _read(self) -> bool:
        """Take in what the file has; False when a line is not what this class writes, or does not follow from those before it."""
        if not self.path.exists():
            return True
        *lines, _ = self.path.read_bytes().split(b"\n")  # behind the last one is nothing, or what the process ended in
        try:
            for line in lines:
                self._take(_checked(json.loads(line.decode())))
        except (ValueError, RecursionError):
            return False
        return True

    def _take(self, entry: Any) -> None:
        """Take in an entry.

        Raises:
            ValueError: when it does not follow from those before it.
        """
        done = len(self.predicted)
        match entry:
            case {"sample": number, "predicted": told, "before": before} if (number, before) == (done, self._after(done)):
                self.form.check_told(told)
                self.predicted.append(told)
                self.before.append(before)
            case {"learned": number, "kept": False} | {"learned": number, "kept": True, "seconds": float(), "bytes": int()} if (
                number == done - 1 and number not in self.learned
            ):
                self.learned[number] = {key: value for key, value in entry.items() if key != LEARNED}
            case {"tested": int(number), "found": found}:
                self.form.check_test(found)
                self.tests[number] = found
            case _:
                raise ValueError(f"{entry!r} does not follow")

    def add(self, entry: dict[str, Any]) -> None:
        """Take in an entry and write it; when the process is killed afterwards, it is there.

        A power cut may take what was written since the last test, which costs the most to make again.
        """
        self._take(entry)
        with writing(self.path):
            self._file.write(_line(entry))
            self._file.flush()
            if TESTED in entry:
                os.fsync(self._file.fileno())

    def fit(self, learned: int, points: Sequence[int]) -> bool:
        """Drop what the learner's store does not have: its last sample, or more after a power cut.

        Args:
            learned: Samples that the store has.
            points: Samples of the stream that are done at each of its tests, the last one at its end.

        Returns:
            False when the trail is damaged, or lacks samples that the store has: nothing can be resumed from the two.
        """
        done = len(self.predicted)
        if not self._whole or done > points[-1] or any(point not in self.tests for point in points if point < done):
            return False
        while done and done - 1 not in self.learned and self.before[done - 1] >= learned:
            done -= 1  # predicted and not learned
        while done and self._after(done) > learned:
            done -= 1
        if self._after(done) != learned:
            return False
        del self.predicted[done:], self.before[done:]
        self.learned = {n: entry for n, entry in self.learned.items() if n < done}
        self.tests = {n: row for n, row in self.tests.items() if n <= done}
        self._rewrite()
        return True

    def _after(self, done: int) -> int:
        """Samples that the learner has learned after so many of the stream."""
        return self.before[done - 1] + self._kept(done - 1) if done else 0

    def _kept(self, sample: int) -> bool:
        """Whether an update changed the learner, which a refused one and a method that does not learn do not."""
        return bool(self.learned.get(sample, {"kept": True})["kept"])

    def _rewrite(self) -> None:
        entries: list[dict[str, Any]] = []
        for n, (predicted, before) in enumerate(zip(self.predicted, self.before, strict=True)):
            entries.append({SAMPLE: n, PREDICTED: predicted, "before": before})
            if n in self.learned:
                entries.append({LEARNED: n, **self.learned[n]})
        entries += [{TESTED: n, FOUND: row} for n, row in self.tests.items()]
        self._file.close()
        write_bytes(self.path, "".join(map(_line, entries)).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with writing(self.path):  # what could not be written before is tried again
            self._file.close()
