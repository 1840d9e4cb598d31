"""Pooling, forward and backward, in operators that inference runtimes have and agree on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def max_pool2d_with_indices_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Each output's gradient is added where its maximum was; windows may overlap.

    Args:
        gradient: float [N, C, h, w].
        x: float [N, C, H, W].
        kernel: Not used: the indices hold all that is needed, as with the next four.
        stride: Not used.
        padding: Not used.
        dilation: Not used.
        ceil_mode: Not used.
        indices: int64 [N, C, h, w], positions within a plane of ``x``.
    """
    planes, size = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    places = indices.reshape(planes, -1)
    nothing = places[:, :1] < places[:, :1]  # zeros that are computed: a constant of this size would be stored in the bundle
    zeros = nothing.to(x.dtype).expand(planes, size)
    return zeros.scatter_add(1, places, gradient.reshape(planes, -1)).reshape(x.shape)


def avg_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Average pooling; kept as it is unless its windows differ in size, which runtimes count differently."""
    kernel, stride, padding = _pair(kernel), _pair(stride or kernel), _pair(padding)
    if not ceil_mode and (count_include_pad or not any(padding)) and divisor_override is None:
        return NotImplemented
    out = [_out_size(n, k, s, p, ceil_mode) for n, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    reach = [(o - 1) * s + k for o, s, k in zip(out, stride, kernel, strict=True)]
    padded = aten.constant_pad_nd(x, _pad_to(x, padding, reach), 0.0)
    sums = aten.convolution.default(
        padded, torch.ones(x.shape[1], 1, *kernel, dtype=x.dtype), None, stride, [0, 0], [1, 1], False, [0, 0], x.shape[1]
    )
    return sums * _inverse_divisor(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Spread each output's gradient over its window: a repeat where windows tile the input, else a transposed convolution."""
    kernel, stride, padding = _pair(kernel), _pair(stride or kernel), _pair(padding)
    batch, channels, height, width = x.shape
    scaled = gradient * _inverse_divisor(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if kernel == stride and not any(padding) and height % kernel[0] == 0 and width % kernel[1] == 0:
        rows, columns = gradient.shape[2:]
        tiles = scaled.reshape(batch, channels, rows, 1, columns, 1)
        return tiles.expand(batch, channels, rows, kernel[0], columns, kernel[1]).reshape(x.shape)
    ones = torch.ones(channels, 1, *kernel, dtype=x.dtype)
    spread = aten.convolution.default(scaled, ones, None, stride, [0, 0], [1, 1], True, [0, 0], channels)
    cropped: Tensor = aten.constant_pad_nd(spread, [-n for n in _pad_to(x, padding, list(spread.shape[2:]))], 0.0)
    return cropped


def _pair(value: Sequence[int]) -> list[int]:
    return list(value) * 2 if len(value) == 1 else list(value)


def _out_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    span = size + 2 * padding - kernel
    out = span // stride + 1
    if ceil_mode and span % stride and out * stride < size + padding:
        out += 1  # PyTorch keeps the last window only when it starts inside the input or its left padding
    return out


def _pad_to(x: Tensor, padding: Sequence[int], reach: Sequence[int]) -> list[int]:
    """Padding (last dimension first) that makes the input as long as its windows reach."""
    pads: list[int] = []
    for size, before, length in reversed(list(zip(x.shape[2:], padding, reach, strict=True))):
        pads += [before, length - before - size]
    return pads


def _inverse_divisor(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> float | Tensor:
    """One over the number of elements that each window counts: a number, or a constant [1, 1, h, w]."""
    if divisor_override is not None:
        return 1.0 / divisor_override
    counts = []
    for size, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True):
        starts = [i * s - p for i in range(_out_size(size, k, s, p, ceil_mode))]
        ends = [min(start + k, size + p) for start in starts]
        if count_include_pad:
            counts.append([end - start for start, end in zip(starts, ends, strict=True)])
        else:
            counts.append([min(end, size) - max(start, 0) for start, end in zip(starts, ends, strict=True)])
    if all(len(set(axis)) == 1 for axis in counts):
        return 1.0 / (counts[0][0] * counts[1][0])
    rows, columns = (torch.tensor(axis, dtype=x.dtype) for axis in counts)
    return 1.0 / (rows[:, None] * columns[None, :])[None, None]
