"""Input gradient of a convolution whose kernel is frozen: a plain convolution, for a runtime that packs frozen kernels.

At stride 1 the kernel is flipped and its channels change places, once, at export. A depthwise convolution with a stride meets the gradient
with zeros between its values, which a product with a frozen matrix of ones puts there; a dense one stays a transposed convolution, as most
of its products would be with those zeros. Source: Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning", section 4.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgecl.graph.rules import convolution as plain

aten = torch.ops.aten

MOST_POSITIONS = 1024
"""Of a map, up to which the input gradient of a 1x1 convolution is faster as a convolution than as a product (ONNX Runtime 1.31)."""


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """``aten.convolution`` with a frozen kernel and a bias that changes, for a runtime that packs both: the bias apart."""
    result = aten.convolution.default(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)
    return torch.add(result, bias.reshape(1, -1, *[1] * (x.dim() - 2)))


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
) -> Any:
    """``aten.convolution_backward`` with a frozen kernel; arguments as for :func:`edgecl.graph.rules.convolution.convolution_backward`."""
    pads = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    strided = prod(stride) > 1
    if transposed or not output_mask[0] or min(pads) < 0 or (strided and not _spreads(x, groups)):
        return NotImplemented
    if prod(weight.shape[2:]) == 1 and prod(x.shape[2:]) > MOST_POSITIONS:
        return NotImplemented
    spread = gradient
    if strided:
        sizes = [n - d * (k - 1) + 2 * p for n, d, k, p in zip(x.shape[2:], dilation, weight.shape[2:], padding, strict=True)]
        spread = _spread(gradient, stride, sizes)
    kernel, zeros = _flipped(weight, groups), [0] * len(stride)
    to_input = aten.convolution.default(spread, kernel, None, [1] * len(stride), pads, dilation, False, zeros, groups)
    rest = [False, *output_mask[1:]]
    others = plain.convolution_backward(
        gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, rest
    )
    return to_input, *others[1:]


def _spreads(x: Tensor, groups: int) -> bool:
    return groups == x.shape[1] > 1 and x.dim() < 5 and x.dtype == torch.float32


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """A kernel [O, C / groups, *taps] as [C, O / groups, *taps], its taps in reverse."""
    outputs, inner, *taps = weight.shape
    exchanged = weight.reshape(groups, outputs // groups, inner, *taps).transpose(1, 2).reshape(groups * inner, outputs // groups, *taps)
    return exchanged.flip(list(range(2, weight.dim())))


def _spread(gradient: Tensor, stride: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """[N, C, *out] with ``stride - 1`` zeros behind each value along every axis, [N, C, *sizes]."""
    *rows, width = gradient.shape
    factor = stride[-2] if len(stride) > 1 else 1
    ones = np.zeros((width, factor * sizes[-1]), np.float32)
    ones[np.arange(width), np.arange(width) * stride[-1]] = 1
    wide = torch.mm(gradient.reshape(-1, width), torch.from_numpy(ones))  # a row, and the zeros that follow it
    wide = wide.reshape(*rows[:-1], rows[-1] * factor, sizes[-1]) if len(stride) > 1 else wide.reshape(*rows, sizes[-1])
    return wide if len(stride) == 1 or wide.shape[2] == sizes[0] else wide.narrow(2, 0, sizes[0])
