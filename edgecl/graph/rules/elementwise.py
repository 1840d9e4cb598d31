"""Gradients of activations and of the softmax, written out."""

import math

import torch
from torch import Tensor


def threshold_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Gradient of ReLU: passes where the input (or the output) is above the threshold."""
    return torch.where(x > threshold, gradient, 0.0)


def hardtanh_backward(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Gradient of a clip, ReLU6 among them: passes strictly between both limits, where a narrower clip changes nothing."""
    inside = torch.clamp(x, _next(low, torch.inf), _next(high, -torch.inf))
    return torch.where(x == inside, gradient, 0.0)


def threshold_backward_by_product(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """:func:`threshold_backward` as a product, which ONNX Runtime computes in less time than a choice."""
    return gradient * (x > threshold).to(gradient.dtype)


def hardtanh_backward_by_product(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """:func:`hardtanh_backward` as a product, which ONNX Runtime computes in less time than a choice."""
    inside = torch.clamp(x, _next(low, torch.inf), _next(high, -torch.inf))
    return gradient * (x == inside).to(gradient.dtype)


def threshold_backward_by_clip(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """:func:`threshold_backward` as a product with a clip, which XNNPACK computes: it has no comparison and no choice."""
    return _masked(gradient, x - threshold if threshold else x)


def hardtanh_backward_by_clip(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """:func:`hardtanh_backward` as a product with a clip, which XNNPACK computes: it has no comparison and no choice.

    Between both limits, the product of the distances to them is positive.
    """
    if not 0.0 <= high - low < math.inf:
        return hardtanh_backward(gradient, x, low, high)
    above = x - low if low else x
    return _masked(gradient, above * (torch.tensor(high, dtype=x.dtype) - x))


def _masked(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient where ``x`` is positive, and zero elsewhere: the smallest normal number times :data:`LARGE` is above one."""
    return gradient * torch.clamp(x * LARGE, 0.0, 1.0)


LARGE = 2.0**127
"""Makes one or more of every normal number."""


def _next(value: float, towards: float) -> float:
    """The next float32; from zero on the next normal one, as runtimes may take smaller ones for zero."""
    number = float(torch.nextafter(torch.tensor(value), torch.tensor(towards)))
    smallest = torch.finfo(torch.float32).tiny
    return math.copysign(smallest, towards) if 0 < abs(number) < smallest else number


def log_softmax_backward(gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``g - softmax * sum(g)``."""
    return gradient - output.exp() * gradient.sum(dim, keepdim=True)


def softmax_backward(gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``softmax * (g - sum(g * softmax))``."""
    return output * (gradient - (gradient * output).sum(dim, keepdim=True))


def sigmoid_backward(gradient: Tensor, output: Tensor) -> Tensor:
    """``g * y * (1 - y)``."""
    return gradient * output * (1.0 - output)


def tanh_backward(gradient: Tensor, output: Tensor) -> Tensor:
    """``g * (1 - y^2)``."""
    return gradient * (1.0 - output * output)
