"""Prequential accuracy: predict each sample, then learn from it."""

from collections import Counter, deque

from edgecl_device.errors import InputError


class Prequential:
    """Running accuracy of predictions made before learning, beside two baselines that look at no input.

    A stream whose labels come in runs flatters any learner: repeating the previous label scores well there. A method has
    learned something only where it beats both baselines. The first sample has no previous label; both get it wrong.

    Args:
        window: Samples in the windowed accuracy, and labels in the majority baseline.

    Raises:
        InputError: when ``window`` is below 1.

    Source: Gama et al., On Evaluating Stream Learning Algorithms, 2013; Zliobaite et al., Evaluation Methods and
    Decision Theory for Classification of Streaming Data with Temporal Dependence, 2015 (the no-change baseline).

    >>> running = Prequential(window=2)
    >>> for label, predicted in [(0, 0), (0, 1), (1, 1), (1, 1)]:
    ...     running.update(label, predicted)
    >>> running.accuracy, running.windowed, running.last_label, running.majority
    (0.75, 1.0, 0.5, 0.5)
    """

    def __init__(self, window: int = 100) -> None:
        if window < 1:
            raise InputError(f"window: must be at least 1, got {window}")
        self.window = window
        self.samples = 0
        self._hits = Counter[str]()
        self._recent: deque[tuple[int, bool]] = deque()

    def update(self, label: int, predicted: int | None) -> None:
        """Count one sample, after its prediction (None, wrong in any case, while there is no class to predict) and before the next."""
        self.samples += 1
        self._hits["learner"] += label == predicted
        if self._recent:
            self._hits["last"] += label == self._recent[-1][0]
            self._hits["majority"] += label == self._majority()
        self._recent.append((label, label == predicted))
        if len(self._recent) > self.window:
            self._recent.popleft()

    def _majority(self) -> int:
        # most_common keeps the order of insertion among equals, so the most recent label wins a tie.
        return Counter(label for label, _ in reversed(self._recent)).most_common(1)[0][0]

    @property
    def accuracy(self) -> float:
        """Share of right predictions, 0 to 1, over all samples."""
        return self._share("learner")

    @property
    def windowed(self) -> float:
        """Share of right predictions over the last ``window`` samples, or all when there are fewer."""
        self._need_samples()
        return sum(hit for _, hit in self._recent) / len(self._recent)

    @property
    def last_label(self) -> float:
        """What always predicting the previous label would have scored over all samples."""
        return self._share("last")

    @property
    def majority(self) -> float:
        """What always predicting the majority of the last ``window`` labels (ties: the most recent) would have scored."""
        return self._share("majority")

    def _share(self, who: str) -> float:
        self._need_samples()
        return self._hits[who] / self.samples

    def _need_samples(self) -> None:
        if not self.samples:
            raise InputError("samples: must be at least 1, got 0; call update first")
