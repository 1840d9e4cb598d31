"""Joint: offline training on all samples at once, over many epochs. What a stream is compared with; it cannot run on the device."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgecl.learner import State
from edgecl.methods._features import require
from edgecl.methods._losses import cross_entropy
from edgecl.methods._suffix import SuffixLearner, check_training


class Joint(SuffixLearner):
    """The suffix trained offline on every sample, base and new, with Adam and a cosine schedule.

    State: that of finetune. Host only: there is no ``learn`` step to export.
    """

    name = "joint"
    host_only = True
    summary = "offline reference: the suffix trained on all samples at once (host only)"

    @dataclass(frozen=True)
    class Config:
        """Hyperparameters.

        Attributes:
            epochs: Passes over all samples.
            batch: Samples a step.
            lr: Learning rate at the start; it falls to zero along a cosine.
            weight_decay: Decoupled.
            trainable: As in finetune.
            seed: Order of the samples.
        """

        epochs: int = 20
        batch: int = 32
        lr: float = 3e-3
        weight_decay: float = 1e-4
        trainable: tuple[str, ...] | None = None
        seed: int = 0

        def __post_init__(self) -> None:
            check_training(self)
            require(self.epochs >= 1, "epochs", "be at least 1", self.epochs, "20 is usual")
            require(self.batch >= 1, "batch", "be at least 1 sample", self.batch, "32 is usual")
            require(0 <= self.seed < 2**64, "seed", "be in [0, 2**64)", self.seed, "0 is as good as any")
            require(0 <= self.weight_decay < math.inf, "weight_decay", "be finite and at least 0", self.weight_decay, "use 0 for none")

    def fit(self, z: Any, target: Tensor) -> State:
        """Train on latents [N, ...] (one tensor, or a mapping of named ones) and classes int64 [N] and return the state.

        Raises:
            InputError: when the weights do not stay finite.
        """
        state = self.init()
        weights = {name: value.clone().requires_grad_(True) for name, value in self.parameters(state).items()}
        config: Any = self.config
        optimiser = torch.optim.AdamW(weights.values(), config.lr, weight_decay=config.weight_decay)
        steps = config.epochs * -(-len(target) // config.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        generator = torch.Generator().manual_seed(config.seed)
        count = torch.bincount(target, minlength=self.problem.max_classes).float()
        for _ in range(config.epochs):
            for rows in torch.split(torch.randperm(len(target), generator=generator), min(config.batch, len(target))):
                part = z[rows] if isinstance(z, Tensor) else {name: tensor[rows] for name, tensor in z.items()}
                loss = cross_entropy(self.scores(weights, part), target[rows], count > 0).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                for name, mask in self.masks.items():
                    weights[name].data = torch.where(mask, weights[name].data, state[f"param.{name}"])
        ok = all(bool(torch.isfinite(value).all()) for value in weights.values())
        require(ok, "lr", "keep the weights finite in training", config.lr, "they became infinite or NaN; lower it")
        return {**{f"param.{name}": value.detach() for name, value in weights.items()}, "count": count}
