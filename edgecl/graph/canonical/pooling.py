"""Adaptive pooling, written as plain pooling or as means of slices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgecl.graph.canonical.resampling import windows, windows_backward
from edgecl.graph.canonical.shapes import pads

aten = torch.ops.aten


def adaptive_avg_pool2d(x: Tensor, out: Sequence[int]) -> Tensor:
    """Mean of each window: plain pooling where windows tile the input, else axis by axis, which is the same for rectangles."""
    tiles = _tiles(x, out)
    if tiles is not None:
        result: Tensor = aten.avg_pool2d(x, tiles, tiles)
        return result
    for axis, length in zip((-2, -1), out, strict=True):
        spans = _windows(x.shape[axis], length)
        x = torch.cat([x.narrow(axis, start, end - start).mean(axis, keepdim=True) for start, end in spans], axis)
    return x


def adaptive_avg_pool2d_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Each output's gradient, divided by the size of its window, on every element of the window."""
    tiles = _tiles(x, gradient.shape[-2:])
    if tiles is not None:
        result: Tensor = aten.avg_pool2d_backward(gradient, x, tiles, tiles, [0, 0], False, True, None)
        return result
    rank = gradient.dim()
    for axis in (rank - 2, rank - 1):
        size, parts = x.shape[axis], []
        for i, (start, end) in enumerate(_windows(size, gradient.shape[axis])):
            part = gradient.narrow(axis, i, 1) / (end - start)
            shape = list(part.shape)
            shape[axis] = end - start
            parts.append(aten.constant_pad_nd(part.expand(shape), pads(rank, axis, start, size - end)))
        gradient = sum(parts[1:], parts[0])
    return gradient


def adaptive_max_pool2d(x: Tensor, out: Sequence[int]) -> Any:
    """Plain pooling where windows tile the input, else of the windows laid side by side; indices are positions in what is pooled."""
    side_by_side, kernel, _ = _laid_out(x, out)
    return aten.max_pool2d_with_indices(side_by_side, kernel, kernel)


def adaptive_max_pool2d_backward(gradient: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """The gradient of the pooling, added up where windows overlap."""
    side_by_side, kernel, sources = _laid_out(x, gradient.shape[-2:])
    found = aten.max_pool2d_with_indices_backward(gradient, side_by_side, kernel, kernel, [0, 0], [1, 1], False, indices)
    return windows_backward(found, x.shape[-2:], sources)


def _laid_out(x: Tensor, out: Sequence[int]) -> tuple[Tensor, list[int], list[list[int]]]:
    return windows(x, [_windows(size, length) for size, length in zip(x.shape[-2:], out, strict=True)])


def _tiles(x: Tensor, out: Sequence[int]) -> list[int] | None:
    """Window sizes, when windows of one size lie side by side."""
    sizes = x.shape[-2:]
    return (
        None if any(size % length for size, length in zip(sizes, out, strict=True)) else [s // o for s, o in zip(sizes, out, strict=True)]
    )


def _windows(size: int, out: int) -> list[tuple[int, int]]:
    """Start and end of each adaptive window; they may overlap."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
