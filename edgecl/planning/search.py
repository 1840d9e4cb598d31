"""Which candidates are worth measuring longer: successive halving over samples, then over stream orders.

Source: Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016 (successive
halving). Deviations: what no other candidate beats in accuracy, RAM, flash and MACs at once stays, too, so that the Pareto front
is measured on all samples; variants of the best ones (other codecs, smaller memories) join behind the first round; the last rounds
measure the best ones on more stream orders instead of more samples.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgecl.planning.candidates import Candidate
from edgecl.planning.limits import LIMITS, Costs
from edgecl_device.errors import EdgeclError

QUARTER = 0.25
"""Share of the training samples that the first round takes."""

FIRST, SECOND = 0.35, 0.75
"""Shares of the time after which the first and the second round begin no stream."""

FEW = 12
"""So few candidates go straight to all samples."""


@dataclass
class Option:
    """A candidate within the budget, and what was measured of it.

    Attributes:
        candidate: The learner, its replay memory as large as the budget allows.
        costs: What it costs.
        accuracy: By stream order, on all samples; empty when it was left behind before.
        first: On the first quarter of the samples; None when there was no such round.
        failed: Why it could not be measured.
    """

    candidate: Candidate
    costs: Costs
    accuracy: list[float] = field(default_factory=list)
    first: float | None = None
    failed: str = ""

    @property
    def mean(self) -> float:
        """Mean over the stream orders."""
        return statistics.fmean(self.accuracy)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the stream orders; None for one."""
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else None


@dataclass
class Round:
    """What one round did.

    Attributes:
        samples: Learned in a stream.
        order: Which stream order, from 1.
        options: To measure.
        measured: Of them, before the time was up.
    """

    samples: int
    order: int
    options: int
    measured: int = 0


Measure = Callable[[Candidate, float, int], float]
"""Accuracy of a candidate on a share of the samples in one stream order."""


def front(options: Sequence[Option], score: Callable[[Option], float]) -> list[Option]:
    """Options that no other one beats: at least as accurate and as cheap in everything, and better in something.

    >>> from edgecl.ledger import RAM
    >>> from edgecl.planning.limits import FLASH
    >>> def option(at, ram, right):
    ...     ledger = {**dict.fromkeys(RAM + FLASH, 0), "replay": ram}
    ...     return Option(Candidate(at, "ncm", None), Costs(ledger, {"encode": 0, "learn": 0}), [right])
    >>> some = [option("a", 9, 0.8), option("b", 5, 0.8), option("c", 1, 0.7)]
    >>> [option.candidate.at for option in front(some, lambda option: option.mean)]
    ['b', 'c']
    """
    points = [(-score(option), *(option.costs.totals()[name] for name in LIMITS)) for option in options]
    beaten = [any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in points) for mine in points]
    return [option for option, lost in zip(options, beaten, strict=True) if not lost]


@dataclass
class Search:
    """Measures options in place, the promising ones longer.

    Attributes:
        measure: Runs one stream.
        samples: Samples in the stream on a share of the training samples.
        variants: Further options beside some, which are the best ones of the first round, best first.
        top: Plans that are wanted.
        orders: Stream orders of the best ones.
        seconds: No new stream is begun after this time; one option of each of the first two rounds is measured in any case.
        progress: Called with what runs, options done and in all.
        rounds: What was done.
    """

    measure: Measure
    samples: Callable[[float], int]
    variants: Callable[[Sequence[Option]], list[Option]]
    top: int
    orders: int
    seconds: float
    progress: Callable[[str, int, int], None]
    rounds: list[Round] = field(default_factory=list)

    def run(self, options: Sequence[Option]) -> list[Option]:
        """Measure options within the budget; returns them with the variants that joined them."""
        start = time.monotonic()
        left = list(reversed(options))  # deep cuts are seldom the worst ones
        if len(left) > FEW:
            known = self._round("first quarter", left, QUARTER, 0, until=start + FIRST * self.seconds)
            ranked = sorted(known, key=_first, reverse=True)
            first = sorted(front(known, _first), key=_first, reverse=True)
            others = [option for option in ranked[: max(self.top, len(left) // 2)] if not any(option is kept for kept in first)]
            left = [*first, *others]
        paused = time.monotonic()
        more = self.variants(sorted(left, key=_first, reverse=True) if self.rounds else left)
        start += time.monotonic() - paused
        measured = self._round("all samples", _interleaved(left, more), 1.0, 0, until=start + SECOND * self.seconds)
        best = sorted(measured, key=lambda option: -option.mean)[: self.top]
        for order in range(1, self.orders):
            self._round(f"stream order {order + 1}", best, 1.0, order, until=start + self.seconds)
        return [*options, *more]

    def _round(self, name: str, options: Sequence[Option], share: float, order: int, until: float) -> list[Option]:
        """Measure options until a time; returns those that were measured."""
        self.rounds.append(Round(self.samples(share), order + 1, len(options)))
        found = []
        for done, option in enumerate(options):
            if time.monotonic() > until and (done or order):
                break
            self.progress(f"measuring accuracy, {name}", done, len(options))
            self.rounds[-1].measured += 1
            try:
                accuracy = self.measure(option.candidate, share, order)
            except EdgeclError as error:  # a method may refuse these samples; what it says stands in the result
                option.failed = str(error)
                continue
            if share < 1:
                option.first = accuracy
            else:
                option.accuracy.append(accuracy)
            found.append(option)
        return found


def _interleaved(some: Sequence[Option], others: Sequence[Option]) -> list[Option]:
    """Both, in turns, so that both are measured when the time is short."""
    pairs = itertools.zip_longest(some, others)
    return [option for pair in pairs for option in pair if option is not None]


def _first(option: Option) -> float:
    assert option.first is not None
    return option.first
