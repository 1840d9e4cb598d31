"""Targets of every kind: what a caller passes, what a step takes, and what a step's scores say."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from edgecl_device.checks import as_int, best_class, check_scores, short
from edgecl_device.errors import InputError
from edgecl_device.manifest import UNSEEN_SCORE, Array, Manifest, TargetSpec

Names = Sequence[str | None]


class Target(ABC):
    """One kind of target.

    Args:
        spec: Its shape and values.
        classes: Classes, labels or values that there is room for.
    """

    def __init__(self, spec: TargetSpec, classes: int) -> None:
        self.spec = spec
        self.classes = classes

    @abstractmethod
    def array(self, y: Any, names: Names) -> Array:
        """What a caller passed, as a step takes it.

        Args:
            y: The target.
            names: Names of the classes or labels, None where one has none.

        Raises:
            InputError: when it does not fit.
        """

    @abstractmethod
    def read(self, scores: Array) -> Any:
        """The prediction in scores [1, K, ...], in the form in which :meth:`told` gives a target.

        Raises:
            PredictionError: when a score is NaN or infinite.
        """

    def told(self, target: Array) -> Any:
        """A target as reports have it: without its batch dimension."""
        return target[0]

    measure: ClassVar[str]
    """Name of what :meth:`measured` gives."""

    @abstractmethod
    def measured(self, found: Any, target: Array) -> float:
        """How good a prediction was, one number a sample: what :meth:`read` found, beside the target as a step takes it."""

    def classes_of(self, target: Array) -> Array:
        """Indices of the classes or labels that a target has, each once: int64 [n]."""
        return np.empty(0, np.int64)

    def _fitting(self, y: Any, kinds: str, what: str, mend: str) -> Array:
        """An array of the target's shape, whose batch dimension may be left out, and of one of NumPy's ``kinds`` of types."""
        sizes = list(self.spec.shape[1:])
        if not isinstance(y, np.ndarray) or isinstance(y, np.ma.MaskedArray) or y.dtype.kind not in kinds:
            got = f"{y.dtype} {list(y.shape)}" if isinstance(y, np.ndarray) else f"{short(y)} of type {type(y).__name__}"
            raise InputError(f"y: must be {what} {sizes}, got {got}; {mend}")
        if y.shape not in (self.spec.shape, self.spec.shape[1:]):
            raise InputError(f"y: shape must be {sizes}, got {list(y.shape)}; reshape it, or export for targets of that shape")
        found: Array = y.reshape(self.spec.shape)
        return found


class ClassTarget(Target):
    """One class index, or a known class's name."""

    measure = "accuracy"

    def array(self, y: Any, names: Names) -> Array:
        """Class index int64 [1]."""
        if isinstance(y, str):
            return np.array([_index(y, names)], np.int64)
        label = as_int("y (a class index, or a class name)", y)
        if not 0 <= label < self.classes:
            raise InputError(f"y: must be in [0, {self.classes}), the bundle's max_classes, got {label}; export with more max_classes")
        return np.array([label], np.int64)

    def read(self, scores: Array) -> int | None:
        """Class of the highest score, None when none was learned yet."""
        return best_class(scores[0])

    def told(self, target: Array) -> int:
        """Its index."""
        return int(target[0])

    def measured(self, found: Any, target: Array) -> float:
        """1 where it is right."""
        return float(found == target[0])

    def classes_of(self, target: Array) -> Array:
        """Its index."""
        return target


class VectorTarget(Target):
    """Real values."""

    measure = "squared_error"

    def array(self, y: Any, names: Names) -> Array:
        """Values float32 [1, D]."""
        given = self._fitting(y, "f", "a numpy array of float32", "convert it with numpy.asarray(y, numpy.float32)")
        with np.errstate(over="ignore"):
            values = np.array(given, np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"y: values must be finite in float32, got {short(given[0].tolist())}; drop or repair this sample")
        return values

    def read(self, scores: Array) -> Array:
        """The values themselves, float32 [D]."""
        check_scores(scores)
        value: Array = scores[0]
        return value

    def measured(self, found: Any, target: Array) -> float:
        """Mean of the squared errors."""
        return float(np.mean((found - target[0].astype(np.float64)) ** 2))  # the square of a float32 may be beyond float32


class MultiLabelTarget(Target):
    """Any number of labels, as zeros and ones or by their names."""

    measure = "label_accuracy"

    def array(self, y: Any, names: Names) -> Array:
        """Zeros and ones float32 [1, K]."""
        if isinstance(y, list | tuple) and all(isinstance(name, str) for name in y):
            chosen = np.zeros(self.spec.shape, np.float32)
            chosen[0, [_index(name, names) for name in y]] = 1
            return chosen
        y = self._fitting(y, "fiub", "zeros and ones", "pass a numpy array, or a list of label names")
        if not ((y == 0) | (y == 1)).all():
            raise InputError(f"y: labels must be 0 or 1, got {short(np.unique(y).tolist())}; pass one value a label, 1 where it applies")
        return np.asarray(y, np.float32)

    def read(self, scores: Array) -> tuple[int, ...]:
        """Labels whose score is above the threshold."""
        check_scores(scores)
        return tuple(np.flatnonzero(scores[0] > np.float32(self.spec.threshold)).tolist())

    def told(self, target: Array) -> tuple[int, ...]:
        """Its labels."""
        return tuple(self.classes_of(target).tolist())

    def measured(self, found: Any, target: Array) -> float:
        """Share of the labels, applying or not, that are right."""
        return 1 - len(set(found) ^ set(self.told(target))) / self.classes

    def classes_of(self, target: Array) -> Array:
        """Labels that are 1."""
        return np.flatnonzero(target[0])


class MapTarget(Target):
    """A class for every pixel, or the value that is ignored."""

    measure = "pixel_accuracy"

    def array(self, y: Any, names: Names) -> Array:
        """Classes int64 [1, H, W]."""
        y = self._fitting(y, "iu", "a numpy array of integers", "convert it with numpy.asarray(y, numpy.int64)")
        wrong = (y < 0) | (y >= self.classes)
        if self.spec.ignore is not None:
            wrong &= y != self.spec.ignore
        if wrong.any():
            found = short(np.unique(y[wrong]).tolist())
            ignored = "" if self.spec.ignore is None else f" or {self.spec.ignore} (ignored)"
            raise InputError(f"y: pixels must be in [0, {self.classes}){ignored}, got {found}; map them, or export with more max_classes")
        return np.asarray(y, np.int64)

    def read(self, scores: Array) -> Array | None:
        """Class of the highest score of every pixel, int64 [H, W]; None when none was learned yet."""
        check_scores(scores)
        learned = (scores != np.float32(UNSEEN_SCORE)).any()
        return np.asarray(scores[0].argmax(0), np.int64) if learned else None

    def measured(self, found: Any, target: Array) -> float:
        """Share of the pixels that count that are right; 0 where none was predicted or none counts."""
        counts = np.ones(target[0].shape, bool) if self.spec.ignore is None else target[0] != self.spec.ignore
        return 0.0 if found is None else float(np.sum((found == target[0]) & counts) / max(1, counts.sum()))

    def classes_of(self, target: Array) -> Array:
        """Classes of its pixels."""
        found = np.unique(target)
        return found if self.spec.ignore is None else np.setdiff1d(found, [self.spec.ignore])


KINDS: dict[str, type[Target]] = {"class": ClassTarget, "vector": VectorTarget, "multilabel": MultiLabelTarget, "map": MapTarget}
"""Every kind by name."""


def target_of(spec: TargetSpec, classes: int) -> Target:
    """The kind of target that a spec describes."""
    return KINDS[spec.kind](spec, classes)


def example_target(manifest: Manifest) -> Any:
    """A target that fits, as a caller passes it: class 0, everywhere in a map, or zeros."""
    zeros = manifest.target.spec("y").zeros()
    return 0 if manifest.target.kind == "class" else zeros


def _index(name: str, names: Names) -> int:
    if name not in names:
        raise InputError(f"y: no class {short(name)}, known are {short([n for n in names if n])}; call add_class first")
    return names.index(name)
