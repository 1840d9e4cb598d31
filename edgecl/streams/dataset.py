"""A labelled data set in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples with their labels.

    Attributes:
        x: Training samples, any dtype [N, ...].
        y: Their class indices, int64 [N].
        x_test: Test samples [M, ...].
        y_test: Their class indices, int64 [M].
        class_names: Name of every class; labels index it.

    Raises:
        InputError: when lengths, dtypes or labels do not fit together.
    """

    x: NDArray[Any]
    y: NDArray[np.int64]
    x_test: NDArray[Any]
    y_test: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, x, y in (("y", self.x, self.y), ("y_test", self.x_test, self.y_test)):
            if y.dtype != np.int64 or y.shape != x.shape[:1]:
                raise InputError(f"{name}: must be int64 [{len(x)}], one label for each sample, got {y.dtype} {list(y.shape)}")
            if y.size and not 0 <= y.min() <= y.max() < len(self.class_names):
                raise InputError(f"{name}: labels must be in 0..{len(self.class_names) - 1}, got {y.min()}..{y.max()}; add class names")
        if self.x.shape[1:] != self.x_test.shape[1:] or self.x.dtype != self.x_test.dtype:
            raise InputError(
                f"x_test: samples must be {self.x.dtype} {list(self.x.shape[1:])} as in x,"
                f" got {self.x_test.dtype} {list(self.x_test.shape[1:])}"
            )
