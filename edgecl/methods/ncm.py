"""Nearest class mean: the smallest method, and the baseline beside every other.

Each class keeps the running mean of its features; a sample belongs to the nearest mean.

    c <- c + w        m_y <- m_y + (w / c) (x - m_y)        score_k = -|x - m_k|^2

Source: Mensink, Verbeek, Perronnin, Csurka, "Distance-based image classification: generalizing to new classes at
near-zero cost", TPAMI 2013, the NCM classifier with the identity as its metric. Deviations: the mean is kept online (Welford's form); a
sample may have a weight; ``forget`` takes one sample out again by the same formula with a negative weight.

| | bytes of state | MACs of predict | MACs of learn | MACs of forget |
|---|---|---|---|---|
| K classes, d features | 4 (K d + 2 K) | K d | K d, the prediction; the mean itself takes d elementwise | 0; d elementwise |
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.graph.phases import phase
from edgecl.learner import Learner, State, StepResult, mask_unseen, one_hot
from edgecl.methods._features import check_types, row_products, vector

LEAST_SHARE = 1e-2
"""Share of a class's weight that must remain after a ``forget``: below it float32 has lost more than a hundredth of its precision."""


class NearestMean(Learner):
    """Nearest class mean by Euclidean distance.

    State: ``mean`` float32 [K, d]; ``count`` float32 [K], samples by class; ``total`` float32 [K], sum of their weights.

    >>> from edgecl.learner import Problem
    >>> from edgecl_device.manifest import TensorSpec
    >>> learner = NearestMean(Problem(TensorSpec("z", (1, 2), "float32"), max_classes=3))
    >>> state = learner.init()
    >>> for row, label in [([3.0, 0.0], 0), ([0.0, 5.0], 2)]:
    ...     _, new = learner.learn(state, torch.tensor([row]), torch.tensor([label]), torch.ones(1))
    ...     state |= new
    >>> learner.predict(state, torch.tensor([[1.0, 9.0]]))[0]["scores"].argmax().item()
    2
    """

    name = "ncm"
    summary = "nearest class mean; forgets exactly"

    @dataclass(frozen=True)
    class Config:
        """Hyperparameters.

        Attributes:
            unit_norm: Divide every feature vector by its length first.
        """

        unit_norm: bool = True

        def __post_init__(self) -> None:
            check_types(self)

    def init(self) -> State:
        """No class seen."""
        classes = self.problem.max_classes
        return {
            "mean": torch.zeros(classes, self.problem.feature_size),
            "count": torch.zeros(classes),
            "total": torch.zeros(classes),
        }

    def predict(self, state: State, z: Any) -> StepResult:
        """Negative squared distances to the means, float32 [1, K]."""
        return {"scores": self._scores(state, self._vector(z))}, {}

    def learn(self, state: State, z: Any, target: Tensor, weight: Tensor) -> StepResult:
        """Move the class's mean towards the sample.

        ``loss`` [] is the squared distance to the class's mean before the update (to zero for a new class). ``guard``
        refuses a weight that leaves the class without positive weight.
        """
        with phase("forward"):
            x = self._vector(z)
            scores = self._scores(state, x)
        outputs, new_state = self._update(state, x, target, weight, 1.0)
        return {"scores": scores, **outputs}, new_state

    def forget(self, state: State, z: Any, target: Tensor, weight: Tensor) -> StepResult:
        """Take a learned sample out again; ``weight`` is the one it was learned with.

        ``loss`` as for ``learn``. ``guard`` refuses when the class has no sample, or when the samples that remain hold no more than
        :data:`LEAST_SHARE` of the class's weight: their mean would be a small difference of large numbers. A class that loses its last
        sample is as new.
        """
        return self._update(state, self._vector(z), target, weight * -1.0, -1.0)

    def _vector(self, z: Any) -> Tensor:
        return vector(z, self.config.unit_norm)

    def _scores(self, state: State, x: Tensor) -> Tensor:
        # Differences first: the expanded form 2 x.m - |m|^2 - |x|^2 cancels when the features have a large common part.
        difference = x - state["mean"]
        return mask_unseen(row_products(difference, difference) * -1.0, state["count"])

    def _update(self, state: State, x: Tensor, target: Tensor, weight: Tensor, samples: float) -> StepResult:
        """Add ``samples`` (1 or -1) of ``weight`` [1], which has the same sign."""
        chosen = one_hot(target, self.problem.max_classes)
        mean = state["mean"].index_select(0, target)
        count = state["count"].index_select(0, target) + samples
        total = state["total"].index_select(0, target) + weight
        difference = x - mean
        # An emptied class starts again from exact zeros: the rounding of its sum of weights must not scale the next one.
        share = torch.where(total > 0, weight / total, 0.0)
        row = torch.where(count.unsqueeze(1) > 0, mean + difference * share.unsqueeze(1), 0.0)
        left = torch.where(count > 0, total, 0.0)
        mask = chosen.reshape(-1) > 0
        outputs = {
            "loss": (difference * difference).sum(),
            "guard": (torch.where(count > 0, total - LEAST_SHARE * (total - weight), count + 1.0) > 0).reshape(()),
        }
        return outputs, {
            "mean": torch.where(mask.unsqueeze(1), row, state["mean"]),
            "count": state["count"] + chosen.reshape(-1) * samples,
            "total": torch.where(mask, left, state["total"]),
        }
