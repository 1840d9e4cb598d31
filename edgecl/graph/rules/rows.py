"""Convolution whose kernel changes, on maps that lie channels last: rows [N * positions, C], a position's channels side by side.

A kernel that is state cannot be packed by a runtime beforehand, and the stock forms for that case are slow: a depthwise convolution is a
product for each channel, and a weight gradient a convolution with a kernel as large as the map. In rows a 1x1 convolution is one matrix
product without a transposition at any batch size, and a window is a few rows that are gathered, each one contiguous. Source of the windows
as columns: Chellapilla, Puri, Simard 2006, "High Performance Convolutional Neural Networks for Document Processing".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

Index = np.ndarray[Any, np.dtype[Any]]

MOST_POSITIONS = 128
"""Of a map, up to which its pointwise and depthwise convolutions are faster in rows (measured on ONNX Runtime 1.31, one thread:
a depthwise forward pass takes 0.26 of its time at 9 positions, 0.6 at 36 and 125, 1.1 at 144)."""

LEAST_CHANNELS = 4
"""Of a dense convolution: narrower rows cost more to gather than the product saves."""

NARROW = 2
"""A map so many times narrower than the other is the one whose rows are gathered."""


@dataclass(frozen=True)
class Window:
    """What a convolution's kernel meets, by shapes alone.

    Attributes:
        batch: N.
        channels: C of the input.
        outputs: O.
        sizes: Spatial sizes of the input.
        out: Those of the output.
        taps: Those of the kernel.
        stride: One a spatial dimension, like ``padding`` and ``dilation``.
        padding: Zeros on either side.
        dilation: Distance between taps.
        groups: Channel groups.
    """

    batch: int
    channels: int
    outputs: int
    sizes: tuple[int, ...]
    out: tuple[int, ...]
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls, x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> "Window":
        """From the shapes of the input [N, C, *sizes] and the kernel [O, C / groups, *taps]."""
        sizes, taps = tuple(x[2:]), tuple(weight[2:])
        out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(sizes, padding, dilation, taps, stride, strict=True))
        return cls(x[0], x[1], weight[0], sizes, out, taps, tuple(stride), tuple(padding), tuple(dilation), groups)

    @property
    def pointwise(self) -> bool:
        """Whether it is one matrix product over all positions."""
        return self.groups == 1 and prod(self.taps) == prod(self.stride) == 1 and not any(self.padding)

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a kernel of its own."""
        return self.groups == self.channels == self.outputs > 1

    @property
    def better_in_rows(self) -> bool:
        """Whether this form is faster than the runtime's own, where the kernel changes."""
        if self.pointwise or self.depthwise:
            return prod(self.sizes) <= MOST_POSITIONS
        return self.groups == 1 and min(self.channels, self.outputs) >= LEAST_CHANNELS

    @property
    def narrows(self) -> bool:
        """Whether the output is so much narrower that its rows are moved, behind the product, and not those of the input before it."""
        return self._moves and NARROW * self.outputs <= self.channels

    @property
    def widens(self) -> bool:
        """The same of the input, for the gradient."""
        return self._moves and NARROW * self.channels <= self.outputs

    @property
    def _moves(self) -> bool:
        return self.groups == 1 and prod(self.stride) == 1 and not self.pointwise

    def met(self) -> Index:
        """Row of the input that each tap of each output position meets, [N * out, taps]; one past the last row is padding."""
        rows = _joined([self._met_along(axis) for axis in range(len(self.sizes))], self.sizes)
        return _of_batch(rows, self.batch, prod(self.sizes))

    def meeting(self) -> Index:
        """Row of the output that meets each input position with each tap, [N * in, taps]; one past the last row is none."""
        rows = _joined([self._meeting_along(axis) for axis in range(len(self.sizes))], self.out)
        return _of_batch(rows, self.batch, prod(self.out))

    def _met_along(self, axis: int) -> Index:
        """Index along one axis of the input by [output position, tap]; -1 in the padding."""
        starts = np.arange(self.out[axis]) * self.stride[axis] - self.padding[axis]
        found = starts[:, None] + np.arange(self.taps[axis]) * self.dilation[axis]
        return np.where((found >= 0) & (found < self.sizes[axis]), found, -1)

    def _meeting_along(self, axis: int) -> Index:
        """Index along one axis of the output by [input position, tap]; -1 where there is none."""
        met = self._met_along(axis)
        found = np.full((self.sizes[axis], self.taps[axis]), -1)
        positions, taps = np.nonzero(met >= 0)
        found[met[positions, taps], taps] = positions
        return found


def _joined(axes: Sequence[Index], sizes: Sequence[int]) -> Index:
    """Flat index [positions, taps] over all axes, from the index along each; -1 where one of them is."""
    flat = np.zeros((1, 1), np.int64)
    for along, size in zip(axes, sizes, strict=True):
        one, other = flat[:, None, :, None], along[None, :, None, :]
        flat = np.where((one < 0) | (other < 0), -1, one * size + other).reshape(len(flat) * len(along), -1)
    return flat


def _of_batch(rows: Index, batch: int, positions: int) -> Index:
    """The same for every sample; what is outside is the row behind the last one. A table of int32 takes half the bytes of int64."""
    of_sample = np.where(rows < 0, batch * positions, rows + positions * np.arange(batch)[:, None, None])
    return of_sample.reshape(-1, rows.shape[1]).astype(np.int32)


def rows_of(plain: Tensor) -> Tensor:
    """A map [N, C, *sizes] as rows [N * positions, C]."""
    batch, channels, *sizes = plain.shape
    if prod(sizes) == 1:
        return plain.reshape(batch, channels)
    if batch == 1:  # a matrix: products take it transposed for nothing
        return plain.reshape(channels, -1).t()
    return plain.reshape(batch, channels, -1).transpose(1, 2).reshape(-1, channels)


def total(rows: Tensor) -> Tensor:
    """Sum over all rows [C]: a product with ones, as a runtime adds columns of a wide matrix one value at a time."""
    return torch.mm(rows.new_ones(1, rows.shape[0]), rows).reshape(-1)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """A convolution of rows.

    Args:
        x: float [N * in, C].
        weight: float [O, C / groups, *taps].
        bias: float [O], or None.
        window: Its shapes.

    Returns:
        float [N * out, O].
    """
    if window.depthwise:
        result = (_gathered(x, window.met()) * _by_tap(weight)).sum(1)
        return result if bias is None else result + bias
    if window.narrows:
        kernel = weight.reshape(*weight.shape[:2], -1).permute(2, 0, 1)
        found = _moved(x, kernel.reshape(-1, window.channels).t(), window.met())
        return found if bias is None else found + bias
    columns, kernel = x, weight
    if not window.pointwise:
        columns = _gathered(x, window.met()).reshape(-1, prod(window.taps) * window.channels)
        kernel = weight.reshape(*weight.shape[:2], -1).permute(0, 2, 1)
    matrix = kernel.reshape(window.outputs, -1).t()
    return torch.mm(columns, matrix) if bias is None else torch.addmm(bias, columns, matrix)


def input_gradient(gradient: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Gradient of a convolution of rows with respect to its input.

    Args:
        gradient: float [N * out, O].
        weight: float [O, C / groups, *taps].
        window: Its shapes.

    Returns:
        float [N * in, C].
    """
    if window.pointwise:
        return torch.mm(gradient, weight.reshape(window.outputs, window.channels))
    if window.widens:
        kernel = weight.reshape(*weight.shape[:2], -1).permute(0, 2, 1)
        return _moved(gradient, kernel.reshape(window.outputs, -1), window.meeting())
    meeting = _gathered(gradient, window.meeting())
    if window.depthwise:
        return (meeting * _by_tap(weight)).sum(1)
    kernel = weight.reshape(*weight.shape[:2], -1).permute(2, 0, 1)
    return torch.mm(meeting.reshape(meeting.shape[0], -1), kernel.reshape(-1, window.channels))


def weight_gradient(gradient: Tensor, x: Tensor, window: Window) -> Tensor:
    """Gradient of a convolution of rows with respect to its kernel.

    Args:
        gradient: float [N * out, O].
        x: float [N * in, C].
        window: Its shapes.

    Returns:
        float [O, C / groups, *taps].
    """
    taps = prod(window.taps)
    if window.pointwise:
        found = torch.mm(gradient.t(), x)
    elif window.depthwise:  # tap by tap, as a sum along rows is faster than one across them
        found = (_gathered(x, window.met().T.copy()) * gradient).sum(1).t()
    elif window.narrows:
        columns = _gathered(gradient, window.meeting().astype(np.int64)).reshape(-1, taps * window.outputs)
        found = torch.mm(columns.t(), x).reshape(taps, window.outputs, window.channels).permute(1, 2, 0)
    else:
        # gathered again, not kept from the forward pass: with an index of another type no optimiser takes both for one
        columns = _gathered(x, window.met().astype(np.int64)).reshape(-1, taps * window.channels)
        found = torch.mm(gradient.t(), columns).reshape(window.outputs, taps, window.channels).permute(0, 2, 1)
    return found.reshape(window.outputs, window.channels // window.groups, *window.taps)


def _moved(rows: Tensor, kernel: Tensor, index: Index) -> Tensor:
    """Every row's product with each tap, moved to where the tap puts it, and summed: only rows of the result's width are gathered.

    Source: Vasudevan, Anderson, Gregg 2017, "Parallel Multi Channel Convolution using General Matrix Multiplication" (kn2row).

    Args:
        rows: float [P, A].
        kernel: float [A, taps * B].
        index: Row that each tap of each position of the result meets, [Q, taps]; P is none.

    Returns:
        float [Q, B].
    """
    taps = index.shape[1]
    if index.max() == rows.shape[0]:  # zeros in front of the product, where they are fewer
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    products = torch.mm(rows, kernel).reshape(rows.shape[0] * taps, -1)
    places = (index.astype(np.int64) * taps + np.arange(taps)).T.astype(np.int32)
    return _gathered(products, places.copy()).sum(0)


def _gathered(rows: Tensor, index: Index) -> Tensor:
    """Rows by an index of two dimensions, [*index, C]; the one past the last is zeros."""
    if index.max() == rows.shape[0]:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows.index_select(0, torch.from_numpy(index.reshape(-1))).reshape(*index.shape, rows.shape[1])


def _by_tap(weight: Tensor) -> Tensor:
    """A depthwise kernel [C, 1, *taps] as [taps, C]."""
    return weight.reshape(weight.shape[0], -1).t()
