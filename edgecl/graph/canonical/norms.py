"""Normalisation, written out: what is frozen of it folds to constants."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
) -> Any:
    """``aten.native_batch_norm`` for stored statistics; with those of the input it stays, and is refused by name."""
    if training or mean is None or variance is None:
        return NotImplemented
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
) -> Any:
    """Gradient of batch norm with stored statistics; only what the mask asks for."""
    if training or mean is None or variance is None:
        return NotImplemented
    inverse = torch.rsqrt(variance + eps)
    axes = [0, *range(2, x.dim())]
    to_input = gradient * _per_channel(inverse if weight is None else inverse * weight, x) if output_mask[0] else None
    to_weight = ((x - _per_channel(mean, x)) * _per_channel(inverse, x) * gradient).sum(axes) if output_mask[1] else None
    to_bias = gradient.sum(axes) if output_mask[2] else None
    return to_input, to_weight, to_bias


def native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last dimensions; also mean and inverse deviation, for the gradient."""
    axes = list(range(x.dim() - len(shape), x.dim()))
    y, mean, inverse = _standardised(x, axes, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, inverse


def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, batch: int, channels: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of ``x`` [N, C, ...]; also mean and inverse deviation [N, groups], for the gradient."""
    y, mean, inverse = _standardised(x.reshape(batch, groups, -1), [2], eps)
    y = y.reshape(x.shape)
    y = y if weight is None else y * _per_channel(weight, x)
    return y if bias is None else y + _per_channel(bias, x), mean.reshape(batch, groups), inverse.reshape(batch, groups)


def _standardised(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    return centred * inverse, mean, inverse
