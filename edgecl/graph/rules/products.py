"""Convolution as matrix products: for a kernel that changes, on a runtime whose convolution packs frozen kernels only.

The windows of the input become columns [groups, C / groups * taps, N * positions] by shifted slices; forward pass, input gradient and
weight gradient are then one ``bmm`` each, over the groups. Source: Chellapilla, Puri, Simard 2006, "High Performance
Convolutional Neural Networks for Document Processing" (im2col).
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``aten.convolution`` as one product over the groups.

    Args:
        x: float [N, C, *in].
        weight: float [O, C / groups, *kernel].
        bias: float [O], or None.
        stride: One a spatial dimension, like ``padding`` and ``dilation``.
        padding: Zeros on either side.
        dilation: Distance between kernel taps.
        transposed: Whether it is a transposed convolution; ``weight`` is then [C, O / groups, *kernel].
        output_padding: Size of the output of a transposed one beyond what its windows reach.
        groups: Channel groups.
    """
    if transposed:
        result = _transposed(x, weight, stride, padding, dilation, output_padding, groups)
        return result if bias is None else result + bias.reshape(1, -1, *[1] * (x.dim() - 2))
    windows = _Windows(x.shape, weight.shape, stride, padding, dilation, groups)
    result = windows.from_groups(torch.bmm(windows.kernel(weight), windows.columns(x)))
    return result if bias is None else result + bias.reshape(1, -1, *[1] * (x.dim() - 2))


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``aten.convolution_backward`` as one product over the groups for each gradient that the mask asks for.

    Arguments as for :func:`convolution`; ``gradient`` is float [N, O, *out].
    """
    to_input = to_weight = None
    if transposed:  # the input gradient of a plain convolution, in which input and gradient change places
        windows = _Windows(gradient.shape, weight.shape, stride, padding, dilation, groups, x.shape[2:])
        columns = windows.columns(gradient)
        if output_mask[0]:
            to_input = windows.from_groups(torch.bmm(windows.kernel(weight), columns))
        if output_mask[1]:
            to_weight = windows.weight_gradient(windows.to_groups(x), columns).reshape(weight.shape)
        return to_input, to_weight, gradient.sum([0, *range(2, gradient.dim())]) if output_mask[2] else None
    windows = _Windows(x.shape, weight.shape, stride, padding, dilation, groups)
    grouped = windows.to_groups(gradient)
    if output_mask[0]:
        to_input = windows.input_gradient(gradient, weight)
    if output_mask[1]:
        to_weight = windows.weight_gradient(grouped, windows.columns(x)).reshape(weight.shape)
    to_bias = gradient.sum([0, *range(2, gradient.dim())]) if output_mask[2] else None
    return to_input, to_weight, to_bias


def _transposed(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """What a plain convolution's input gradient is, for an output gradient ``x``."""
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + rest
        for n, s, p, d, k, rest in zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], output_padding, strict=True)
    ]
    shape = (x.shape[0], weight.shape[1] * groups, *sizes)
    return _Windows(shape, weight.shape, stride, padding, dilation, groups, x.shape[2:]).input_gradient(x, weight)


class _Windows:
    """Shapes of one convolution, and the ways between tensors and columns."""

    def __init__(
        self,
        shape: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        out: Sequence[int] | None = None,
    ) -> None:
        self.batch, self.channels, *self.sizes = shape
        self.outputs, _, *self.taps = kernel
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups
        self.out = list(out or ()) or [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.sizes, self.padding, self.dilation, self.taps, self.stride, strict=True)
        ]
        self.positions = prod(self.out)

    def kernel(self, weight: Tensor) -> Tensor:
        """[groups, O / groups, C / groups * taps]."""
        return weight.reshape(self.groups, self.outputs // self.groups, -1)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """[N, C, *in]: at stride 1 a convolution of the gradient with the taps in reverse; else what columns add up to.

        Source: Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning", section 4.
        """
        pads = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.taps, self.padding, strict=True)]
        inner, outer = self.channels // self.groups, self.outputs // self.groups
        exchanged = (self.channels, outer, *self.taps)
        back = _Windows(gradient.shape, exchanged, [1] * len(pads), pads, self.dilation, self.groups)
        if prod(self.stride) > 1 or min(pads, default=0) < 0 or back.out != self.sizes:
            return self.input_of(torch.bmm(self.kernel(weight).transpose(1, 2), self.to_groups(gradient)))
        kernel = weight.reshape(self.groups, outer, inner, -1).transpose(1, 2).reshape(self.groups, inner, -1)
        return back.from_groups(torch.bmm(kernel, back.columns(gradient, reverse=True)))

    def weight_gradient(self, grouped: Tensor, columns: Tensor) -> Tensor:
        """[groups, O / groups, C / groups * taps], of a gradient in groups; of two products the one in which less is transposed.

        A product with a single row is slower than its terms and their sum.
        """
        outputs, terms, inner = grouped.shape[1], grouped.shape[2], columns.shape[1]
        if outputs == 1:
            return (columns * grouped).sum(2)
        if outputs * (terms + inner) < inner * terms:
            return torch.bmm(columns, grouped.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(grouped, columns.transpose(1, 2))

    def columns(self, x: Tensor, reverse: bool = False) -> Tensor:
        """The input's windows, [groups, C / groups * taps, N * positions], their taps in order or in reverse."""
        x = _pad(x, [n for p in reversed(self.padding) for n in (p, p)])
        taps = sorted(self._all_taps(), reverse=reverse)
        rows = [self._tap(x, tap).reshape(self.batch, self.channels, 1, self.positions) for tap in taps]
        stacked = torch.cat(rows, 2) if len(rows) > 1 else rows[0]
        inner = self.channels // self.groups * len(rows)
        if self.batch == 1:
            return stacked.reshape(self.groups, inner, self.positions)
        return stacked.permute(1, 2, 0, 3).reshape(self.groups, inner, self.batch * self.positions)

    def input_of(self, columns: Tensor) -> Tensor:
        """What columns add up to in the input, [N, C, *in]: the transpose of :meth:`columns`."""
        taps = list(self._all_taps())
        stacked = columns.reshape(self.channels, len(taps), self.batch, self.positions).permute(2, 0, 1, 3)
        total = None
        for i, tap in enumerate(taps):
            part = self._place(stacked.narrow(2, i, 1).reshape(self.batch, self.channels, *self.out), tap)
            total = part if total is None else total + part
        assert total is not None
        return _pad(total, [-n for p in reversed(self.padding) for n in (p, p)])

    def to_groups(self, y: Tensor) -> Tensor:
        """[N, O, *out] as [groups, O / groups, N * positions]."""
        if self.batch > 1:
            y = y.transpose(0, 1)
        return y.reshape(self.groups, self.outputs // self.groups, self.batch * self.positions)

    def from_groups(self, y: Tensor) -> Tensor:
        """The reverse of :meth:`to_groups`."""
        y = y.reshape(self.outputs, self.batch, *self.out)
        return y.transpose(0, 1) if self.batch > 1 else y.reshape(1, self.outputs, *self.out)

    def _all_taps(self) -> Iterator[tuple[int, ...]]:
        return product(*(range(0, k * d, d) for k, d in zip(self.taps, self.dilation, strict=True)))

    def _tap(self, padded: Tensor, tap: tuple[int, ...]) -> Tensor:
        """What one tap of the kernel meets, [N, C, *out]."""
        for axis, (start, n, s) in enumerate(zip(tap, self.out, self.stride, strict=True), 2):
            if (start, n, s) != (0, padded.shape[axis], 1):
                padded = torch.ops.aten.slice(padded, axis, start, start + (n - 1) * s + 1, s)
        return padded

    def _place(self, y: Tensor, tap: tuple[int, ...]) -> Tensor:
        """[N, C, *out] at the places of the padded input that one tap meets; zeros elsewhere."""
        pads: list[int] = []
        for axis, (start, size, p, s) in enumerate(zip(tap, self.sizes, self.padding, self.stride, strict=True), 2):
            if s > 1 and y.shape[axis] > 1:
                y = _spread(y, axis, s)
            pads = [start, size + 2 * p - start - y.shape[axis], *pads]
        return _pad(y, pads)


def _spread(y: Tensor, axis: int, stride: int) -> Tensor:
    """``stride - 1`` zeros between neighbours along an axis."""
    n = y.shape[axis]
    y = y.unsqueeze(axis + 1)
    y = _pad(y, [0, 0] * (y.dim() - axis - 2) + [0, stride - 1])
    y = y.flatten(axis, axis + 1)
    return y.narrow(axis, 0, (n - 1) * stride + 1)


def _pad(x: Tensor, amounts: Sequence[int]) -> Tensor:
    """Zeros on both sides of the last dimensions, last first; negative amounts crop."""
    if not any(amounts):
        return x
    result: Tensor = torch.ops.aten.constant_pad_nd(x, list(amounts), 0.0)
    return result
