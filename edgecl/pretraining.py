"""Supervised training of a whole network on a base set, before anything is cut, frozen or exported."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecl.given import check_device
from edgecl.methods._features import check_types, require
from edgecl.methods._losses import losses
from edgecl_device.errors import InputError
from edgecl_device.manifest import TargetSpec


@dataclass(frozen=True)
class Recipe:
    """AdamW with one cycle of the learning rate.

    Attributes:
        epochs: Passes over the base set.
        batch: Samples a step.
        lr: Highest learning rate, reached after 3 of 10 steps.
        weight_decay: Decoupled.
    """

    epochs: int = 10
    batch: int = 32
    lr: float = 4e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_types(self)
        require(self.epochs >= 1, "epochs", "be at least 1", self.epochs, "10 is a good start")
        require(self.batch >= 2, "batch", "be at least 2 samples, which batch norm needs", self.batch, "32 is usual")
        require(0 < self.lr < math.inf, "lr", "be finite and above 0", self.lr, "0.004 is a good start")
        require(0 <= self.weight_decay < math.inf, "weight_decay", "be finite and at least 0", self.weight_decay, "use 0 for none")


def train(
    net: nn.Module,
    x: np.ndarray[Any, Any],
    y: np.ndarray[Any, Any],
    *,
    preprocess: nn.Module | None,
    recipe: Recipe,
    generator: torch.Generator,
    device: str = "cpu",
    kind: str = "class",
    ignore: int | None = None,
) -> None:
    """Train a network in place and leave it in eval mode; outputs of classes without a sample, or without a pixel, are masked.

    Args:
        net: Maps preprocessed samples to scores [N, K], for maps [N, K, H, W].
        x: Raw samples [N, ...].
        y: Classes int64 [N], in [0, K), or targets of another kind (:class:`edgecl.streams.Dataset`).
        preprocess: What the device will run before the network, or None.
        recipe: How.
        generator: Of the order of the samples, on the CPU.
        device: PyTorch's device to train on; the network comes back to the CPU.
        kind: Of the targets; the loss is that of a trained suffix (:mod:`edgecl.methods._losses`).
        ignore: Value of a map's pixels that count for nothing, or None.

    Raises:
        InputError: when there is no such device, or the network's scores are of another shape than the targets.
    """
    samples, labels = torch.tensor(x), torch.tensor(y if kind == "class" else y.astype(np.int64 if kind == "map" else np.float32))
    if preprocess is not None:
        samples = preprocess(samples)
    check_device(device)
    samples, labels = samples.to(device), labels.to(device)
    spec = TargetSpec(kind, (1, *labels.shape[1:]), ignore=ignore)
    net.to(device).train()
    optimiser = torch.optim.AdamW(net.parameters(), recipe.lr / 4, weight_decay=recipe.weight_decay)
    batches = -(-len(x) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.epochs * batches)
    known = None
    for _ in range(recipe.epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator), min(recipe.batch, len(x))):
            scores = net(samples[rows])
            if known is None:
                known = _seen(labels, scores, kind, ignore)
            if kind == "class":
                loss = nn.functional.cross_entropy(torch.where(known, scores, -1e9), labels[rows])
            else:
                loss = losses(spec, scores, labels[rows], known).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    net.to("cpu").eval()


def _seen(labels: Tensor, scores: Tensor, kind: str, ignore: int | None) -> Tensor:
    """Which outputs [K] some sample has as its class."""
    wanted = {"class": scores.shape[1:2], "map": (scores.shape[1], *labels.shape[1:])}.get(kind, labels.shape[1:])
    if scores.shape[1:] != wanted:
        raise InputError(f"model: must return scores {['N', *wanted]} for these targets, got {list(scores.shape)}; give it such a head")
    if kind not in ("class", "map"):
        return torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    counted = labels if ignore is None else labels[labels != ignore]
    if counted.numel() and int(counted.max()) >= scores.shape[1]:
        raise InputError(
            f"model: must return a score for each class, {int(counted.max()) + 1} of them, got {scores.shape[1]}; give it such a head"
        )
    return torch.bincount(counted.reshape(-1), minlength=scores.shape[1]) > 0
