"""What the main score of each kind of target is called in run.json, tables and reports, and how it is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A figure of one kind of target that the table of learners shows.

    Attributes:
        key: In ``run.json``.
        heading: Its column's.
        meaning: In words.
    """

    key: str
    heading: str
    meaning: str


@dataclass(frozen=True)
class Shown:
    """How results of one kind of target are shown.

    Attributes:
        key: Of the main score in ``run.json``.
        word: What it is called.
        meaning: What it is, behind its name in a sentence.
        shares: Whether its figures are shares, shown in percent.
        figures: Others that the table of learners shows.
    """

    key: str
    word: str
    meaning: str
    shares: bool
    figures: tuple[Figure, ...] = ()

    @property
    def factor(self) -> int:
        """What axes multiply the score by."""
        return 100 if self.shares else 1

    @property
    def unit(self) -> str:
        """Of the score; empty where it has none."""
        return "%" if self.shares else ""

    @property
    def axis(self) -> str:
        """The score with its unit.

        >>> KINDS["map"].axis, KINDS["vector"].axis
        ('mean IoU, %', 'R²')
        """
        return f"{self.word}, {self.unit}" if self.unit else self.word

    @property
    def titled(self) -> str:
        """The score at the start of a heading."""
        return self.word[0].upper() + self.word[1:]

    def text(self, value: float | None, deviation: float | None = None) -> str:
        """A figure, with its standard deviation.

        >>> KINDS["class"].text(0.876), KINDS["vector"].text(0.876, 0.01), KINDS["vector"].text(None)
        ('87.6', '0.876±0.010', '-')
        """
        if value is None:
            return "-"
        places = 1 if self.shares else 3 if abs(value) < 100 else 0
        return f"{self.factor * value:z,.{places}f}" + ("" if deviation is None else f"±{self.factor * deviation:,.{places}f}")

    def cell(self, row: Mapping[str, Any], key: str) -> str:
        """A figure of a row of ``run.json``."""
        return self.text(row.get(key), row.get(f"{key}_sd"))

    def points(self, difference: float, spread: str = "") -> str:
        """A difference of two scores: percentage points, or the plain number.

        >>> KINDS["class"].points(0.021), KINDS["vector"].points(0.021)
        ('2.1 points', '0.021')
        """
        return f"{self.text(difference)}{spread}" + (" points" if self.shares else "")


KINDS = {
    "class": Shown("accuracy", "accuracy", "of every sample's class", True),
    "multilabel": Shown(
        "score",
        "micro F1",
        "over all labels of all samples",
        True,
        (
            Figure("macro_f1", "macro F1", "mean of each label's F1 over the labels that some test sample has"),
            Figure("mean_average_precision", "mAP", "mean average precision: how well the scores put a label's samples before the others"),
            Figure(
                "label_accuracy", "labels right", "share of all labels of all samples, applying or not, that are right: 1 - Hamming loss"
            ),
        ),
    ),
    "vector": Shown(
        "score",
        "R²",
        "mean over the outputs; 1 is perfect, 0 what always predicting the mean gives",
        False,
        (
            Figure("mse", "MSE", "mean squared error, mean over the outputs"),
            Figure("mae", "MAE", "mean absolute error, mean over the outputs"),
        ),
    ),
    "map": Shown(
        "score",
        "mean IoU",
        "over the classes that the test maps have",
        True,
        (Figure("pixel_accuracy", "pixels right", "share of the test pixels that are right; ignored ones do not count"),),
    ),
}
"""Every kind of target."""


def kind_of(result: Mapping[str, Any]) -> str:
    """Kind of a run's targets."""
    return str(result["data"].get("kind", "class"))


def shown_of(result: Mapping[str, Any]) -> Shown:
    """How a ``run.json`` is shown; one that says no kind is of one class a sample, as all were before."""
    return KINDS[kind_of(result)]
