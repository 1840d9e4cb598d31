"""Activations and elementary functions, written out."""

import torch
from torch import Tensor


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``log(1 + exp(beta * x)) / beta`` without overflow; linear above the threshold, as PyTorch defines it."""
    scaled = x * beta
    smooth = scaled.clamp_min(0.0) + torch.log(1.0 + torch.exp(-scaled.abs()))
    return torch.where(scaled > threshold, x, smooth / beta)


def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax, and zeros where every element is masked by minus infinity, as attention needs it."""
    empty = x.amax(dim, keepdim=True) == -torch.inf
    return torch.where(empty, 0.0, torch.softmax(x, dim))


def expm1(x: Tensor) -> Tensor:
    """``exp(x) - 1`` as ``tanh(x / 2) * (exp(x) + 1)``, exact near zero, too."""
    return torch.tanh(x * 0.5) * (torch.exp(x) + 1.0)


def mish(x: Tensor) -> Tensor:
    """``x * tanh(softplus(x))``."""
    return x * torch.tanh(softplus(x))


def log1p(x: Tensor) -> Tensor:
    """``log(1 + x)``, exact near zero, too: there it is scaled by what the sum lost in rounding."""
    total = 1.0 + x
    added = total - 1.0
    nothing = added == 0
    near = torch.where(nothing, x, torch.log(total) * (x / torch.where(nothing, 1.0, added)))
    return torch.where(x > 0.5, torch.log(total), near)
