"""What both granularities of a sparse learner answer: state, scores, update, new masks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.learner import State
from edgecl.masks import Density, Schedule, random, table_shape
from edgecl_device.generator import WORD
from edgecl_device.manifest import DrawSpec

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Choice:
    """What a refresh has at hand.

    Attributes:
        of_task: Gradients of the loss on the current classes, by parameter.
        of_memory: Gradients of the loss on all replayed rows.
        alpha: Weight of the first in a score.
        beta: Weight of the second.
        new: bool [1], whether the task is new, so that masks are grown.
        draw: Integers by name.
    """

    of_task: Mapping[str, Tensor]
    of_memory: Mapping[str, Tensor]
    alpha: float
    beta: float
    new: Tensor
    draw: Mapping[str, Tensor]

    def movement(self, name: str) -> Tensor:
        """How strongly the two losses pull at each value of a parameter: by it gradients are chosen (DGM)."""
        return self.of_task[name].abs() * self.alpha + self.of_memory[name].abs() * self.beta


class Form(ABC):
    """A granularity.

    Attributes:
        schedules: Counts by the key of each mask.
    """

    schedules: dict[str, Schedule]

    @abstractmethod
    def __init__(self, suffix: nn.Module, layers: Sequence[str], config: Any) -> None:
        """Take over a suffix, the paths of its sparse convolutions, and the method's hyperparameters."""

    @abstractmethod
    def init(self, weights: Tensors) -> State:
        """State of the sparse learner, by the names of the state, from dense weights by the names of the suffix."""

    @abstractmethod
    def scores(self, call: Callable[..., Tensor], parameters: Tensors, state: State, z: Any) -> Tensor:
        """Scores [N, K], by a function that calls a module with parameters and inputs."""

    @abstractmethod
    def updated(self, parameters: Tensors, gradients: Tensors, state: State) -> Tensors:
        """New parameters, from gradients times the learning rate."""

    @abstractmethod
    def refreshed(self, state: State, choice: Choice) -> State:
        """New masks, and weights under them."""

    @abstractmethod
    def densities(self) -> dict[str, Density]:
        """Shares of the weights of each sparse layer, by its path, as they are while no task is new."""

    @abstractmethod
    def dense(self, state: State) -> Tensors:
        """Parameters as the dense suffix has them, masked weights zero."""

    @property
    def moves(self) -> bool:
        """Whether a refresh changes a weight mask."""
        return any(schedule.grow or schedule.exchange for schedule in self.schedules.values())

    @property
    def draws(self) -> tuple[DrawSpec, ...]:
        """Integers that a refresh takes: those of the random regrowth."""
        if not self.moves:
            return ()
        specs = []
        for i, schedule in enumerate(self.schedules.values()):
            first, second = table_shape(schedule.units)
            specs += [DrawSpec(f"grow_{i}a", (first,), WORD, "refresh"), DrawSpec(f"grow_{i}b", (second,), WORD, "refresh")]
        return tuple(specs)

    def priorities(self, key: str, draw: Mapping[str, Tensor]) -> Tensor:
        """A random integer for each unit of a mask."""
        i = list(self.schedules).index(key)
        return random(draw[f"grow_{i}a"], draw[f"grow_{i}b"], self.schedules[key].units)


def as_count(live: Tensor) -> Tensor:
    """How many are true, int64 [1]."""
    return live.to(torch.int64).sum().reshape(1)
