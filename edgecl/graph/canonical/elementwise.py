"""Activations and elementary functions, written out."""

import torch
from torch import Tensor


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``log(1 + exp(beta * x)) / beta`` without overflow; linear above the threshold, as PyTorch defines it."""
    scaled = x * beta
    smooth = scaled.clamp_min(0.0) + torch.log(1.0 + torch.exp(-scaled.abs()))
    return torch.where(scaled > threshold, x, smooth / beta)


def expm1(x: Tensor) -> Tensor:
    """``exp(x) - 1`` as ``tanh(x / 2) * (exp(x) + 1)``, exact near zero, too."""
    return torch.tanh(x * 0.5) * (torch.exp(x) + 1.0)
