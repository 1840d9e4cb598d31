"""Optimisers as pure functions over named tensors: new parameters and new slots from gradients.

A mask acts on the update, not only on the gradient: momentum, Adam's moments and weight decay would otherwise move
weights whose gradient is zero. Where a scalar takes part, tensors are updated in flat shape, because runtimes broadcast it over
trailing dimensions of size one slowly.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.learner import State
from edgecl.methods._features import require

OPTIMISERS = ("sgd", "momentum", "adam")


@dataclass(frozen=True)
class Optimiser:
    """SGD, SGD with momentum, or Adam; weight decay is decoupled (Loshchilov & Hutter 2019) in all of them.

    Attributes:
        kind: ``sgd``, ``momentum`` (as ``torch.optim.SGD``, no dampening) or ``adam`` (Kingma & Ba 2015, with bias correction).
        momentum: Factor of the old velocity.
        betas: Adam's decay of the first and second moment.
        eps: Added to Adam's denominator.
        weight_decay: Fraction of a weight that an update takes away, before the learning rate.
    """

    kind: str = "sgd"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(self.kind in OPTIMISERS, "optimizer", f"be one of {', '.join(OPTIMISERS)}", self.kind, "use 'sgd'")
        require(0 <= self.momentum < 1, "momentum", "be in [0, 1)", self.momentum, "0.9 is usual")
        betas: Any = self.betas  # the values of a configuration are of any type
        ok = isinstance(betas, (tuple, list)) and [isinstance(b, (int, float)) and 0 <= b < 1 for b in betas] == [True, True]
        require(ok, "betas", "be two numbers in [0, 1)", self.betas, "(0.9, 0.999) is usual")
        require(0 < self.eps < math.inf, "eps", "be finite and above 0", self.eps, "1e-8 is usual")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "be finite and at least 0", self.weight_decay, "use 0 for none")

    def slots(self, parameters: Mapping[str, Tensor]) -> State:
        """Zero-initialised slots, named ``SLOT.PARAMETER``."""
        names = {"sgd": (), "momentum": ("momentum",), "adam": ("adam_m", "adam_v")}[self.kind]
        slots = {f"{slot}.{key}": torch.zeros_like(value) for slot in names for key, value in parameters.items()}
        return {**slots, "adam_step": torch.zeros(())} if self.kind == "adam" else slots

    def seed(self, lr: Tensor) -> Tensor:
        """Cotangent of the loss: plain SGD takes its learning rate from the backward pass, others scale later."""
        return lr if self.kind == "sgd" else torch.ones(())

    def update(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: State, lr: Tensor, masks: Mapping[str, Tensor]
    ) -> tuple[State, State]:
        """New parameters and new slots.

        Args:
            parameters: Trained tensors by name.
            gradients: :meth:`seed` times the gradient, by the same names.
            state: Holds the slots.
            lr: float32 [].
            masks: bool, of a parameter's shape; where it is false, weight and slots stay as they are, to the bit.
        """
        slots: State = {}
        new: State = {}
        if self.kind == "adam":
            slots["adam_step"] = state["adam_step"] + 1.0
        for name, parameter in parameters.items():
            shape = parameter.shape
            flat = shape if self.kind == "sgd" and not self.weight_decay else (-1,)
            old = {slot: state[slot].reshape(flat) for slot in self.slots({name: parameter}) if slot != "adam_step"}
            changed = self._one(name, parameter.reshape(flat), gradients[name].reshape(flat), old, slots.get("adam_step"), lr)
            for key, value in changed.items():
                before = parameter.reshape(flat) if key == "" else old[key]
                kept = torch.where(masks[name].reshape(flat), value, before) if name in masks else value
                (new if key == "" else slots)[key or name] = kept.reshape(shape)
        return new, slots

    def _one(self, name: str, p: Tensor, g: Tensor, old: State, step: Tensor | None, lr: Tensor) -> State:
        """One flat tensor: its new value under ``""``, its new slots under their names."""
        slots: State = {}
        if self.kind == "sgd":
            change = g
        elif self.kind == "momentum":
            velocity = slots[f"momentum.{name}"] = old[f"momentum.{name}"] * self.momentum + g
            change = velocity * lr
        else:
            assert step is not None
            first, second = self.betas
            m = slots[f"adam_m.{name}"] = old[f"adam_m.{name}"] * first + g * (1 - first)
            v = slots[f"adam_v.{name}"] = old[f"adam_v.{name}"] * second + g * g * (1 - second)
            scale = lr / (1.0 - first**step)
            change = m * scale / (v.sqrt() / (1.0 - second**step).sqrt() + self.eps)
        if self.weight_decay:
            change = change + p * (lr * self.weight_decay)
        return {"": p - change, **slots}


@dataclass(frozen=True)
class OptimiserConfig:
    """Hyperparameters of every method that takes gradient steps by :class:`Optimiser`.

    Attributes:
        lr: Default learning rate; the device may give another with each sample.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        momentum: Of ``momentum``.
        betas: Of ``adam``.
        eps: Of ``adam``.
        weight_decay: Decoupled.
    """

    lr: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def optimiser(self) -> Optimiser:
        """The optimiser that these values describe."""
        return Optimiser(self.optimizer, self.momentum, self.betas, self.eps, self.weight_decay)
