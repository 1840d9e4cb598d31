"""Views and simple operators in the forms that ExecuTorch's XNNPACK takes: it has no squeezes and no selection of one index.

A reshape costs nothing outside of XNNPACK either, where the others copy. ExecuTorch would write the rest in these forms by itself, in one
more pass over the whole program.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

LEAST_IN_ROW = 64
"""Values in a row from which on copies of rows are faster than choices of values."""


def unsqueeze(x: Tensor, dim: int) -> Tensor:
    """A reshape."""
    place = dim % (x.dim() + 1)
    return x.reshape([*x.shape[:place], 1, *x.shape[place:]])


def squeeze(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """A reshape; dimensions of more than one element stay."""
    dims = {d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in dims or size != 1])


def select(x: Tensor, dim: int, index: int) -> Tensor:
    """A slice of one index, reshaped."""
    dim, shape = dim % x.dim(), list(x.shape)
    start = index % shape.pop(dim)
    result: Tensor = torch.ops.aten.slice(x, dim, start, start + 1).reshape(shape)
    return result


def transpose(x: Tensor, first: int = 0, second: int = 1) -> Any:
    """A permutation."""
    if x.dim() < 2:
        return NotImplemented
    order = list(range(x.dim()))
    order[first], order[second] = order[second], order[first]
    return x.permute(order)


def rsub(x: Tensor, number: float, alpha: float = 1) -> Any:
    """A difference of tensors."""
    return torch.tensor(number, dtype=x.dtype) - x if x.is_floating_point() and alpha == 1 else NotImplemented


def clamp_min(x: Tensor, low: float) -> Tensor:
    """A clip with one limit."""
    return torch.clamp(x, low, None)


def where(chosen: Tensor, x: Tensor, other: Tensor) -> Any:
    """A choice between whole rows of some size as a copy of those chosen: the portable choice looks at each value."""
    if not chosen.dim():
        return NotImplemented
    rows, shape = chosen.numel(), torch.broadcast_shapes(chosen.shape, x.shape, other.shape)  # type: ignore[no-untyped-call]
    if chosen.dim() != x.dim() or chosen.shape[0] != rows or prod(shape[1:]) < LEAST_IN_ROW or x.dtype != other.dtype:
        return NotImplemented
    if any(t.dim() != len(shape) or t.shape[1:] != shape[1:] or t.shape[0] not in (1, rows) for t in (x, other)):
        return NotImplemented
    places = torch.arange(rows)
    first, second = (places if t.shape[0] == rows else torch.zeros_like(places) for t in (x, other))
    index = torch.where(chosen.reshape(rows), first, second + x.shape[0])
    return torch.cat([x, other]).index_select(0, index)
