"""Streaming linear discriminant analysis: class means and one shared covariance, exact at O(d^2) a sample.

The published recursion keeps a covariance Sigma and inverts it before every prediction, O(d^3). With n samples so far,
c_k of class k, means m_k, A = n Sigma and a ridge g0, this file keeps the inverse itself and what predictions need:
P = (A + g0 I)^-1 and V_k = P m_k. One sample x of class y then takes

    D = x - m_y      q = P D      a = n / (n + 1)      s = 1 + a D.q      b = a / s      h_k = V_k . D      r = 1 / (c_y + 1)
    P   <- P - b q q^T      V_k <- V_k - b h_k q      V_y <- V_y + (r / s) q
    m_y <- m_y + r D        c_y <- c_y + 1            n   <- n + 1

    score_k = n (x - m_k / 2) . V_k   [+ log(c_k / n) with ``priors``]

Source: Hayes, Kanan, "Lifelong machine learning with deep streaming linear discriminant analysis", CVPR Workshops 2020
(running means and covariance, linear classifier). Deviations: a fixed ridge g0 on A in place of shrinkage by eps at every
prediction (they coincide at g0 = n eps / (1 - eps), up to one factor common to all scores); classes without a sample are
masked; the first sample of a class sets its mean and leaves the covariance as it is (a = 0), where the published code
takes the deviation from a zero mean; optional log priors. P changes by u u^T with u = q sqrt(b), so it stays symmetric
bit for bit; with ``delay`` several such changes wait and are added up at once (:mod:`edgecl.methods._inverse`). m_k . V_k is no
state of its own: a recursion for it starts from numbers as large as 1 / g0 and never sheds their rounding, whereas errors of P
and V shrink as samples come.

| | bytes of state | MACs of predict | MACs of learn |
|---|---|---|---|
| K classes, d features, float32 | 4 (d^2 + 2 K d + K) | K d | 2 d^2 + 3 K d + d |

float64 takes twice the bytes, but for the counts. ``delay`` = B adds 4 (B d + B + 1) bytes of state; learn then takes
d^2 + 3 K d + 2 B d + d MACs, and refresh B d^2, every B updates.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.graph.phases import phase
from edgecl.learner import Learner, Problem, State, StepResult, mask_unseen, one_hot
from edgecl.methods._features import check_delay, check_types, dtype_of, require, row_products, vector
from edgecl.methods._inverse import Inverse
from edgecl.methods.ridge import require_bytes

LOST = 1e-2
"""Share of the precision of P that one update may lose, as ridge's ``tau``."""


class StreamingLDA(Learner):
    """Streaming linear discriminant analysis.

    State, with the names above: ``precision`` P [d, d], ``mean`` m [K, d], ``readout`` V [K, d], all of
    ``Config.dtype``; ``count`` c float32 [K], whose sum is n.

    >>> from edgecl.learner import Problem
    >>> from edgecl_device.manifest import TensorSpec
    >>> learner = StreamingLDA(Problem(TensorSpec("z", (1, 2), "float32"), max_classes=3), StreamingLDA.Config(g0=1.0))
    >>> state = learner.init()
    >>> for row, label in [([1.0, 0.0], 0), ([0.0, 1.0], 2), ([0.6, 0.8], 2)]:
    ...     _, new = learner.learn(state, torch.tensor([row]), torch.tensor([label]))
    ...     state |= new
    >>> learner.predict(state, torch.tensor([[0.5, 0.9]]))[0]["scores"].argmax().item()
    2
    """

    name = "slda"
    summary = "streaming linear discriminant analysis; one shared covariance"

    @dataclass(frozen=True)
    class Config:
        """Hyperparameters.

        Attributes:
            g0: Ridge on n times the covariance, in units of squared feature length.
            unit_norm: Divide every feature vector by its length first.
            priors: Add the log of each class's share of the samples to its score.
            dtype: ``float32`` or ``float64``, of the state but the counts.
            delay: Updates that wait until the step ``refresh`` takes them into P together, 0 for none: see :mod:`edgecl.methods._inverse`.
                docs/results.md has what that saves.
        """

        g0: float = 0.1
        unit_norm: bool = True
        priors: bool = False
        dtype: str = "float32"
        delay: int = 0

        def __post_init__(self) -> None:
            check_types(self)
            require(0 < self.g0 < math.inf, "g0", "be finite and above 0", self.g0, "0.1 suits unit-norm features")
            dtype_of(self.dtype)
            check_delay(self.delay)

    def __init__(self, problem: Problem, config: Any = None) -> None:
        super().__init__(problem, config)
        self._dtype = dtype_of(self.config.dtype)
        size, classes = problem.feature_size, problem.max_classes
        value = f"{size:,} features and {classes:,} classes"
        require_bytes(size * (size + 2 * classes) * self._dtype.itemsize, "features", value, "cut behind a pooling layer")
        self._inverse = Inverse("precision", size, self.config.delay, self._dtype)

    def init(self) -> State:
        """No sample: P is I / g0."""
        size, classes = self.problem.feature_size, self.problem.max_classes
        return {
            **self._inverse.init(self.config.g0),
            "mean": torch.zeros(classes, size, dtype=self._dtype),
            "readout": torch.zeros(classes, size, dtype=self._dtype),
            "count": torch.zeros(classes),
        }

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, K]: log likelihoods up to one constant common to all classes."""
        return {"scores": self._scores(state, self._vector(z))}, {}

    def learn(self, state: State, z: Any, target: Tensor) -> StepResult:
        """Add a sample.

        ``loss`` [] is n D.q, the squared Mahalanobis distance of the sample to its class's mean before the update (to zero
        for a new class). ``health.s`` [] is s, at least 1 as long as P is positive; ``guard`` is false below 1/2, and where
        s is so large that the update would cancel P's digits (features far from unit length, beside g0).
        """
        with phase("forward"):
            x = self._vector(z)
            scores = self._scores(state, x)
        chosen = one_hot(target, self.problem.max_classes, self._dtype)
        had = state["count"].index_select(0, target).to(self._dtype).unsqueeze(1)
        n = state["count"].sum().to(self._dtype)
        difference = x - state["mean"].index_select(0, target)
        q = self._inverse.times(state, difference)
        distance = torch.mm(q, difference.t())
        a = torch.where(had > 0, n / (n + 1.0), 0.0)
        s = a * distance + 1.0
        b = a / s
        h = torch.mm(state["readout"], difference.reshape(-1, 1))
        share = (chosen / (had + 1.0)).t()
        u = q * b.sqrt()
        room = self._inverse.has_room(state)
        sane = (s > 0.5) & (s < LOST / torch.finfo(self._dtype).eps)
        outputs = {
            "scores": scores,
            "loss": (distance * n).to(torch.float32).reshape(()),
            "guard": (sane if room is None else sane & room).reshape(()),
            "health.s": s.to(torch.float32).reshape(()),
        }
        return outputs, {
            **self._inverse.less(state, u),
            "mean": state["mean"] + share * difference,
            "readout": torch.addmm(state["readout"], share / s - h * b, q),
            "count": state["count"] + chosen.to(torch.float32).reshape(-1),
        }

    def refresh(self, state: State) -> StepResult:
        """Take what waits into P; with ``delay`` only."""
        return {}, self._inverse.refreshed(state)

    @property
    def refresh_every(self) -> int:
        """``delay``."""
        return int(self.config.delay)

    def _vector(self, z: Any) -> Tensor:
        return vector(z, self.config.unit_norm, self._dtype)

    def _scores(self, state: State, x: Tensor) -> Tensor:
        count = state["count"]
        n = count.sum().to(self._dtype)
        scores = row_products(x - state["mean"] * 0.5, state["readout"]) * n
        if self.config.priors:
            share = count.clamp_min(1.0) / count.sum().clamp_min(1.0)
            scores = scores + share.log().to(self._dtype).unsqueeze(0)
        return mask_unseen(scores.to(torch.float32), count)
