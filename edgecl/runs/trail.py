"""What a device run has found so far, kept in a file line by line, so that a killed run goes on where it stopped.

The learner's store has every sample that was learned, but not what was predicted before, nor the tests. The trail has those. A
prediction is written before its sample is learned: of all that a kill may leave, only whether the last sample of the trail is in
the store is then open, and the store's count tells.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

PREDICTED, LEARNED, TESTED = "predicted", "learned", "tested"

Flags = NDArray[np.bool_]


def pack(flags: Flags) -> str:
    """Flags as text, four to a digit.

    >>> pack(np.array([True, False, True]))
    'a0'
    """
    return np.packbits(flags).tobytes().hex()


def unpack(text: str, count: int) -> Flags:
    """The first ``count`` flags that :func:`pack` made a text of.

    >>> unpack("a0", 3).tolist()
    [True, False, True]
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


class Trail:
    """Predictions, updates and tests of one run over a stream.

    Args:
        path: The file, made when there is none.

    Attributes:
        predicted: Class predicted for each sample before it was learned, None when there was none.
        before: Samples that the learner had learned before each prediction.
        learned: By number of the sample: whether its update was ``kept``, wall time, bytes written; a sample whose update the end
            of a process fell on has no entry.
        tests: By samples done: which test samples were right, packed (:func:`pack`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.predicted: list[int | None] = []
        self.before: list[int] = []
        self.learned: dict[int, dict[str, Any]] = {}
        self.tests: dict[int, str] = {}
        self._read()
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if not line.endswith("\n"):  # the process ended while it was written
                break
            self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        if PREDICTED in entry:
            self.predicted.append(entry[PREDICTED])
            self.before.append(entry["before"])
        elif LEARNED in entry:
            self.learned[entry[LEARNED]] = {key: value for key, value in entry.items() if key != LEARNED}
        else:
            self.tests[entry[TESTED]] = entry["right"]

    def add(self, entry: dict[str, Any]) -> None:
        """Take in an entry and write it; whatever kills the process afterwards, it is there."""
        self._take(entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def fit(self, learned: int) -> bool:
        """Drop what the learner's store does not have: its last sample, or more after a power cut.

        Args:
            learned: Samples that the store has.

        Returns:
            False when the trail lacks samples that the store has: nothing can be resumed from the two.
        """
        done = len(self.predicted)
        while done and done - 1 not in self.learned and self.before[done - 1] >= learned:
            done -= 1  # predicted and not learned
        while done and self.before[done - 1] + self._kept(done - 1) > learned:
            done -= 1
        kept = self.before[done - 1] + self._kept(done - 1) if done else 0
        if kept != learned:
            return False
        del self.predicted[done:], self.before[done:]
        self.learned = {n: entry for n, entry in self.learned.items() if n < done}
        self.tests = {n: row for n, row in self.tests.items() if n <= done}
        self._rewrite()
        return True

    def _kept(self, sample: int) -> bool:
        """Whether an update changed the learner, which a refused one and a method that does not learn do not."""
        return bool(self.learned.get(sample, {"kept": True})["kept"])

    def _rewrite(self) -> None:
        entries: list[dict[str, Any]] = []
        for n, (predicted, before) in enumerate(zip(self.predicted, self.before, strict=True)):
            entries.append({PREDICTED: predicted, "before": before})
            if n in self.learned:
                entries.append({LEARNED: n, **self.learned[n]})
        entries += [{TESTED: n, "right": row} for n, row in self.tests.items()]
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        self._file.close()
        new.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
