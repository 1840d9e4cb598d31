"""The best of scores, in operators of fixed shape: how many may depend on the state, and equal scores go to the lower index."""

import torch
from torch import Tensor


def top(scores: Tensor, count: Tensor, most: int) -> Tensor:
    """Which ``count`` scores are the highest: bool [n]; of equal ones, those of the lowest index, on every runtime.

    Args:
        scores: [n], of float32 or int64.
        count: int64 [1]; zero or less chooses none, above ``most`` so many.
        most: At most n.

    >>> top(torch.tensor([1.0, 3.0, 3.0, 3.0]), torch.tensor([2]), 3).tolist()
    [False, True, True, False]
    """
    count = count.clamp(0, most)  # whatever a state holds, no place is beyond the list
    values, _ = torch.topk(scores, most)
    last = values.index_select(0, (count - 1).clamp_min(0))
    above, level = scores > last, scores == last
    room = count - above.to(torch.int64).sum().reshape(1)
    return (above | (level & (level.to(torch.int64).cumsum(0) <= room))) & (count > 0)


def places(chosen: Tensor, count: int) -> Tensor:
    """Indices of the chosen ones in rising order, int64 [count]; behind them, where there are fewer, those of others.

    >>> places(torch.tensor([False, True, False, True]), 3).tolist()
    [1, 3, 0]
    """
    n = chosen.shape[0]
    order = torch.arange(n, 0, -1)
    _, found = torch.topk(torch.where(chosen, order, order - n), count)
    return found


def slots(places_: Tensor, live: Tensor, units: int) -> Tensor:
    """For each of ``units`` its place in a list, counted from one, zero for those that are not there: int64 [units].

    Args:
        places_: int64 [k], different units.
        live: bool [k]; entries that do not count are false.
        units: Above every entry.

    >>> slots(torch.tensor([2, 0, 1]), torch.tensor([True, True, False]), 4).tolist()
    [2, 0, 1, 0]
    """
    k = places_.shape[0]
    found = (places_.unsqueeze(0) == torch.arange(units).unsqueeze(1)) & live.unsqueeze(0)
    return torch.where(found, torch.arange(1, k + 1).unsqueeze(0), 0).amax(1)
