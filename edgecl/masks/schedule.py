"""How many units live, and how many are exchanged: a mask grows before a task, shrinks after its start, and is regrown in between."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Counts of one layer.

    Attributes:
        units: Weights, or blocks of channels, that there are.
        density: Share of them that lives.
        grow: Share of ``units`` that lives beyond that while a task is new (``p_inter``).
        exchange: Share of ``units`` that a refresh drops and grows again elsewhere (``p_intra``).

    Source: Wang et al., SparCL, NeurIPS 2022 (TDM): expand before a task, shrink after some epochs, drop and regrow in between. A share
    above zero is at least one unit.

    >>> layer = Schedule(64, density=0.25, grow=0.02, exchange=0.01)
    >>> layer.base, layer.most, layer.exchanged
    (16, 18, 1)
    >>> [count.item() for count in layer.counts(torch.tensor([16]), torch.tensor([True]))]  # of 16 that live, when a task begins
    [16, 2]
    >>> [count.item() for count in layer.counts(torch.tensor([18]), torch.tensor([False]))]  # shrinks again
    [15, 1]
    """

    units: int
    density: float
    grow: float = 0.0
    exchange: float = 0.0

    @property
    def base(self) -> int:
        """Units that live, at least one."""
        return min(self.units, max(1, round(self.density * self.units)))

    @property
    def most(self) -> int:
        """Units that live while a task is new: the room that a state needs."""
        return min(self.units, self.base + math.ceil(self.grow * self.units))

    @property
    def exchanged(self) -> int:
        """Units dropped and grown in one refresh; fewer than live, and no more than are free."""
        return min(math.ceil(self.exchange * self.units), self.base - 1, self.units - self.most)

    @property
    def most_grown(self) -> int:
        """Units that can grow in one refresh, or 1 where none can: the length of a list."""
        return max(1, self.exchanged, self.most - self.base)

    def counts(self, live: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Units that survive a refresh, and units that grow: int64 [1] each.

        Args:
            live: int64 [1], units that live.
            new: bool [1], whether the task is new.
        """
        total = new.to(torch.int64) * (self.most - self.base) + self.base
        survive = torch.minimum(total - self.exchanged, live)
        return survive, total - survive
