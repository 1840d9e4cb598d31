"""Units of a weight: single values, or blocks of its output or input channels."""

import torch
from torch import Tensor


def by_unit(scores: Tensor, axis: int, block: int) -> Tensor:
    """Sum of the scores [O, I, ...] of each block of channels along an axis: [channels / block].

    >>> by_unit(torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]), 0, 2).tolist()
    [10.0, 1.0]
    """
    sums = scores.sum([a for a in range(scores.dim()) if a != axis])
    return sums if block == 1 else sums.reshape(-1, block).sum(1)


def channels_of(units: Tensor, block: int) -> Tensor:
    """The channels of blocks, int64 [k block].

    >>> channels_of(torch.tensor([2, 0]), 2).tolist()
    [4, 5, 0, 1]
    """
    return units if block == 1 else (units.unsqueeze(1) * block + torch.arange(block)).reshape(-1)
