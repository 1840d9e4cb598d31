"""What a user says about targets, and what that means for a learner: the spec, the names, the arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecl_device.checks import as_float32, as_int, short
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import Array, TargetSpec
from edgecl_device.targets import target_of

MOST_CLASSES = 1 << 20
"""More room than any label space needs; beyond, a state cannot be allocated."""


@dataclass(frozen=True)
class Vector:
    """Real values, as in regression.

    Attributes:
        size: Values of one target, float32 [size].
        names: Their names, or none.

    >>> Vector(3).resolved(None)
    (TargetSpec(kind='vector', shape=(1, 3), dtype='float32', ignore=None, threshold=0.0), 3, ())
    """

    size: int
    names: Sequence[str] = ()

    def resolved(self, scores: tuple[int, ...] | None) -> tuple[TargetSpec, int, tuple[str, ...]]:
        """Spec, number of outputs, and names.

        Args:
            scores: Shape of the model's output for one sample, or None where it does not matter.
        """
        size = room("size", self.size, 1)
        if isinstance(self.names, str):
            raise InputError(f"names: must be a list of strings, got {short(self.names)}; pass [{short(self.names)}]")
        return TargetSpec("vector", (1, size), "float32"), size, tuple(self.names)


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels a sample.

    Attributes:
        labels: Their names, or how many there are; room for later ones included.
        threshold: Probability in (0, 1) above which a label is predicted. For ridge, whose scores are estimates of 0 and 1, the
            estimate.
    """

    labels: Sequence[str] | int
    threshold: float = 0.5

    def resolved(self, scores: tuple[int, ...] | None) -> tuple[TargetSpec, int, tuple[str, ...]]:
        """Spec (its threshold a probability still), number of labels, and names. Arguments as for :meth:`Vector.resolved`."""
        names = () if not isinstance(self.labels, Sequence) or isinstance(self.labels, str) else tuple(self.labels)
        count = room("labels", len(names) if names else self.labels, 1)
        threshold = as_float32("threshold", self.threshold, positive=True)
        if threshold >= 1:
            raise InputError(f"threshold: must be between 0 and 1, got {short(self.threshold)}; 0.5 is usual")
        return TargetSpec("multilabel", (1, count), "float32", threshold=threshold), count, names


@dataclass(frozen=True)
class DenseMap:
    """A class for every pixel, as in segmentation; the model gives scores [1, K, H, W], the target is int64 [H, W].

    Attributes:
        classes: Their names, or how many there are; room for later ones included.
        ignore: Value of the pixels that count for nothing, or None.
    """

    classes: Sequence[str] | int
    ignore: int | None = None

    def resolved(self, scores: tuple[int, ...] | None) -> tuple[TargetSpec, int, tuple[str, ...]]:
        """Spec, number of classes, and names. Arguments as for :meth:`Vector.resolved`."""
        names = () if not isinstance(self.classes, Sequence) or isinstance(self.classes, str) else tuple(self.classes)
        count = room("classes", len(names) if names else self.classes, 2)
        if scores is None or len(scores) != 4:
            got = "a method without the model's head" if scores is None else list(scores)
            raise InputError(f"target: a dense map needs a model that returns scores [1, {count}, H, W], got {got}; give it such a head")
        ignore = None if self.ignore is None else as_int("ignore", self.ignore)
        if not -(1 << 31) <= (ignore or 0) < 1 << 31:
            raise InputError(f"ignore: must fit into 32 bits, got {short(ignore)}; 255 is usual")
        return TargetSpec("map", (1, *scores[2:]), "int64", ignore), count, names


TargetKind = Vector | MultiLabel | DenseMap | str
"""What ``prepare`` takes as ``target``: one of these, or ``class``."""

KIND_OF: dict[type, str] = {Vector: "vector", MultiLabel: "multilabel", DenseMap: "map"}


def kind_of(target: Any) -> str:
    """Name of the kind that a user's ``target`` is of.

    Raises:
        InputError: when it is none.
    """
    kind = "class" if isinstance(target, str) and target == "class" else KIND_OF.get(type(target))
    if kind is None:
        raise InputError(f"target: must be 'class', Vector(size), MultiLabel(labels) or DenseMap(classes), got {short(target)}; pass one")
    return kind


def room(name: str, value: Any, least: int) -> int:
    """A number of classes, labels or values."""
    number = as_int(name, value)
    if not least <= number <= MOST_CLASSES:
        raise InputError(f"{name}: must be an integer of {least} to {MOST_CLASSES:,}, got {number!r}; count the {name} to come, too")
    return number


def target_arrays(y: Any, spec: TargetSpec, classes: int, samples: int) -> list[Array]:
    """Targets of base samples [N, ...] as steps take them, one array [1, ...] a sample.

    Raises:
        InputError: naming the first that does not fit.
    """
    try:
        y = np.asarray(y)
    except ValueError as error:
        raise InputError(f"y: must be {_wanted(spec, samples)}, got rows of several lengths; pass a flat list") from error
    if spec.kind == "class":
        return [np.array([label], np.int64) for label in _classes(y, classes, samples)]
    if y.shape != (samples, *spec.shape[1:]):
        raise InputError(f"y: must be {_wanted(spec, samples)}, got {y.dtype} {list(y.shape)}; reshape it")
    target, found = target_of(spec, classes), []
    for i, value in enumerate(y):
        try:
            found.append(target.array(value, ()))
        except EdgeclError as error:
            raise InputError(f"sample {i}: {error}") from error
    return found


def drawn_target(spec: TargetSpec, classes: int, label: int, generator: np.random.Generator) -> Array:
    """A made-up target: class ``label`` (or several classes, it among them), or random values."""
    if spec.kind == "class":
        return np.array([label], np.int64)
    if spec.kind == "vector":
        return generator.standard_normal(spec.shape).astype(np.float32)
    if spec.kind == "multilabel":
        return generator.integers(0, 2, spec.shape).astype(np.float32)
    drawn = generator.integers(0, classes, spec.shape)
    drawn[:, 0] = label if spec.ignore is None else spec.ignore
    return drawn


def _wanted(spec: TargetSpec, samples: int) -> str:
    if spec.kind == "class":
        return f"integers [{samples}], one label a sample"
    kind = {"vector": "float32", "multilabel": "zeros and ones", "map": "integers"}[spec.kind]
    return f"{kind} [{', '.join(map(str, (samples, *spec.shape[1:])))}]"


def _classes(y: Array, classes: int, samples: int) -> list[int]:
    if y.shape != (samples,) or y.dtype.kind not in "iu":
        raise InputError(f"y: must be integers [{samples}], one label a sample, got {y.dtype} {list(y.shape)}; convert it with astype")
    if not 0 <= y.min() <= y.max() < classes:
        raise InputError(f"y: labels must be in [0, {classes}), got {y.min()} to {y.max()}; prepare with more classes")
    return [int(label) for label in y]
