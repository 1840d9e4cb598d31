"""Reductions in a form that keeps their precision on ExecuTorch.

The portable ``sum`` of executorch 1.5.1 adds up in float32 whatever the type, its ``mean`` does not.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


def sum_of(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """In float64 the mean times the number of terms; another sum stays."""
    if x.dtype != torch.float64 or dtype not in (None, torch.float64):
        return NotImplemented
    dims = list(dims or range(x.dim()))
    return x.mean(dims, keepdim) * float(prod(x.shape[dim] for dim in dims))
