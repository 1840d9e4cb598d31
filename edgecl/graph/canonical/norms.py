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
    """``aten.native_batch_norm``: with stored statistics, or with those of the input, mean and variance written out.

    In training mode also mean and inverse deviation [C], for the gradient. Running statistics are not updated here: what writes into its
    arguments would be lost in a graph (:func:`running_statistics`).
    """
    if training and mean is None and variance is None:
        y, centre, inverse = _standardised(x, _all_but_channels(x), eps)
        y = y if weight is None else y * _per_channel(weight, x)
        return y if bias is None else y + _per_channel(bias, x), centre.reshape(-1), inverse.reshape(-1)
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
    """Gradient of batch norm, only what the mask asks for; in training mode that of mean and variance is in it.

    With ``n`` the standardised input: ``(g - mean(g) - n * mean(g * n)) * inverse deviation * weight``, means over all but the channels.
    With stored statistics ``g * inverse deviation * weight``, and the weight's is ``(sum(g x) - mean sum(g)) * inverse deviation``:
    sums first, so that all but the products is work on vectors [C].
    """
    axes = _all_but_channels(x)
    if training and save_mean is not None and save_inverse is not None:
        centre, inverse = save_mean, save_inverse
    elif not training and mean is not None and variance is not None:
        centre, inverse = mean, torch.rsqrt(variance + eps)
    else:
        return NotImplemented
    if not training:
        to_bias = gradient.sum(axes) if output_mask[1] or output_mask[2] else None
        return (
            gradient * _per_channel(inverse if weight is None else inverse * weight, x) if output_mask[0] else None,
            ((gradient * x).sum(axes) - centre * to_bias) * inverse if output_mask[1] and to_bias is not None else None,
            to_bias,
        )
    normal = (x - _per_channel(centre, x)) * _per_channel(inverse, x)
    to_input = None
    if output_mask[0]:
        means = gradient.mean(axes, keepdim=True), (gradient * normal).mean(axes, keepdim=True)
        to_input = (gradient - means[0] - normal * means[1]) * _per_channel(inverse if weight is None else inverse * weight, x)
    to_weight = (normal * gradient).sum(axes) if output_mask[1] else None
    to_bias = gradient.sum(axes) if output_mask[2] else None
    return to_input, to_weight, to_bias


def running_statistics(x: Tensor, mean: Tensor, variance: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Running mean and variance [C] after a batch [N, C, ...] in training mode; the variance is the unbiased one, as in PyTorch."""
    axes = _all_but_channels(x)
    centre = x.mean(axes)
    away = x - _per_channel(centre, x)
    count = x.numel() // x.shape[1]
    spread = (away * away).sum(axes) / (count - 1)
    return mean + (centre - mean) * momentum, variance + (spread - variance) * momentum


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


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


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """``torch.rms_norm``: division by the root of the mean square over the last dimensions."""
    axes = list(range(input.dim() - len(normalized_shape), input.dim()))
    y = input * torch.rsqrt((input * input).mean(axes, keepdim=True) + (torch.finfo(input.dtype).eps if eps is None else eps))
    return y if weight is None else y * weight


def _standardised(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    return centred * inverse, mean, inverse
