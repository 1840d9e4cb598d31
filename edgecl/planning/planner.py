"""The planner: what fits into a budget, and which of it learns best on the user's own data."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgecl.console import Step, silent
from edgecl.methods._dropout import check_functions
from edgecl.planning.candidates import Candidate, candidates
from edgecl.planning.costs import Accountant, resized
from edgecl.planning.data import rows_of, thinned
from edgecl.planning.latents import At, Latents
from edgecl.planning.limits import Limits
from edgecl.planning.refusal import nearest
from edgecl.planning.result import Planned, Settings
from edgecl.planning.search import Option, Search
from edgecl.planning.simulate import Course, accuracy
from edgecl.planning.space import Depth, Network, opened, place_text, places
from edgecl.streams import Dataset, Stream
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import TensorSpec

Scenario = Callable[[Dataset, int], Stream]
"""Makes the stream of a data set, for a stream order."""

VARIED = 3
"""Best options of the first round of which variants are measured."""

FEWER_ROWS = 4
"""A variant's replay memory is smaller by this factor."""


def plan(
    network: Network,
    data: Dataset,
    scenario: Scenario,
    limits: Limits,
    settings: Settings | None = None,
    progress: Step = silent,
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

    def __init__(self, network: Network, data: Dataset, scenario: Scenario, limits: Limits, settings: Settings, progress: Step) -> None:
        self.network, self.data, self.scenario = network, thinned(data, settings.samples - len(data.y_test)), scenario
        self.limits, self.settings, self.progress = limits, settings, progress
        max_rows, data = len(data.y), self.data
        self.latents = Latents(network.model, network.preprocess, np.concatenate([data.x, data.x_test]))
        self.courses: dict[tuple[float, int], Course] = {}
        base = self.course(1.0, 0).base
        x = TensorSpec("x", network.example.shape, network.example.dtype.name)
        self.accounts = Accountant(x, settings.engine, settings.pending, self.latents, base)
        self.unsuited: Counter[str] = Counter()
        self.depths: dict[At, Depth] = {}
        self.hopeful: list[tuple[Depth, Candidate]] = []
        self.untried: dict[tuple[At, str, str], list[Candidate]] = {}
        self.most_rows = max_rows

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
        search = Search(
            self.measure,
            samples=lambda share: len(self.course(share, 0).stream),
            variants=self.variants,
            top=self.settings.top,
            orders=self.settings.orders,
            seconds=self.settings.seconds,
            progress=self.progress,
        )
        options = search.run(options)
        counts = {
            "depths": len(wanted),
            "depths_within_macs": len(near),
            "candidates": len(bounded) + sum(self.unsuited.values()),
            "within_lower_bounds": len(self.hopeful),
            "within_budget": len(options),
        }
        ranked = sorted(options, key=_rank)
        seconds = time.perf_counter() - start
        return Planned(self.limits, ranked, search.rounds, counts, dict(self.unsuited), len(self.data.y_test), seconds)

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
                    if isinstance(at, str) and getattr(candidate.config, "dropout", False):  # several places have no layers behind them
                        check_functions(self.network.model, at)
                    found.append((depth, candidate, self.accounts.bound(depth, candidate)))
                except EdgeclError as error:
                    self.unsuited[f"{candidate.method} at {place_text(at)}: {error}"] += 1
        return found

    def affordable(self, bounded: Sequence[tuple[Depth, Candidate, dict[str, int]]]) -> list[Option]:
        """Candidates within the budget, replay memories as large as it allows; of each family the first codec that fits."""
        self.hopeful = [(depth, candidate) for depth, candidate, bound in bounded if self._hope(depth, candidate, bound)]
        for _, candidate in self.hopeful:
            self.untried.setdefault(candidate.family, []).append(candidate)
        self.latents.want(depth.at for depth, _ in self.hopeful)
        found = []
        for done, codecs in enumerate(self.untried.values()):
            self.progress("counting costs on the graphs", done, len(self.untried))
            option = None
            while codecs and option is None:
                option = self._option(codecs.pop(0))
            found += [] if option is None else [option]
        return found

    def variants(self, options: Sequence[Option]) -> list[Option]:
        """Other codecs of the first options that store rows, and the same with a smaller memory."""
        varied = [option for option in options if option.costs.capacity_bytes is not None][:VARIED]
        found = []
        for done, option in enumerate(varied):
            self.progress("counting costs of other codecs", done, len(varied))
            others = [self._option(candidate) for candidate in self.untried.pop(option.candidate.family, [])]
            found += [other for other in others if other is not None]
            fewer = self._sized(option.candidate, option.costs.ledger["replay"] // FEWER_ROWS)
            found += [fewer] if fewer.costs.rows < option.costs.rows else []
        return found

    def _option(self, candidate: Candidate) -> Option | None:
        """A candidate with the largest memory that the budget allows, or None beyond it."""
        depth = self.depths[candidate.at]
        try:
            costs = self.accounts.exact(depth, candidate)
        except EdgeclError as error:
            self.unsuited[f"{candidate.method} at {place_text(depth.at)}: {error}"] += 1
            return None
        if not self.limits.allow(costs.totals()):
            return None
        if costs.capacity_bytes is None:
            return Option(candidate, costs)
        ram = self.limits.ram
        room = candidate.config.capacity_bytes if ram is None else ram - costs.totals()["ram"] + costs.capacity_bytes
        return self._sized(candidate, room)

    def _sized(self, candidate: Candidate, room: int) -> Option:
        """A candidate whose replay memory takes at most so many bytes."""
        depth = self.depths[candidate.at]
        return Option(*resized(self.accounts.exact(depth, candidate), candidate, depth, room, self.most_rows))

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
