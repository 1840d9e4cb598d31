"""Sums in forms that keep their digits on ExecuTorch.

The portable ``sum`` of executorch 1.5.1 adds one term after the other in float32, whatever the type: ten thousand equal terms lose three
of seven digits. Its ``mean`` adds in the type given, in the same way, and so does XNNPACK's, which takes a tenth of the time.
"""

from collections.abc import Sequence
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback

LONG = 256
"""Terms in a row that float32 may add; rounding errors of more are worth a second operator."""


LEAST_IN_ROWS = 16
"""Terms in a row, from which on XNNPACK's mean is faster than the portable sum."""


def sum_of(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """In float64 the mean times the number of terms; in float32 long sums in parts; another sum stays."""
    if not x.dim():
        return of_number(x, dims, keepdim, dtype=dtype)
    axes = [dim % x.dim() for dim in dims or range(x.dim())]
    count = prod(x.shape[axis] for axis in axes)
    if dtype not in (None, x.dtype) or count == 0:
        return NotImplemented
    if x.dtype == torch.float32 and _in_backward() and (first := _trailing(x.shape, axes)) is not None:
        sums, others = _means_of_rows(x, first) * float(prod(x.shape[first:])), [axis for axis in axes if axis < first]
        return _shaped(sums.sum(others, keepdim=True) if others else sums, axes, keepdim)
    if x.dtype == torch.float64:
        return x.mean(axes, keepdim) * float(count)
    parts = {axis: _divisor(x.shape[axis]) for axis in axes if x.shape[axis] > 1}
    if x.dtype != torch.float32 or count <= LONG:
        return NotImplemented
    total = x
    for axis in sorted(parts, reverse=True):
        rest = None
        if parts[axis] > 1:
            whole = total.shape[axis] // parts[axis] * parts[axis]
            if whole < total.shape[axis]:
                rest = total.narrow(axis, whole, total.shape[axis] - whole).sum([axis], keepdim=True)
                total = total.narrow(axis, 0, whole)
            before, after = total.shape[:axis], total.shape[axis + 1 :]
            total = total.reshape([*before, whole // parts[axis], parts[axis], *after]).sum([axis + 1])
        total = total.sum([axis], keepdim=True)
        total = total if rest is None else total + rest
    return _shaped(total, axes, keepdim)


def _in_backward() -> bool:
    """Whether the operator belongs to the backward pass, in whose sums the last digit does not matter: others may count whole numbers."""
    return (traceback.current_meta.get("custom") or {}).get("phase") == "backward"


def _shaped(result: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """A reduction of which every axis is left, without those that were reduced unless they stay."""
    return result if keepdim else result.reshape([size for axis, size in enumerate(result.shape) if axis not in axes])


def _trailing(shape: Sequence[int], axes: Sequence[int]) -> int | None:
    """The axis from which on all are summed, if the rows are long enough for a delegate and short enough for float32's digits."""
    first = len(shape)
    while first and (first - 1 in axes or shape[first - 1] == 1):
        first -= 1
    return first if LEAST_IN_ROWS <= prod(shape[first:]) <= LONG else None


def _means_of_rows(x: Tensor, first: int) -> Tensor:
    """Means over all axes from one on, as XNNPACK takes them: over the last two axes of maps, here one wide."""
    rows = x.reshape(1, prod(x.shape[:first]), prod(x.shape[first:]), 1)
    return rows.mean((2, 3), keepdim=True).reshape([*x.shape[:first], *[1] * (x.dim() - first)])


def of_number(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Sum or mean of one number over axes that it does not have, which runtimes refuse and PyTorch does not."""
    if x.dim() or dtype not in (None, x.dtype):
        return NotImplemented
    return x.reshape(()) if x.dtype.is_floating_point else x.reshape(()).to(torch.int64)  # a sum of integers is an int64


def mean_of(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """In float32 a long mean is the sum over its count: the portable ``mean`` adds one term after the other, too."""
    if not x.dim():
        return of_number(x, dims, keepdim, dtype=dtype)
    if x.dtype != torch.float32:
        return NotImplemented
    axes = [dim % x.dim() for dim in dims or range(x.dim())]
    first = _trailing(x.shape, axes)
    if first is not None:
        if x.dim() == 4 and keepdim and sorted(axes) == [2, 3]:
            return NotImplemented
        means, others = _means_of_rows(x, first), [axis for axis in axes if axis < first]
        return _shaped(means.mean(others, keepdim=True) if others else means, axes, keepdim)
    total = sum_of(x, dims, keepdim, dtype=dtype)
    return total if total is NotImplemented else total / float(prod(x.shape[dim] for dim in dims or range(x.dim())))


def sum_of_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    """:func:`sum_of` over every axis."""
    if not x.dim() or dtype not in (None, x.dtype):
        return NotImplemented
    found = sum_of(x, None)
    return x.sum(list(range(x.dim()))) if found is NotImplemented else found


def _divisor(size: int) -> int:
    """Of a long axis the length of its parts, its largest divisor near the square root; the root, with a rest, where none is; else 1."""
    root = isqrt(size)
    return next((k for k in range(root, root // 2, -1) if size % k == 0), root) if size > LONG else 1
