"""Training on labelled source samples, on the host, of what will adapt on the device."""

from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgecl.learner import State
from edgecl.methods._features import require
from edgecl.methods._losses import cross_entropy
from edgecl.methods._norms import ROWS
from edgecl.trees import leaves, map_tree

if TYPE_CHECKING:
    from edgecl.methods._adapt import AdaptiveLearner


def warmed_up(
    learner: "AdaptiveLearner", state: State, latents: Any, target: Tensor, epochs: int, lr: float, batch: int, seed: int
) -> State:
    """``param.NAME`` after training on cross-entropy, every norm by the statistics of its batch, and then ``stat.NAME`` of all samples.

    SGD with momentum of 0.9, the rate falling to zero along a cosine.

    Args:
        learner: Its trained parameters start from the state's.
        state: Read only.
        latents: float [N, ...], or a mapping of such.
        target: Classes int64 [N].
        epochs: Passes over all samples.
        lr: Learning rate at the start.
        batch: Samples a step.
        seed: Order of the samples.

    Raises:
        InputError: when the weights do not stay finite, or there are fewer than two samples.
    """
    require(len(target) >= 2, "x", "hold at least 2 samples for the warm-up", len(target), "fit more source samples")
    weights = {name: value.clone().requires_grad_(True) for name, value in learner.parameters(state).items()}
    allowed = torch.bincount(target, minlength=learner.problem.max_classes) > 0
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(weights.values(), lr, 0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-len(target) // batch))
    for _ in range(epochs):
        for rows in _batches(torch.randperm(len(target), generator=generator, device="cpu"), batch):
            with torch.enable_grad():
                scores, _ = learner.scored(state, map_tree(latents, itemgetter(rows)), ROWS, parameters=weights)
                loss = cross_entropy(scores, target[rows], allowed).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    ok = all(bool(torch.isfinite(value).all()) for value in weights.values())
    require(ok, "warmup_lr", "keep the weights finite in the warm-up", lr, "they became infinite or NaN; lower it")
    new = {f"param.{name}": value.detach() for name, value in weights.items()}
    return {**new, **source_statistics(learner, {**state, **new}, latents, batch)}


def source_statistics(learner: "AdaptiveLearner", state: State, latents: Any, batch: int) -> State:
    """``stat.NAME`` of all samples [N, ...] together, each norm's input as batches have it."""
    count = len(leaves(latents)[0])
    first: State = {}
    second: State = {}
    with torch.no_grad():
        for rows in _batches(torch.arange(count), batch):
            _, found = learner.scored(state, map_tree(latents, itemgetter(rows)), ROWS, reports=True)
            share = len(rows) / count
            for name in learner.norms.names:
                mean, var = found[f"{name}.mean"], found[f"{name}.var"]
                first[name] = first.get(name, 0.0) + mean * share
                second[name] = second.get(name, 0.0) + (var + mean * mean) * share
    means = {f"stat.{name}.mean": first[name] for name in first}
    return {**means, **{f"stat.{name}.var": (second[name] - first[name] * first[name]).clamp_min(0.0) for name in first}}


def _batches(order: Tensor, batch: int) -> list[Tensor]:
    """Parts of about ``batch`` rows, none of which is a single row, whose statistics would be an image's."""
    parts = list(torch.split(order, min(batch, len(order))))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
