"""Masks as bitmaps: one bit a weight, lowest first, byte after byte; a float32 mask, as most research code keeps, is 32 times that."""

import torch
from torch import Tensor

BITS = 8


def pack(mask: Tensor) -> Tensor:
    """A mask, bool [n], as uint8 [ceil(n / 8)], bits beyond the last zero.

    >>> pack(torch.tensor([True, False, True] + 6 * [False] + [True])).tolist()
    [5, 2]
    """
    count = -(-mask.shape[0] // BITS)
    bits = torch.constant_pad_nd(mask.to(torch.float32), [0, count * BITS - mask.shape[0]])
    return (bits.reshape(count, BITS) * _powers(1.0)).sum(1).to(torch.uint8)


def unpack(bitmap: Tensor, count: int) -> Tensor:
    """The inverse of :func:`pack`: bool [count].

    >>> unpack(torch.tensor([5, 2], dtype=torch.uint8), 10).tolist()
    [True, False, True, False, False, False, False, False, False, True]
    """
    value = bitmap.to(torch.float32).unsqueeze(1)
    # in float32, as runtimes have few kernels for integers: a byte times a power of two is exact
    shifted, halved = (value * _powers(-1.0)).floor(), (value * (_powers(-1.0) * 0.5)).floor()
    return (shifted - halved * 2.0).reshape(-1)[:count] > 0


def _powers(sign: float) -> Tensor:
    return torch.tensor([2.0 ** (sign * i) for i in range(BITS)]).unsqueeze(0)
