"""A data set in memory with its targets, its samples grouped where someone or some time stands behind them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl.given import check_names
from edgecl.scoring import SCORINGS, Scoring
from edgecl.streams.kinds import KINDS, check_targets
from edgecl.targets import DenseMap, MultiLabel, TargetKind, Vector
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples with their targets.

    Attributes:
        x: Training samples, any dtype [N, ...].
        y: Their targets: class indices int64 [N]; of other kinds zeros and ones [N, K] (any integers or bool), values float32 [N, D], or
            classes of pixels [N, H, W] (any integers).
        x_test: Test samples [M, ...].
        y_test: Their targets, as ``y``.
        class_names: Name of every class, label or value; class indices index it.
        group: Speaker, user, place or time slice of every training sample, an index into ``group_names``, int64 [N]; or None.
        group_test: The same of every test sample, int64 [M].
        group_names: Name of every group.
        kind: Of the targets: ``class``, ``multilabel``, ``vector`` or ``map``.
        ignore: Value of a map's pixels that count for nothing, or None.
        threshold: Probability above which a label is predicted, see :class:`edgecl.MultiLabel`.

    Raises:
        InputError: when lengths, dtypes, labels or groups do not fit together, or a name is empty or there twice.

    >>> x, y = np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1])
    >>> who = np.array([0, 0, 1, 1])
    >>> Dataset(x, y, x[:2], y[:2], ("walk", "run"), group=who, group_test=who[:2], group_names=("ann", "bob")).group_names[1]
    'bob'
    """

    x: NDArray[Any]
    y: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    class_names: tuple[str, ...]
    group: NDArray[np.int64] | None = None
    group_test: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    kind: str = "class"
    ignore: int | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind: must be one of {', '.join(KINDS)}, got {self.kind!r}; name one of them")
        if self.ignore is not None and self.kind != "map":
            raise InputError(f"ignore: is for targets of kind map, got {self.ignore} for {self.kind}; leave it out")
        check_names("class_names", self.class_names, len(self.class_names))
        check_names("group_names", self.group_names, len(self.group_names))
        for name, x, y in (("y", self.x, self.y), ("y_test", self.x_test, self.y_test)):
            if self.kind == "class":
                _check_indices(name, "label", y, len(x), self.class_names, "class names")
            else:
                check_targets(name, y, len(x), self.kind, len(self.class_names), self.ignore)
        if self.y.shape[1:] != self.y_test.shape[1:]:
            raise InputError(f"y_test: must be of shape {list(self.y.shape[1:])} as in y, got {list(self.y_test.shape[1:])}; resize it")
        if (self.group is None) != (self.group_test is None) or (self.group is None) != (not self.group_names):
            values = {"group": self.group, "group_test": self.group_test, "group_names": self.group_names or None}
            given = [name for name, value in values.items() if value is not None]
            raise InputError(f"group, group_test, group_names: must be given together, got {' and '.join(given)}; give all three")
        for name, x, group in (("group", self.x, self.group), ("group_test", self.x_test, self.group_test)):
            if group is not None:
                _check_indices(name, "group", group, len(x), self.group_names, "group names")
        if self.x.shape[1:] != self.x_test.shape[1:] or self.x.dtype != self.x_test.dtype:
            raise InputError(
                f"x_test: samples must be {self.x.dtype} {list(self.x.shape[1:])} as in x,"
                f" got {self.x_test.dtype} {list(self.x_test.shape[1:])}"
            )

    @property
    def target(self) -> TargetKind:
        """The targets as :func:`edgecl.prepare` takes them."""
        if self.kind == "vector":
            return Vector(len(self.class_names), self.class_names)
        if self.kind == "multilabel":
            return MultiLabel(self.class_names, self.threshold)
        return "class" if self.kind == "class" else DenseMap(self.class_names, self.ignore)

    def scoring(self) -> Scoring | None:
        """How predictions are scored; None for one class a sample, which is right or wrong."""
        return None if self.kind == "class" else SCORINGS[self.kind](len(self.class_names), self.ignore)


def _check_indices(name: str, what: str, values: NDArray[Any], count: int, names: tuple[str, ...], mend: str) -> None:
    """Refuse what is not one index into ``names`` for each of ``count`` samples."""
    if values.dtype != np.int64 or values.shape != (count,):
        raise InputError(f"{name}: must be int64 [{count}], one {what} for each sample, got {values.dtype} {list(values.shape)}")
    if values.size and not 0 <= values.min() <= values.max() < len(names):
        raise InputError(f"{name}: {what}s must be in 0..{len(names) - 1}, got {values.min()}..{values.max()}; add {mend}")
