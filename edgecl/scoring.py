"""How predictions of several labels, real vectors and maps are scored: sums over samples, and the exact figures of these sums.

Each kind has one main score, higher is better, that curves, forgetting and transfer are of: micro F1, mean R^2, mean IoU. All of them are
figures of a whole set of samples and no means over samples; what they take of each sample adds up.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgecl.metrics import f1_by_label, iou_by_class, mean_present, micro_f1, r_squared, spread

Sums = NDArray[Any]
Parts = dict[str, list[float | None]]


class Scoring(ABC):
    """The scores of one kind of target.

    Args:
        outputs: Labels, values or classes K.
        ignore: Value of a map's pixels that count for nothing, or None.
    """

    least: ClassVar[float] = 0.0
    """The least that the score may be."""
    dtype: ClassVar[type] = np.int64
    """Of the sums."""
    needs: ClassVar[str]
    """What the targets of a set must have for the score to be defined."""

    def __init__(self, outputs: int, ignore: int | None = None) -> None:
        self.outputs, self.ignore = outputs, ignore

    @property
    @abstractmethod
    def width(self) -> int:
        """Sums of one sample W."""

    @abstractmethod
    def sums(self, outcome: Any, target: NDArray[Any]) -> Sums:
        """What one prediction adds [W].

        Args:
            outcome: As :attr:`edgecl_device.Prediction.outcome` has it; None where nothing was predicted.
            target: As in the data set.
        """

    @abstractmethod
    def reference(self, targets: NDArray[Any]) -> NDArray[Any]:
        """What the score of a set takes from its targets [N, ...] alone, [K]."""

    @abstractmethod
    def score(self, sums: Sums, reference: NDArray[Any]) -> float | None:
        """The main score of a set; None where its targets do not define it."""

    @abstractmethod
    def figures(self, sums: Sums, reference: NDArray[Any], samples: int) -> dict[str, float]:
        """Every figure of a set of so many samples, the main score under its own name among them."""

    @abstractmethod
    def parts(self, sums: Sums, reference: NDArray[Any], samples: int) -> Parts:
        """The figures of every label, value or class [K], None where one is not defined."""

    @property
    def nothing(self) -> Any:
        """The prediction of a baseline that knows no target yet."""
        return None


class Overlap(Scoring):
    """Labels and classes of pixels: hits and predictions of each; the reference is how often each is present."""

    def _split(self, sums: Sums) -> tuple[Sums, Sums]:
        return sums[: self.outputs], sums[self.outputs : 2 * self.outputs]


class LabelScoring(Overlap):
    """Several labels a sample: micro F1."""

    needs = "a label that applies"

    @property
    def width(self) -> int:
        """Hits and predictions of each label, and samples that are right in all."""
        return 2 * self.outputs + 1

    def sums(self, outcome: Any, target: NDArray[Any]) -> Sums:
        """From the labels predicted, and zeros and ones [K]."""
        predicted = np.zeros(self.outputs, bool)
        predicted[[] if outcome is None else list(outcome)] = True
        present = target > 0
        return np.array([*(predicted & present), *predicted, (predicted == present).all()], np.int64)

    def reference(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Samples that have each label."""
        present: NDArray[Any] = (targets > 0).sum(0)
        return present

    def score(self, sums: Sums, reference: NDArray[Any]) -> float | None:
        """Micro F1."""
        return micro_f1(*self._split(sums), reference)

    def figures(self, sums: Sums, reference: NDArray[Any], samples: int) -> dict[str, float]:
        """F1 in two ways, and the shares of labels and of samples that are right."""
        hits, predicted = self._split(sums)
        wrong = float((predicted + reference - 2 * hits).sum() / (samples * self.outputs))
        macro = mean_present(f1_by_label(hits, predicted, reference))
        found = {"micro_f1": self.score(sums, reference), "macro_f1": macro, "label_accuracy": 1 - wrong, "hamming_loss": wrong}
        return _known({**found, "exact_match": float(sums[-1] / samples)})

    def parts(self, sums: Sums, reference: NDArray[Any], samples: int) -> Parts:
        """F1 and the share of samples in which the label is right."""
        hits, predicted = self._split(sums)
        right = 1 - (predicted + reference - 2 * hits) / samples
        return {"f1": _listed(f1_by_label(hits, predicted, reference)), "label_accuracy": _listed(right)}


class MapScoring(Overlap):
    """A class for every pixel: mean IoU."""

    needs = "a pixel that counts"

    @property
    def width(self) -> int:
        """Hits and predictions of each class."""
        return 2 * self.outputs

    def sums(self, outcome: Any, target: NDArray[Any]) -> Sums:
        """From the classes predicted and those that are there, [H, W]; pixels that are ignored do not count.

        What is no class, as where a target that is repeated ignores a pixel, predicts none.
        """
        if outcome is None:
            return np.zeros(self.width, np.int64)
        found, truth = self._counted(np.asarray(outcome), target), self._counted(target, target)
        known = (found >= 0) & (found < self.outputs)
        found, truth = found[known], truth[known]
        hits = np.bincount(truth[found == truth], minlength=self.outputs)
        return np.concatenate([hits, np.bincount(found, minlength=self.outputs)])

    def _counted(self, values: NDArray[Any], target: NDArray[Any]) -> NDArray[np.int64]:
        return (values.reshape(-1) if self.ignore is None else values[target != self.ignore]).astype(np.int64)

    def reference(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Pixels of each class."""
        return np.bincount(self._counted(targets, targets), minlength=self.outputs)

    def score(self, sums: Sums, reference: NDArray[Any]) -> float | None:
        """Mean IoU over the classes that are there."""
        return mean_present(iou_by_class(*self._split(sums), reference))

    def figures(self, sums: Sums, reference: NDArray[Any], samples: int) -> dict[str, float]:
        """Mean IoU, and the share of pixels that are right."""
        pixels = reference.sum()
        right = float(self._split(sums)[0].sum() / pixels) if pixels else None
        return _known({"mean_iou": self.score(sums, reference), "pixel_accuracy": right})

    def parts(self, sums: Sums, reference: NDArray[Any], samples: int) -> Parts:
        """IoU."""
        return {"iou": _listed(iou_by_class(*self._split(sums), reference))}


class VectorScoring(Scoring):
    """Real values: mean R^2 over the outputs."""

    least = -np.inf
    dtype = np.float64
    needs = "an output that varies"

    @property
    def width(self) -> int:
        """Squared and absolute error of each output."""
        return 2 * self.outputs

    @property
    def nothing(self) -> Any:
        """Zeros."""
        return np.zeros(self.outputs)

    def sums(self, outcome: Any, target: NDArray[Any]) -> Sums:
        """From the values predicted and the true ones [D]."""
        error = np.asarray(outcome, np.float64) - target
        return np.concatenate([error**2, np.abs(error)])

    def reference(self, targets: NDArray[Any]) -> NDArray[Any]:
        """Sum of squares of each output around its mean."""
        return spread(targets)

    def score(self, sums: Sums, reference: NDArray[Any]) -> float | None:
        """Mean R^2 over the outputs that vary."""
        return mean_present(r_squared(sums[: self.outputs], reference))

    def figures(self, sums: Sums, reference: NDArray[Any], samples: int) -> dict[str, float]:
        """R^2, squared and absolute error, each the mean over the outputs."""
        squared, absolute = sums.reshape(2, -1) / samples
        return _known({"r2": self.score(sums, reference), "mse": float(squared.mean()), "mae": float(absolute.mean())})

    def parts(self, sums: Sums, reference: NDArray[Any], samples: int) -> Parts:
        """The same of each output."""
        squared, absolute = sums.reshape(2, -1) / samples
        return {"r2": _listed(r_squared(sums[: self.outputs], reference)), "mse": _listed(squared), "mae": _listed(absolute)}


SCORINGS: dict[str, type[Scoring]] = {"multilabel": LabelScoring, "vector": VectorScoring, "map": MapScoring}
"""Every kind of target but ``class``, of which each sample is right or wrong."""


def _known(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in found.items() if value is not None}


def _listed(values: NDArray[Any]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
