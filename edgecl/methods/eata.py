"""EATA: entropy minimisation on samples that are reliable and not redundant, held near the source weights.

Source: Niu et al. 2022, "Efficient Test-Time Model Adaptation without Forgetting" (github.com/mr-eggplant/EATA). With E0 = ``margin``
ln C over the C classes seen, m a running mean of kept probabilities p, and F the diagonal Fisher information of the source samples:

    kept:  H_i < E0  and  |cos(m, p_i)| < ``redundancy``
    loss = mean over kept of exp(E0 - H_i) H_i  +  ``anchor`` sum_j F_j (theta_j - theta0_j)^2,  the factor exp(E0 - H_i) not differentiated

Deviations: the filter acts on each sample before the memory, so that the work of an update is done for kept samples alone, where the
authors' code runs the whole batch backward; an update filters its rows again by the weights of its own time, as theirs does, and leaves
everything as it is when it keeps none (momentum would move weights without a gradient). F is the mean of squared gradients of single
source samples, with the stored statistics; the authors square the gradients of batch means. ``anchor`` of 0 is ETA.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.graph.phases import value_and_gradient
from edgecl.learner import State, StepResult
from edgecl.methods._adapt import TrainedConfig
from edgecl.methods._features import SMALLEST_NORM, require
from edgecl.methods._norms import STORED
from edgecl.methods.tent import Tent


class Eata(Tent):
    """TENT on chosen samples.

    State: that of tent, and 4 K bytes for the mean probabilities; with ``anchor`` 8 bytes more for each affine parameter. MACs: a sample
    that is left out costs one forward pass, an update those of tent.
    """

    name = "eata"
    summary = "tent on reliable, non-redundant samples, held near the source weights"

    @dataclass(frozen=True)
    class Config(TrainedConfig):
        """Hyperparameters, beside those of :class:`edgecl.methods._adapt.TrainedConfig`.

        Attributes:
            margin: Of ln C: the entropy below which a sample is reliable.
            redundancy: Cosine to the mean probabilities from which on a sample is redundant: 0.4 for CIFAR-10, 0.05 for ImageNet.
            decay: Of the running mean of probabilities, which each update renews.
            anchor: Weight of the pull to the source weights: 1 for CIFAR-10, 2,000 for ImageNet, 0 for none.
        """

        margin: float = 0.4
        redundancy: float = 0.4
        decay: float = 0.9
        anchor: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            require(0 < self.margin < math.inf, "margin", "be finite and above 0", self.margin, "0.4 is the authors'")
            require(0 < self.redundancy < math.inf, "redundancy", "be finite and above 0", self.redundancy, "0.4 suits ten classes")
            require(0 <= self.decay < 1, "decay", "be in [0, 1)", self.decay, "0.9 is the authors'")
            require(0 <= self.anchor < math.inf, "anchor", "be finite and at least 0", self.anchor, "use 0 for none")

    def init(self) -> State:
        """Tent's state, no mean probabilities yet; with ``anchor`` the source weights, and no information on them."""
        state = super().init()
        kept = {"probability": torch.zeros(self.problem.max_classes)}
        if self.config.anchor:
            kept |= {f"anchor.{name}": value.clone() for name, value in self.parameters(state).items()}
            kept |= {f"fisher.{name}": torch.zeros_like(value) for name, value in self.parameters(state).items()}
        return {**state, **kept}

    def prime(self, state: State, z: Any, target: Tensor, weight: Tensor | None = None) -> StepResult:
        """Count a base sample, and take its squared gradient, towards the class predicted, into the Fisher information."""
        outputs, new = super().prime(state, z, target, weight)
        if not self.config.anchor:
            return outputs, new
        now = {**state, **new}

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores, _ = self.scored(now, z, STORED, parameters=parameters)
            return torch.log_softmax(scores, 1).max() * -1.0, scores  # over all classes, so that the samples' order does not count

        _, _, gradients = value_and_gradient(loss, self.parameters(state), torch.ones(()))
        share = 1.0 / new["count"].sum()
        fisher = {f"fisher.{n}": state[f"fisher.{n}"] + (g * g - state[f"fisher.{n}"]) * share for n, g in gradients.items()}
        return outputs, {**new, **fisher}

    def track(self, state: State, z: Any) -> StepResult:
        """As tent's; ``select``, bool [], whether the sample is reliable and not redundant."""
        outputs, new = super().track(state, z)
        kept, _ = self._kept(outputs["scores"], state)
        return {**outputs, "select": (kept.sum() > 0).reshape(())}, new

    def objective(self, scores: Tensor, state: State, parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean over kept rows of weighted entropies, and the pull to the source weights."""
        entropy = self.entropy(scores, state)
        with torch.no_grad():
            kept, bound = self._kept(scores, state)
            weights = kept * (bound - entropy).exp() / kept.sum().clamp_min(1.0)
        return (weights * entropy).sum() + self._pull(state, parameters), (kept,)

    def noted(self, state: State, scores: Tensor, kept: Tensor) -> State:
        """The running mean of probabilities, with those of the kept rows."""
        probability, old = torch.softmax(self.masked(scores, state), 1), state["probability"]
        mean = (probability * kept.unsqueeze(1)).sum(0) / kept.sum().clamp_min(1.0)
        return {"probability": torch.where(old.sum() > 0, old * self.config.decay + mean * (1 - self.config.decay), mean)}

    def _kept(self, scores: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """1 for each row of scores [N, K] that is kept, else 0, float32 [N]; and E0."""
        bound = (state["count"] > 0).to(torch.float32).sum().log() * self.config.margin
        probability, mean = torch.softmax(self.masked(scores, state), 1), state["probability"]
        lengths = (probability * probability).sum(1).sqrt() * (mean * mean).sum().sqrt()
        cosine = (probability * mean).sum(1) / lengths.clamp_min(SMALLEST_NORM)  # 0 before there is a mean
        reliable = self.entropy(scores, state) < bound
        return (reliable & (cosine < self.config.redundancy)).to(torch.float32), bound

    def _pull(self, state: State, parameters: dict[str, Tensor]) -> Tensor:
        """The pull to the source weights, float32 []."""
        if not self.config.anchor:
            return torch.zeros(())
        away = {name: value - state[f"anchor.{name}"] for name, value in parameters.items()}
        terms = [(state[f"fisher.{name}"] * part * part).sum() for name, part in away.items()]
        pull: Tensor = torch.stack(terms).sum() * self.config.anchor
        return pull
