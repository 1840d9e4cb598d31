"""Naive fine-tuning: one optimiser step on each sample, nothing against forgetting.

Source: the usual lower bound of class-incremental studies (van de Ven & Tolias 2019, "Three scenarios for continual
learning"). Deviation: classes not seen yet are masked out of the softmax. The loss is that of the target's kind
(:mod:`edgecl.methods._losses`): cross-entropy, mean squared error, binary cross-entropy, or cross-entropy a pixel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.learner import State, StepResult
from edgecl.methods._losses import losses
from edgecl.methods._optim import OptimiserConfig
from edgecl.methods._suffix import SuffixLearner, check_training


class Finetune(SuffixLearner):
    """SGD on the suffix, one sample at a time.

    State: 4 (P + K) bytes for P trained weights and K class counts, two or three times P with momentum or Adam. MACs a sample: forward, and
    backward down to the shallowest trained tensor.
    """

    name = "finetune"
    targets = ("class", "vector", "multilabel", "map")
    summary = "naive fine-tuning of the suffix, one sample at a time"

    @dataclass(frozen=True)
    class Config(OptimiserConfig):
        """Hyperparameters, beside those of :class:`edgecl.methods._optim.OptimiserConfig`.

        Attributes:
            trainable: Patterns of parameter names, or None for all but the norms' affine parameters.
        """

        trainable: tuple[str, ...] | None = None

        def __post_init__(self) -> None:
            check_training(self)
            self.optimiser()

    def init(self) -> State:
        """The suffix's weights and the optimiser's slots."""
        state = super().init()
        return {**state, **self.config.optimiser().slots(self.parameters(state))}

    def learn(self, state: State, z: Any, target: Tensor, weight: Tensor, lr: Tensor) -> StepResult:
        """One step on the loss of this sample times ``weight`` [1]."""
        counted = self.counted(state, target)
        allowed = counted["count"] > 0 if counted else None

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            scores = self.scores(parameters, z)
            return (losses(self.problem.target, scores, target, allowed) * weight).sum(), scores

        value, scores, new = self.descend(state, loss, lr)
        return {"scores": self.masked(scores, state).to(torch.float32), "loss": value.to(torch.float32)}, {**new, **counted}
