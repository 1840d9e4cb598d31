"""Matrix products of two tensors that change, in the forms that ExecuTorch runs fast.

With executorch 1.5.1 XNNPACK takes ``bmm`` of two operands that change, but not ``mm``, whose portable kernel is the slower one from two
rows on; and the portable ``addmm`` of a column and a row is slower than their broadcast product in XNNPACK.
"""

from typing import Any

import torch
from torch import Tensor


def mm(left: Tensor, right: Tensor) -> Any:
    """``bmm`` over a leading 1; a row vector times a matrix stays as it is."""
    return NotImplemented if left.shape[0] == 1 else torch.bmm(left.unsqueeze(0), right.unsqueeze(0)).squeeze(0)


def addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """A rank-one update as a product that broadcasts, another one as ``bmm`` over a leading 1."""
    if beta != 1 or alpha != 1 or left.shape[0] == 1:
        return NotImplemented
    if left.shape[1] == 1:
        return added + left * right
    return added + torch.bmm(left.unsqueeze(0), right.unsqueeze(0)).squeeze(0)


def baddbmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``bmm`` and what is added: the runtime has no kernel for both at once."""
    product = torch.bmm(left, right)
    if alpha != 1:
        product = product * alpha
    return product if beta == 0 else product + (added if beta == 1 else added * beta)
