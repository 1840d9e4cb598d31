"""When no learner keeps to the budget: the nearest budgets that one would."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgecl.planning.candidates import Candidate
from edgecl.planning.costs import Accountant
from edgecl.planning.limits import Limits
from edgecl.planning.space import Depth
from edgecl.tables import si, size
from edgecl_device.errors import EdgeclError

Bound = dict[str, int]


@dataclass(frozen=True)
class Near:
    """A learner just beyond the budget.

    Attributes:
        candidate: With its smallest replay memory.
        costs: By the names of the limits.
    """

    candidate: Candidate
    costs: Bound


class InfeasibleError(EdgeclError):
    """No learner keeps to the budget.

    Attributes:
        limits: The budget.
        alone: For each limit the learner that needs the least of it with the others kept, or None where no value of it is enough.
        least: The learner whose largest excess over a limit, as a factor, is the smallest.
    """

    def __init__(self, limits: Limits, alone: Mapping[str, Near | None], least: Near | None) -> None:
        self.limits, self.alone, self.least = limits, dict(alone), least
        super().__init__(_text(limits, alone, least))


def nearest(limits: Limits, found: Sequence[tuple[Depth, Candidate, Bound]], accounts: Accountant) -> InfeasibleError:
    """The refusal of a budget that no candidate keeps to.

    Exact costs are counted only of candidates whose lower bounds could still win.

    Args:
        limits: The budget; at least one.
        found: Every candidate with its depth and a lower bound of its costs.
        accounts: Counts costs.
    """
    alone: dict[str, Near | None] = {}
    for name in limits.given():
        rest = [entry for entry in found if limits.allow(entry[2], but=name)]
        alone[name] = _least(rest, accounts, lambda costs, name=name: costs[name], lambda costs, name=name: limits.allow(costs, but=name))  # type: ignore[misc]
    least = _least(found, accounts, lambda costs: excess(limits, costs), lambda costs: True)
    return InfeasibleError(limits, alone, least)


def excess(limits: Limits, costs: Mapping[str, int]) -> float:
    """The largest factor by which costs exceed a limit.

    >>> excess(Limits(ram=100, macs=10), {"ram": 150, "flash": 999, "macs": 12})
    1.5
    """
    return max(costs[name] / max(value, 1) for name, value in limits.given().items())


def _least(
    found: Sequence[tuple[Depth, Candidate, Bound]],
    accounts: Accountant,
    key: Callable[[Bound], float],
    allowed: Callable[[Bound], bool],
) -> Near | None:
    best: Near | None = None
    for depth, candidate, bound in sorted(found, key=lambda entry: key(entry[2])):
        if best is not None and key(bound) >= key(best.costs):
            break
        try:
            tight = accounts.tighter(depth, bound)
            if not allowed(tight) or (best is not None and key(tight) >= key(best.costs)):
                continue
            costs = accounts.exact(depth, candidate).totals()
        except EdgeclError:  # such a learner cannot be built, so that no budget is enough for it
            continue
        if allowed(costs) and (best is None or key(costs) < key(best.costs)):
            best = Near(candidate, costs)
    return best


def _text(limits: Limits, alone: Mapping[str, Near | None], least: Near | None) -> str:
    budget = ", ".join(f"--{name} {_number(name, value)}" for name, value in limits.given().items())
    parts = []
    for name, near in alone.items():
        if near is not None:
            parts.append(f"--{name} {near.costs[name]} with the rest kept ({near.candidate.words()})")
    apart = [f"--{name}" for name, near in alone.items() if near is None]
    if apart:
        parts.append(f"no value of {' or '.join(apart)} alone is enough")
    if least is not None:
        wanted = " ".join(f"--{name} {max(least.costs[name], value)}" for name, value in limits.given().items())
        parts.append(f"the least excess overall: {wanted} ({least.candidate.words()})")
    return f"{budget}: must allow some learner, none fits; nearest: {'; '.join(parts) or 'none, no learner suits this network'}"


def _number(name: str, value: int) -> str:
    return si(value) if name == "macs" else size(value)
