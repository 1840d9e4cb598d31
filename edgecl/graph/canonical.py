"""Canonical operators: what capture itself rewrites, for every runtime alike.

Batch norm in eval mode becomes a scale and a shift whose frozen factors fold to constants; everything else stays as
autograd writes it, convolution and pooling gradients whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.dim() - 2))


def batch_norm_eval(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with stored statistics: ``x * scale + shift``.

    Args:
        x: float [N, C, ...].
        weight: float [C], or None for ones.
        bias: float [C], or None for zeros.
        mean: float [C], stored.
        variance: float [C], stored.
        momentum: Not used with stored statistics.
        eps: Added to the variance.
    """
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    empty = x.new_zeros(0)
    return x * _per_channel(scale, x) + _per_channel(shift, x), empty, empty


def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten.native_batch_norm`` for stored statistics."""
    if training or mean is None or variance is None:
        raise ValueError("batch norm in training mode has no meaning at batch 1; call model.eval() before")
    return batch_norm_eval(x, weight, bias, mean, variance, momentum, eps)


def native_batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    save_mean: Tensor | None,
    save_inverse: Tensor | None,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradient of batch norm with stored statistics; only what the mask asks for."""
    if training or mean is None or variance is None:
        raise ValueError("batch norm in training mode has no meaning at batch 1; call model.eval() before")
    inverse = torch.rsqrt(variance + eps)
    axes = [0, *range(2, x.dim())]
    to_input = gradient * _per_channel(inverse if weight is None else inverse * weight, x) if output_mask[0] else None
    to_weight = ((x - _per_channel(mean, x)) * _per_channel(inverse, x) * gradient).sum(axes) if output_mask[1] else None
    to_bias = gradient.sum(axes) if output_mask[2] else None
    return to_input, to_weight, to_bias


CANONICAL: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: native_batch_norm,
    aten._native_batch_norm_legit_no_training.default: batch_norm_eval,
    aten.native_batch_norm_backward.default: native_batch_norm_backward,
}
