"""Which candidates are worth measuring longer: successive halving over samples, then over stream orders.

Source: Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016 (successive
halving). Deviations: what no other candidate beats in accuracy, RAM, flash and MACs at once stays, too, so that the Pareto front
is measured on all samples; the last round measures the best ones on more stream orders instead of more samples.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgecl.planning.costs import LIMITS, Costs
from edgecl.planning.space import Candidate
from edgecl_device.errors import EdgeclError

QUARTER = 0.25
"""Share of the training samples that the first round takes."""

FIRST, SECOND = 0.4, 0.8
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

    >>> from edgecl.planning.costs import FLASH, RAM
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


def search(
    options: Sequence[Option],
    measure: Measure,
    *,
    samples: Callable[[float], int],
    top: int,
    orders: int,
    seconds: float,
    progress: Callable[[str, int, int], None],
) -> list[Round]:
    """Measure options in place, the promising ones longer.

    Args:
        options: Within the budget.
        measure: Runs one stream.
        samples: Samples in the stream on a share of the training samples.
        top: Plans that are wanted.
        orders: Stream orders of the best ones.
        seconds: No new stream is begun after this time; one option a round is measured in any case.
        progress: Called with what runs, options done and in all.

    Returns:
        The rounds, in their order.
    """
    start, rounds = time.monotonic(), list[Round]()

    def late(share: float) -> bool:
        return time.monotonic() - start > share * seconds

    left = list(options)
    if len(left) > FEW:
        rounds.append(Round(samples(QUARTER), 1, len(left)))
        for done, option in enumerate(left):
            if done and late(FIRST):
                break
            progress("measuring accuracy, first quarter", done, len(left))
            option.first = _measured(option, measure, QUARTER, 0)
            rounds[-1].measured += 1
        known = [option for option in left if option.first is not None]
        ranked = sorted(known, key=_first, reverse=True)
        kept = {id(option) for option in [*ranked[: max(top, len(left) // 2)], *front(known, _first)]}
        left = [option for option in ranked if id(option) in kept]
    rounds.append(Round(samples(1.0), 1, len(left)))
    for done, option in enumerate(left):
        if done and late(SECOND):
            break
        progress("measuring accuracy, all samples", done, len(left))
        found = _measured(option, measure, 1.0, 0)
        option.accuracy += [] if found is None else [found]
        rounds[-1].measured += 1
    best = sorted((option for option in left if option.accuracy), key=lambda option: -option.mean)[:top]
    for order in range(1, orders):
        rounds.append(Round(samples(1.0), order + 1, len(best)))
        for done, option in enumerate(best):
            if late(1):
                return rounds
            progress(f"measuring accuracy, stream order {order + 1}", done, len(best))
            found = _measured(option, measure, 1.0, order)
            option.accuracy += [] if found is None else [found]
            rounds[-1].measured += 1
    return rounds


def _first(option: Option) -> float:
    assert option.first is not None
    return option.first


def _measured(option: Option, measure: Measure, share: float, order: int) -> float | None:
    try:
        return measure(option.candidate, share, order)
    except EdgeclError as error:  # a method may refuse these samples; what it says stands in the result
        option.failed = str(error)
        return None


def record(option: Option) -> Mapping[str, Any]:
    """Accuracies of an option as plain values."""
    return {
        "accuracy": option.mean if option.accuracy else None,
        "accuracy_sd": option.deviation,
        "accuracy_by_order": option.accuracy,
        "accuracy_first_quarter": option.first,
    }
