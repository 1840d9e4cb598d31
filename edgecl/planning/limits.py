"""What a plan may cost, and what it costs: three totals over the ledger."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgecl.learner import update_macs
from edgecl.ledger import ram_bytes

FLASH = ("frozen_weights", "graphs", "state")
"""Entries of the ledger that ``--flash`` limits."""

LIMITS = ("ram", "flash", "macs")


@dataclass(frozen=True)
class Limits:
    """What a plan may cost; None is no limit.

    Attributes:
        ram: Most bytes of :data:`edgecl.ledger.RAM`.
        flash: Most bytes of :data:`FLASH`.
        macs: Most multiply-accumulates of one sample: the trunk once, and one update.
    """

    ram: int | None = None
    flash: int | None = None
    macs: int | None = None

    def given(self) -> dict[str, int]:
        """The limits that there are."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def allow(self, costs: Mapping[str, int], but: str | None = None) -> bool:
        """Whether costs by name keep to every limit, or to all but one."""
        return all(costs[name] <= value for name, value in self.given().items() if name != but)


@dataclass(frozen=True)
class Costs:
    """Exact costs of a candidate.

    Attributes:
        ledger: Bytes by name, as in the manifest.
        macs_by_step: Canonical multiply-accumulates of every step.
        capacity_bytes: Of its replay memory, None without one.
        rows: Replay rows that fit into it.
        refresh_every: Updates that share one run of the step ``refresh``; 0 without one.
    """

    ledger: dict[str, Any]
    macs_by_step: dict[str, int]
    capacity_bytes: int | None = None
    rows: int = 0
    refresh_every: int = 0

    @property
    def update_macs(self) -> int:
        """Of one update, with its share of ``refresh``."""
        return update_macs(self.macs_by_step, self.refresh_every)

    def totals(self) -> dict[str, int]:
        """What the limits are about."""
        return {
            "ram": ram_bytes(self.ledger),
            "flash": sum(self.ledger[name] for name in FLASH),
            "macs": self.macs_by_step["encode"] + self.update_macs,
        }
