"""Where a network may be cut: the depths that the planner chooses from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn

from edgecl.learner import Problem
from edgecl.methods._suffix import SuffixLearner
from edgecl.planning.latents import At, specs_of
from edgecl.prepare import prepare
from edgecl.profiling import SplitPoint, split_points
from edgecl.trunk import Trunk
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import Array

ENOUGH_DEPTHS = 5
"""Cuts that are enough to choose from; with fewer, names of more parts are listed."""

MOST_DEPTHS = 10
"""Cuts that are tried where none are named; of more, those between are left out evenly."""

NEIGHBOURS = 3
"""Depths before the last pooled one that are joined with it, one by one and together."""


@dataclass(frozen=True)
class Network:
    """A network as the user gave it.

    Attributes:
        model: The module.
        preprocess: Runs before it, on the device too.
        example: One raw sample, with a batch dimension of 1.
        classes: Classes that a learner has room for.
    """

    model: nn.Module
    preprocess: nn.Module | None
    example: Array
    classes: int

    @cached_property
    def x(self) -> torch.Tensor:
        """The example as the model takes it."""
        with torch.no_grad():
            found: torch.Tensor = torch.tensor(self.example) if self.preprocess is None else self.preprocess(torch.tensor(self.example))
        return found


@dataclass(frozen=True, eq=False)
class Depth:
    """A place where the network is cut.

    Attributes:
        at: As :func:`edgecl.prepare.prepare` takes it.
        trunk: What is frozen.
        problem: What a learner behind it is told.
        trunk_macs: Multiply-accumulates of one pass through the trunk, at least.
        suffix: What is behind, or None where it cannot be trained.
        untrainable: Why it cannot.
    """

    at: At
    trunk: Trunk
    problem: Problem
    trunk_macs: int
    suffix: nn.Module | None
    untrainable: str = ""


def places(network: Network, at: Sequence[At] = (), progress: Callable[[int, int], None] | None = None) -> dict[At, int]:
    """Cuts to try, with the multiply-accumulates that their trunks take at least.

    Args:
        network: To be cut.
        at: Cuts to try, and no others; without any they are chosen: up to :data:`MOST_DEPTHS` of the network's, each of them pooled
            where it has positions, and the last one joined with those before it.
        progress: Called with the names tried and in all.

    Raises:
        SplitError: when the network cannot be cut at all.
        GraphError: when it has an operator that cannot be counted.
    """
    named = [name for place in at for name in ([place] if isinstance(place, str) else place)]
    if at:
        points = split_points(network.model, network.x, depth=max(name.count(".") + 1 for name in named), progress=progress)
        macs = {point.at: point.trunk_macs for point in points}
        return {place: max(macs.get(name, 0) for name in ([place] if isinstance(place, str) else place)) for place in at}
    for parts in range(1, 4):
        points = _thinned(split_points(network.model, network.x, depth=parts, progress=progress))
        if len(points) >= ENOUGH_DEPTHS:
            break
    found: dict[At, int] = {point.at: point.trunk_macs for point in points}
    maps = [point for point in points if len(point.features) == 1 and prod(point.features[0][2:]) > 1]
    found |= {(point.at,): point.trunk_macs for point in maps}
    return found | {tuple(p.at for p in some): some[-1].trunk_macs for some in _joined(points, maps)}


def _thinned(points: Sequence[SplitPoint]) -> list[SplitPoint]:
    """Of cuts with equal work and as many values the last, which has passed the activation; then the deepest and evenly between."""
    kept = list({(point.trunk_macs, sum(map(prod, point.features))): point for point in points}.values())
    if len(kept) <= MOST_DEPTHS:
        return kept
    chosen = {round(i * (len(kept) - 1) / (MOST_DEPTHS - 1)) for i in range(MOST_DEPTHS)}
    return [point for i, point in enumerate(kept) if i in chosen]


def _joined(points: Sequence[SplitPoint], maps: Sequence[SplitPoint]) -> Iterable[Sequence[SplitPoint]]:
    """Small sets of depths: the last with each of the maps before it, and with several of them."""
    last = [point for point in points if len(point.features) == 1][-1:]
    before = [point for point in maps if point not in last][-NEIGHBOURS:]
    if last and last[0].trunk_macs == (before[-1].trunk_macs if before else -1):  # the same map, already pooled
        before = before[:-1]
    return [(point, *last) for point in before] + [(*before[-n:], *last) for n in range(2, len(before) + 1)]


def opened(network: Network, at: At, trunk_macs: int) -> Depth:
    """Cut the network at a place.

    Raises:
        SplitError: when it cannot be cut there.
        InputError: when its latent is none that a learner can start from.
    """
    common: dict[str, Any] = {"at": at, "example": network.example, "classes": network.classes, "preprocess": network.preprocess}
    frozen = prepare(network.model, method="ncm", **common)
    features = frozen.learner.problem.features
    for spec in specs_of(features).values():
        if spec.dtype != "float32":
            raise InputError(f"at: the latent {spec.name} behind {at!r} must be float32 to plan with, got {spec.dtype}; cut elsewhere")
    suffix, why = None, ""
    try:
        learner = prepare(network.model, method="finetune", **common).learner
        assert isinstance(learner, SuffixLearner)
        suffix = learner.suffix
    except EdgeclError as error:  # other scores than classes, or layers that cannot be trained: the methods without a suffix stay
        why = str(error)
    return Depth(at, frozen.trunk, frozen.learner.problem, trunk_macs, suffix, why)


def place_text(at: At) -> str:
    """A place as ``--at`` takes it.

    >>> place_text("a"), place_text(("a",)), place_text(("a", "b"))
    ('a', 'a,', 'a,b')
    """
    return at if isinstance(at, str) else ",".join(at) + ("," if len(at) == 1 else "")
