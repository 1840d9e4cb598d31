"""Slices, repetition and tables, written as slices, padding, gathers and one scatter."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Slices of these lengths along one dimension."""
    ends = list(itertools.accumulate(sizes))
    return [x.narrow(dim, end - size, size) for end, size in zip(ends, sizes, strict=True)]


def split_equal(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    """Slices of one length; the last may be shorter."""
    total = x.shape[dim]
    return split_with_sizes(x, [min(size, total - start) for start in range(0, total, size)] if total else [0], dim)


def slice_backward(gradient: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """Zeros around, and with a step between, the slices of the gradient."""
    dim, size = dim % len(sizes), sizes[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    count = gradient.shape[dim]
    if step > 1:  # [count] -> [count, step] with zeros behind each value -> [count * step]
        spread = aten.constant_pad_nd(gradient.unsqueeze(dim + 1), pads(len(sizes) + 1, dim + 1, 0, step - 1))
        gradient = spread.reshape(*sizes[:dim], count * step, *sizes[dim + 1 :])
    behind = size - start - count * step  # below zero when the last zeros of a step reach beyond the end
    result: Tensor = aten.constant_pad_nd(gradient, pads(len(sizes), dim, start, behind))
    return result


def select_backward(gradient: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """Zeros around the gradient of one index."""
    dim = dim % len(sizes)
    index = index % sizes[dim]
    return slice_backward(gradient.unsqueeze(dim), sizes, dim, index, index + 1, 1)


def pads(rank: int, dim: int, before: int, behind: int) -> list[int]:
    """Padding of one dimension, in the order of ``constant_pad_nd``: last dimension first."""
    return [0, 0] * (rank - 1 - dim) + [before, behind]


def repeat(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The tensor as often as said along each dimension; new dimensions come in front."""
    x = x.reshape(*[1] * (len(counts) - x.dim()), *x.shape)
    sizes = [n * size for n, size in zip(counts, x.shape, strict=True)]
    apart = x.reshape([part for size in x.shape for part in (1, size)])
    return apart.expand([part for pair in zip(counts, x.shape, strict=True) for part in pair]).reshape(sizes)


def embedding(weight: Tensor, index: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Tensor:
    """Rows of a table: [*index, D] of ``weight`` [V, D]; the options change the gradient alone."""
    rows = weight.index_select(0, index.reshape(-1).to(torch.int64))
    return rows.reshape(*index.shape, weight.shape[1])


def embedding_dense_backward(gradient: Tensor, index: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Any:
    """The gradient of each row, added where it was read; the row for padding gets none."""
    if scale_grad_by_freq:
        return NotImplemented
    flat, size = index.reshape(-1, 1).to(torch.int64), gradient.shape[-1]
    gradient = gradient.reshape(-1, size)
    if padding_idx >= 0:
        gradient = torch.where(flat == padding_idx, 0.0, gradient)
    nothing = flat[:1] < flat[:1]  # zeros that are computed: a constant of this size would be stored in the bundle
    zeros = nothing.to(gradient.dtype).expand(rows, size)
    return zeros.scatter_add(0, flat.expand(-1, size), gradient)


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """``aten.index_add``: the gradient of ``index_select``, for one."""
    places = index.reshape(*[-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())]).expand(source.shape)
    return x.scatter_add(dim, places, source if alpha == 1 else source * alpha)
