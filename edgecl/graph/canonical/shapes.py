"""Slices, borders and enlargement, written as slices, padding and gathers of constant indices."""

import itertools
from collections.abc import Callable, Sequence
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


def upsample_nearest(x: Tensor, out: Sequence[int], *scales: float | None) -> Tensor:
    """Nearest neighbour, [N, C, ...] to any size: the element that each position of the output falls on."""
    for axis, (length, scale) in enumerate(zip(out, scales or [None] * len(out), strict=True), 2):
        size = x.shape[axis]
        step = size / length if scale is None else 1.0 / scale
        x = x.index_select(axis, torch.tensor([min(int(i * step), size - 1) for i in range(length)]))
    return x


def upsample_nearest_backward(gradient: Tensor, out: Sequence[int], sizes: Sequence[int], *scales: float | None) -> Any:
    """Sums over the copies of each element; whole factors only."""
    if any(length % size for length, size in zip(out, sizes[2:], strict=True)):
        return NotImplemented
    for axis, size in enumerate(sizes[2:], 2):
        gradient = gradient.reshape(*gradient.shape[:axis], size, -1, *gradient.shape[axis + 1 :]).sum(axis + 1)
    return gradient


def reflection_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Mirrored borders, without the edge itself."""
    return _pad_by_index(x, padding, lambda i, last: last - abs(last - abs(i)))


def replication_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Borders that repeat the edge."""
    return _pad_by_index(x, padding, lambda i, last: min(max(i, 0), last))


def _pad_by_index(x: Tensor, padding: Sequence[int], source: Callable[[int, int], int]) -> Tensor:
    for i in range(len(padding) // 2):
        axis, before, behind = x.dim() - 1 - i, padding[2 * i], padding[2 * i + 1]
        size = x.shape[axis]
        x = x.index_select(axis, torch.tensor([source(j, size - 1) for j in range(-before, size + behind)]))
    return x
