"""Naive fine-tuning: one optimiser step on each sample, nothing against forgetting.

Source: the usual lower bound of class-incremental studies (van de Ven & Tolias 2019, "Three scenarios for continual
learning"). Deviation: classes not seen yet are masked out of the softmax. The loss is that of the target's kind
(:mod:`edgecl.methods._losses`): cross-entropy, mean squared error, binary cross-entropy, or cross-entropy a pixel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.graph.phases import value_and_gradient
from edgecl.learner import State, StepResult
from edgecl.methods._losses import losses
from edgecl.methods._optim import Optimiser
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
    class Config:
        """Hyperparameters.

        Attributes:
            lr: Default learning rate; the device may give another with each sample.
            optimizer: ``sgd``, ``momentum`` or ``adam``.
            momentum: Of ``momentum``.
            betas: Of ``adam``.
            eps: Of ``adam``.
            weight_decay: Decoupled.
            trainable: Patterns of parameter names, or None for all but the norms' affine parameters.
        """

        lr: float = 0.01
        optimizer: str = "sgd"
        momentum: float = 0.9
        betas: tuple[float, float] = (0.9, 0.999)
        eps: float = 1e-8
        weight_decay: float = 0.0
        trainable: tuple[str, ...] | None = None

        def optimiser(self) -> Optimiser:
            """The optimiser that these values describe."""
            return Optimiser(self.optimizer, self.momentum, self.betas, self.eps, self.weight_decay)

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

    def descend(self, state: State, loss: Any, lr: Tensor) -> tuple[Tensor, Tensor, State]:
        """Loss, its auxiliary result, and the new weights and slots after one optimiser step."""
        optimiser, parameters = self.config.optimiser(), self.parameters(state)
        value, auxiliary, gradients = value_and_gradient(loss, parameters, optimiser.seed(lr))
        new, slots = optimiser.update(parameters, gradients, state, lr, self.masks)
        return value, auxiliary, {**{f"param.{name}": tensor for name, tensor in new.items()}, **slots}
