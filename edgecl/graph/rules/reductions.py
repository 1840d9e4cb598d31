"""Sums in forms that keep their digits on ExecuTorch.

The portable ``sum`` of executorch 1.5.1 adds one term after the other in float32, whatever the type: ten thousand equal terms lose three
of seven digits. Its ``mean`` adds in the type given, in the same way, and so does XNNPACK's, which takes a tenth of the time.
"""

from collections.abc import Sequence
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

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
    if x.dtype == torch.float32 and (first := _trailing(x.shape, axes)) is not None:
        return _sum_of_rows(x, first, axes, keepdim)
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
    return total if keepdim else total.reshape([size for axis, size in enumerate(total.shape) if axis not in axes])


def _trailing(shape: Sequence[int], axes: Sequence[int]) -> int | None:
    """The axis from which on all are summed, if the rows are long enough for a delegate and short enough for float32's digits."""
    first = len(shape)
    while first and (first - 1 in axes or shape[first - 1] == 1):
        first -= 1
    return first if LEAST_IN_ROWS <= prod(shape[first:]) <= LONG else None


def _rows(shape: Sequence[int], first: int) -> list[int]:
    """The shape of which XNNPACK takes a mean over the last two axes: channels, and their rows as maps one wide."""
    return [1, prod(shape[:first]), prod(shape[first:]), 1]


def _sum_of_rows(x: Tensor, first: int, axes: Sequence[int], keepdim: bool) -> Tensor:
    """XNNPACK's mean over the last axes, times their size; then the sum of what is left of the axes before."""
    length = prod(x.shape[first:])
    total = x.reshape(_rows(x.shape, first)).mean((2, 3), keepdim=True) * float(length)
    rest = [axis for axis in axes if axis < first]
    total = total.reshape([*x.shape[:first], *[1] * (x.dim() - first)])
    if rest:
        total = total.sum(rest, keepdim=True)
    return total if keepdim else total.reshape([size for axis, size in enumerate(total.shape) if axis not in axes])


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
    first = _trailing(x.shape, [dim % x.dim() for dim in dims or range(x.dim())])
    if first is not None and keepdim and list(x.shape) == _rows(x.shape, first):
        return NotImplemented
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
