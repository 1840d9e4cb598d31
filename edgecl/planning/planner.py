"""The planner: what fits into a budget, and which of it learns best on the user's own data."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgecl.methods import METHODS
from edgecl.planning.costs import Accountant, Limits, filled
from edgecl.planning.data import rows_of, thinned
from edgecl.planning.latents import At, Latents
from edgecl.planning.refusal import nearest, place_text
from edgecl.planning.search import Option, Round, search
from edgecl.planning.simulate import Course, accuracy
from edgecl.planning.space import Candidate, Depth, Network, candidates, opened, places
from edgecl.streams import Dataset, Stream
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import TensorSpec

Progress = Callable[[str, int, int], None]
Scenario = Callable[[Dataset, int], Stream]
"""Makes the stream of a data set, for a stream order."""


@dataclass(frozen=True)
class Settings:
    """How to look for plans.

    Attributes:
        engine: The runtime on the device.
        pending: Predictions that may wait for a delayed label; one is enough for predict, then learn.
        configs: Hyperparameters by method, of the methods to try; those of the registry that learn on the device by default.
        at: Cuts to try; chosen among the network's own by default.
        samples: Most samples in use, training and validation together.
        orders: Stream orders of the best plans.
        seconds: Time for measuring accuracy; no stream is begun after it.
        top: Plans wanted.
    """

    engine: str = "onnx"
    pending: int = 1
    configs: Mapping[str, Any] = field(default_factory=lambda: default_configs())
    at: Sequence[At] = ()
    samples: int = 1000
    orders: int = 3
    seconds: float = 300.0
    top: int = 10


@dataclass
class Planned:
    """What was found.

    Attributes:
        limits: The budget.
        options: Everything within it, the best first: by mean accuracy on all samples, the cheaper one first where that is equal; then
            what was left behind.
        rounds: How accuracy was measured.
        counts: Depths in all and within the limit of MACs; at those candidates in all, left by lower bounds, and within the budget.
        unsuited: Why candidates cannot be built, and how many.
        validation: Held-out samples.
        seconds: Time that it took.
    """

    limits: Limits
    options: list[Option]
    rounds: list[Round]
    counts: dict[str, int]
    unsuited: dict[str, int]
    validation: int
    seconds: float


def default_configs(names: Sequence[str] | None = None) -> dict[str, Any]:
    """The defaults of methods that learn on the device, all by default.

    Raises:
        InputError: when there is no such method, or it has no step ``learn`` for the device.
    """
    known = {name: kind for name, kind in METHODS.items() if not kind.host_only and hasattr(kind, "learn")}
    for name in names or ():
        if name not in known:
            raise InputError(f"--methods: must be among {', '.join(known)}, which learn on the device, got {name!r}")
    return {name: known[name].Config() for name in names or known}


def plan(
    network: Network,
    data: Dataset,
    scenario: Scenario,
    limits: Limits,
    settings: Settings | None = None,
    progress: Progress = lambda text, done, total: None,
) -> Planned:
    """Look for the most accurate learners within a budget.

    Args:
        network: What is cut.
        data: Training samples and held-out ones, as :func:`edgecl.planning.data.validation_split` makes it.
        scenario: The stream to measure on.
        limits: The budget.
        settings: How to look.
        progress: Called with what runs, how much of it is done and how much there is.

    Raises:
        InfeasibleError: when nothing fits, with the nearest budgets that something would fit.
        InputError: when data and network do not fit together.
        SplitError: when the network cannot be cut.
        GraphError: when it has an operator that no rule knows.
    """
    return _Planner(network, data, scenario, limits, settings or Settings(), progress).run()


class _Planner:
    """One search; each stage hands fewer candidates to the next."""

    def __init__(self, network: Network, data: Dataset, scenario: Scenario, limits: Limits, settings: Settings, progress: Progress) -> None:
        self.network, self.data, self.scenario = network, thinned(data, settings.samples - len(data.y_test)), scenario
        self.limits, self.settings, self.progress = limits, settings, progress
        data = self.data
        self.latents = Latents(network.model, network.preprocess, np.concatenate([data.x, data.x_test]))
        self.courses: dict[tuple[float, int], Course] = {}
        base = self.course(1.0, 0).base
        x = TensorSpec("x", network.example.shape, network.example.dtype.name)
        self.accounts = Accountant(x, settings.engine, settings.pending, self.latents, base)
        self.unsuited: Counter[str] = Counter()
        self.depths: dict[At, Depth] = {}
        self.hopeful: list[tuple[Depth, Candidate]] = []

    def run(self) -> Planned:
        """All stages."""
        start = time.perf_counter()
        wanted = places(self.network, self.settings.at, lambda done, total: self.progress("looking for places to cut", done, total))
        near = {at: macs for at, macs in wanted.items() if self.limits.macs is None or macs <= self.limits.macs}
        bounded = self.bounded(near)
        options = self.affordable(bounded)
        if not options:
            if not self.limits.given():
                raise InputError(f"methods: none of them suits this network: {'; '.join(self.unsuited) or 'there is nothing to cut'}")
            self.progress("looking for the nearest budget", 0, 1)
            far = {at: macs for at, macs in wanted.items() if at not in near}
            raise nearest(self.limits, bounded + self.bounded(far), self.accounts)
        self.progress("encoding the samples at every depth", 0, 1)
        self.latents.want(option.candidate.at for option in options)
        rounds = search(
            options,
            self.measure,
            samples=lambda share: len(self.course(share, 0).stream),
            top=self.settings.top,
            orders=self.settings.orders,
            seconds=self.settings.seconds,
            progress=self.progress,
        )
        counts = {
            "depths": len(wanted),
            "depths_within_macs": len(near),
            "candidates": len(bounded) + sum(self.unsuited.values()),
            "within_lower_bounds": len(self.hopeful),
            "within_budget": len(options),
        }
        ranked = sorted(options, key=_rank)
        seconds = time.perf_counter() - start
        return Planned(self.limits, ranked, rounds, counts, dict(self.unsuited), len(self.data.y_test), seconds)

    def bounded(self, wanted: Mapping[At, int]) -> list[tuple[Depth, Candidate, dict[str, int]]]:
        """Every candidate at these depths, with a lower bound of its costs that needs no graph."""
        found = []
        for done, (at, macs) in enumerate(wanted.items()):
            self.progress("cutting the network", done, len(wanted))
            try:
                depth = self.depths[at] = opened(self.network, at, macs)
            except EdgeclError as error:
                if at in self.settings.at:
                    raise
                self.unsuited[f"{place_text(at)}: {error}"] += 1
                continue
            for candidate in candidates(depth, self.settings.configs, calibrated=len(self.course(1.0, 0).base) > 0):
                try:
                    found.append((depth, candidate, self.accounts.bound(depth, candidate)))
                except EdgeclError as error:
                    self.unsuited[f"{candidate.method} at {place_text(at)}: {error}"] += 1
        return found

    def affordable(self, bounded: Sequence[tuple[Depth, Candidate, dict[str, int]]]) -> list[Option]:
        """Candidates whose exact costs keep to the budget, replay memories as large as it allows."""
        self.hopeful = [(depth, candidate) for depth, candidate, bound in bounded if self._hope(depth, candidate, bound)]
        found = []
        self.latents.want(depth.at for depth, _ in self.hopeful)
        for done, (depth, candidate) in enumerate(self.hopeful):
            self.progress("counting costs on the graphs", done, len(self.hopeful))
            try:
                costs = self.accounts.exact(depth, candidate)
            except EdgeclError as error:
                self.unsuited[f"{candidate.method} at {place_text(depth.at)}: {error}"] += 1
                continue
            if self.limits.allow(costs.totals()):
                found.append(Option(*filled(costs, candidate, depth, self.limits.ram)))
        return found

    def _hope(self, depth: Depth, candidate: Candidate, bound: Mapping[str, int]) -> bool:
        """Whether lower bounds leave a chance; the trunk is captured where the first one does."""
        if not self.limits.allow(bound):
            return False
        try:
            return self.limits.allow(self.accounts.tighter(depth, bound))
        except EdgeclError as error:
            self.unsuited[f"{candidate.method} at {place_text(depth.at)}: {error}"] += 1
            return False

    def measure(self, candidate: Candidate, share: float, order: int) -> float:
        """Accuracy on the held-out samples after one stream."""
        return accuracy(self.depths[candidate.at], candidate, self.latents.at(candidate.at), self.course(share, order))

    def course(self, share: float, order: int) -> Course:
        """The stream of an order on a share of the training samples."""
        if (share, order) not in self.courses:
            self.courses[share, order] = Course.of(self.scenario(rows_of(self.data, share), order))
        return self.courses[share, order]


def _rank(option: Option) -> tuple[Any, ...]:
    costs = option.costs.totals()
    cheap = (costs["ram"], costs["macs"], costs["flash"])
    if option.accuracy:
        return (0, -option.mean, *cheap)
    return (1, -(option.first or 0.0), *cheap)
