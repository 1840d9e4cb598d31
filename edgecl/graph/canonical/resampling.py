"""Interpolation and borders, forward and backward, as gathers of constant indices.

What reads elements by constant indices along an axis has a gradient that adds them up again: each element gets the sum over the places that
read it. It is written as a few gathers, one for each time that an element is read at most, so that no runtime needs to scatter.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from edgecl.graph.canonical.shapes import pads

aten = torch.ops.aten


def read(x: Tensor, axis: int, index: Sequence[int]) -> Tensor:
    """The elements at these places of an axis; the tensor itself where those are all of them in order."""
    return x if list(index) == list(range(x.shape[axis])) else x.index_select(axis, torch.tensor(index))


def add_back(gradient: Tensor, axis: int, index: Sequence[int], size: int) -> Tensor:
    """The gradient of :func:`read`: for each of ``size`` elements, the sum of the gradient where ``index`` names it."""
    places: list[list[int]] = [[] for _ in range(size)]
    for place, source in enumerate(index):
        places[source].append(place)
    most = max(map(len, places))
    nothing = len(index)
    if most == 1 and list(index) == list(range(size)):
        return gradient
    if any(len(found) < most for found in places):  # a zero behind, for elements that are read less often than others
        gradient = aten.constant_pad_nd(gradient, pads(gradient.dim(), axis, 0, 1))
    total = None
    for i in range(most):
        part = read(gradient, axis, [found[i] if i < len(found) else nothing for found in places])
        total = part if total is None else total + part
    assert total is not None
    return total


def upsample_nearest(x: Tensor, out: Sequence[int], *scales: float | None) -> Tensor:
    """Nearest neighbour, [N, C, ...] to any size: the element that each position of the output falls on."""
    for axis, index in _nearest(x.shape, out, scales, 0.0):
        x = read(x, axis, index)
    return x


def upsample_nearest_backward(gradient: Tensor, out: Sequence[int], sizes: Sequence[int], *scales: float | None) -> Tensor:
    """Sums over the copies of each element; by whole factors they lie side by side."""
    for axis, index in reversed(list(_nearest(sizes, out, scales, 0.0))):
        gradient = _sum_of_copies(gradient, axis, index, sizes[axis])
    return gradient


def upsample_nearest_exact(x: Tensor, out: Sequence[int], *scales: float | None) -> Tensor:
    """The same from the middle of each position, as other libraries do it."""
    for axis, index in _nearest(x.shape, out, scales, 0.5):
        x = read(x, axis, index)
    return x


def upsample_nearest_exact_backward(gradient: Tensor, out: Sequence[int], sizes: Sequence[int], *scales: float | None) -> Tensor:
    """Sums over the copies of each element."""
    for axis, index in reversed(list(_nearest(sizes, out, scales, 0.5))):
        gradient = _sum_of_copies(gradient, axis, index, sizes[axis])
    return gradient


def _nearest(sizes: Sequence[int], out: Sequence[int], scales: Sequence[float | None], middle: float) -> list[tuple[int, list[int]]]:
    """Axis, and the source of each position of the output."""
    found = []
    for axis, (length, scale) in enumerate(zip(out, scales or [None] * len(out), strict=True), 2):
        step = _step(sizes[axis], length, scale)
        found.append((axis, [min(int(np.float32((i + middle) * step)), sizes[axis] - 1) for i in range(length)]))
    return found


def _step(size: int, length: int, scale: float | None) -> float:
    """Distance of two positions of the output in the input, as PyTorch rounds it: where one falls on an edge, the last bit decides."""
    return float(np.float32(size) / np.float32(length) if scale is None else np.float32(1.0 / scale))


def _sum_of_copies(gradient: Tensor, axis: int, index: list[int], size: int) -> Tensor:
    if len(index) % size == 0 and index == [i // (len(index) // size) for i in range(len(index))]:
        return gradient.reshape(*gradient.shape[:axis], size, -1, *gradient.shape[axis + 1 :]).sum(axis + 1)
    return add_back(gradient, axis, index, size)


def upsample_linear(x: Tensor, out: Sequence[int], align_corners: bool, *scales: float | None) -> Tensor:
    """Linear along each axis of [N, C, ...]: a weighted sum of the two nearest elements."""
    for axis, (low, high, share) in _linear(x, x.shape, out, align_corners, scales):
        x = read(x, axis, low) * (1.0 - share) + read(x, axis, high) * share
    return x


def upsample_linear_backward(
    gradient: Tensor, out: Sequence[int], sizes: Sequence[int], align_corners: bool, *scales: float | None
) -> Tensor:
    """The two shares of each position's gradient, added where its two elements are."""
    for axis, (low, high, share) in reversed(_linear(gradient, sizes, out, align_corners, scales)):
        size = sizes[axis]
        gradient = add_back(gradient * (1.0 - share), axis, low, size) + add_back(gradient * share, axis, high, size)
    return gradient


def _linear(
    like: Tensor, sizes: Sequence[int], out: Sequence[int], align_corners: bool, scales: Sequence[float | None]
) -> list[tuple[int, tuple[list[int], list[int], Tensor]]]:
    """Axis; both neighbours of each position of the output; and the share of the second, a constant that broadcasts."""
    found = []
    for axis, (length, scale) in enumerate(zip(out, scales or [None] * len(out), strict=True), 2):
        size = sizes[axis]
        if length == size:  # whatever the scale: so PyTorch defines it
            continue
        if align_corners:
            places = [i * (size - 1) / (length - 1) if length > 1 else 0.0 for i in range(length)]
        else:
            step = size / length if scale is None else 1.0 / scale
            places = [max((i + 0.5) * step - 0.5, 0.0) for i in range(length)]
        low = [min(int(place), size - 1) for place in places]
        share = torch.tensor([place - i for place, i in zip(places, low, strict=True)], dtype=like.dtype)
        found.append((axis, (low, [min(i + 1, size - 1) for i in low], share.reshape(-1, *[1] * (len(sizes) - 1 - axis)))))
    return found


def reflection_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Mirrored borders, without the edge itself."""
    return _pad(x, padding, _mirrored)


def reflection_pad_backward(gradient: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """What the borders got, added to the elements that they mirror."""
    return _pad_backward(gradient, x, padding, _mirrored)


def replication_pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """Borders that repeat the edge."""
    return _pad(x, padding, _edge)


def replication_pad_backward(gradient: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """What the borders got, added to the edge."""
    return _pad_backward(gradient, x, padding, _edge)


Source = Callable[[int, int], int]
"""Place within an axis, from one that may lie before or behind it, and the axis's last place."""


def _mirrored(i: int, last: int) -> int:
    return last - abs(last - abs(i))


def _edge(i: int, last: int) -> int:
    return min(max(i, 0), last)


def _sources(sizes: Sequence[int], padding: Sequence[int], source: Source) -> list[tuple[int, list[int]]]:
    found = []
    for i in range(len(padding) // 2):
        axis, before, behind = len(sizes) - 1 - i, padding[2 * i], padding[2 * i + 1]
        found.append((axis, [source(j, sizes[axis] - 1) for j in range(-before, sizes[axis] + behind)]))
    return found


def _pad(x: Tensor, padding: Sequence[int], source: Source) -> Tensor:
    for axis, index in _sources(x.shape, padding, source):
        x = read(x, axis, index)
    return x


def _pad_backward(gradient: Tensor, x: Tensor, padding: Sequence[int], source: Source) -> Tensor:
    for axis, index in reversed(_sources(x.shape, padding, source)):
        gradient = add_back(gradient, axis, index, x.shape[axis])
    return gradient


def windows(x: Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[Tensor, list[int], list[list[int]]]:
    """Windows that may overlap and differ in length, side by side; a short one repeats its last element.

    Args:
        x: [..., H, W].
        spans: Start and end of each window, for both axes.

    Returns:
        The windows [..., h * kh, w * kw], their size (kh, kw), and the source of each row and column.
    """
    kernel, sources = [], []
    for axis, parts in zip((x.dim() - 2, x.dim() - 1), spans, strict=True):
        longest = max(end - start for start, end in parts)
        index = [min(start + i, end - 1) for start, end in parts for i in range(longest)]
        x = read(x, axis, index)
        kernel.append(longest)
        sources.append(index)
    return x, kernel, sources


def windows_backward(gradient: Tensor, sizes: Sequence[int], sources: Sequence[Sequence[int]]) -> Tensor:
    """The gradient of :func:`windows` for an input [..., H, W] of these sizes: the sum over the places of each element."""
    rank = gradient.dim()
    for axis, size, index in zip((rank - 1, rank - 2), reversed(sizes), reversed(sources), strict=True):
        gradient = add_back(gradient, axis, index, size)
    return gradient
