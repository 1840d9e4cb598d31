"""Samples that are learned already leave the training set, epoch by epoch: for training on the host.

Source: Wang et al., "SparCL: Sparse Continual Learning on the Edge", NeurIPS 2022 (dynamic data removal): in each window of epochs the
samples that were misclassified least often leave. The authors' code counts changes from right to wrong instead; a sample that is never
right then counts as easy. Ties go to the sample that came first.
"""

import numpy as np
from numpy.typing import NDArray

from edgecl.methods._features import require


class Removal:
    """Counts of misclassifications, and the samples that are left.

    Args:
        count: Samples of the training set.
        share: Share of them that leaves over all windows.
        windows: Windows at whose ends samples leave.

    >>> removal = Removal(4, share=0.5, windows=2)
    >>> removal.tell(np.array([0, 1, 2, 3]), np.array([True, False, True, False]))
    >>> removal.close().tolist()
    [1, 2, 3]
    >>> removal.tell(removal.left, np.array([False, True, False]))
    >>> removal.close().tolist()
    [1, 3]
    """

    def __init__(self, count: int, share: float, windows: int) -> None:
        require(0 <= share < 1, "share", "be in [0, 1)", share, "0.3 is the paper's")
        require(windows >= 1, "windows", "be at least 1", windows, "4 is the paper's")
        self.left: NDArray[np.int64] = np.arange(count)
        self._wrong = np.zeros(count, np.int64)
        self._each = int(share * count) // windows
        self._windows = windows

    def tell(self, samples: NDArray[np.int64], right: NDArray[np.bool_]) -> None:
        """Note which samples, by number, were right when they were trained on."""
        np.add.at(self._wrong, samples, ~right)

    def close(self) -> NDArray[np.int64]:
        """End a window: the samples that are left, in rising order. Beyond the last window none leaves."""
        if self._windows:
            self._windows -= 1
            order = np.argsort(self._wrong[self.left], kind="stable")
            self.left = np.sort(self.left[order[self._each :]])
            self._wrong[:] = 0
        return self.left
