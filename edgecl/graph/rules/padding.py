"""Padding in the form that ExecuTorch runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def constant_pad_nd(x: Tensor, amounts: Sequence[int], value: float = 0.0) -> Any:
    """Slices where an amount is negative, which the portable kernel refuses when it runs; other padding stays as it is."""
    if min(amounts, default=0) >= 0:
        return NotImplemented
    for i in range(len(amounts) // 2):
        axis, before, behind = x.dim() - 1 - i, min(amounts[2 * i], 0), min(amounts[2 * i + 1], 0)
        if before or behind:
            x = x.narrow(axis, -before, x.shape[axis] + before + behind)
    rest = [max(amount, 0) for amount in amounts]
    return torch.ops.aten.constant_pad_nd(x, rest, value) if any(rest) else x
