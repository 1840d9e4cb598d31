"""TENT: the entropy of predictions is minimised over the affine parameters of the norms.

Source: Wang et al. 2021, "Tent: Fully Test-Time Adaptation by Entropy Minimization" (github.com/DequanWang/tent). Loss: the mean over the
rows of ``-sum p log p``; Adam 1e-3 at 200 rows is theirs for CIFAR-10, SGD with momentum 2.5e-4 at 64 theirs for ImageNet.

Deviations: samples come one at a time, so that an update reads the rows of a memory, each normalised by the statistics of all of them, and
single samples are predicted with stored statistics, which follow the stream (``statistics``). With a batch as rows,
``adapt(state, lr, replay)`` is the published step: its scores are those before the update. Entropy is over the classes seen. Layer and
group norms are trained as well; they have no statistics.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.learner import Problem, State, StepResult
from edgecl.methods._adapt import AdaptiveLearner, TrainedConfig
from edgecl.methods._norms import ROWS
from edgecl_device.errors import InputError


class Tent(AdaptiveLearner):
    """Entropy minimisation on the norms' affine parameters.

    State: 4 (3 A + 2 C + K) bytes for A affine parameters under Adam (A under SGD), C channels with statistics and K classes; beside it the
    memory. An update of B rows keeps each norm's input and each rectifier's mask, and takes B times two forward passes: that of the
    gradient's way down holds no weight gradient but the norms'.
    """

    name = "tent"
    summary = "test-time entropy minimisation on the norms' affine parameters"

    @dataclass(frozen=True)
    class Config(TrainedConfig):
        """Hyperparameters: those of every such method (:class:`edgecl.methods._adapt.TrainedConfig`)."""

    def __init__(self, problem: Problem, config: Any = None, **parts: Any) -> None:
        super().__init__(problem, config, **parts)
        if not self.trained:
            raise InputError("suffix: must have a norm with affine parameters, got none behind the cut; cut the model further up")

    def init(self) -> State:
        """Weights, statistics and the optimiser's slots."""
        state = super().init()
        return {**state, **self.config.optimiser().slots(self.parameters(state))}

    def adapt(self, state: State, lr: Tensor, replay: dict[str, Any]) -> StepResult:
        """One step on all rows. ``scores`` [B, K] are those before it.

        ``health.kept`` [] is how many rows the loss is of, for methods that filter them.
        """
        rows = self._decode(replay["z"])

        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, Any]:
            scores, found = self.scored(state, rows, ROWS, reports=self.config.statistics == "rows", parameters=parameters)
            value, kept = self.objective(scores, state, parameters)
            return value, (scores, found, kept)

        value, (scores, found, filtered), new = self.descend(state, loss, lr)
        new |= {f"stat.{name}": tensor for name, tensor in found.items()}
        outputs = {"scores": self.masked(scores, state).to(torch.float32), "loss": value.to(torch.float32)}
        for kept in filtered:
            outputs["health.kept"] = kept.sum()
            new |= self.noted(state, scores, kept)
            # Of no row there is no gradient, but momentum would move the weights; statistics of rows that do not count stay, too.
            new = {name: torch.where(outputs["health.kept"] > 0, tensor, state[name]) for name, tensor in new.items()}
        return outputs, new

    def objective(self, scores: Tensor, state: State, parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss [] of rows with scores [N, K]; behind it, for methods that filter, 1 for each row that counts, else 0, float32 [N]."""
        return self.entropy(scores, state).mean(), ()

    def noted(self, state: State, scores: Tensor, kept: Tensor) -> State:
        """What a method that filters writes beside weights and slots."""
        return {}
