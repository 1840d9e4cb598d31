"""The losses of every kind of target, one value a sample, written out in operators that every runtime has.

Ready-made losses translate to ONNX with another gradient at batch sizes above one. ``learn`` sums these, each times its weight.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgecl.learner import UNSEEN, one_hot
from edgecl_device.manifest import TargetSpec


def cross_entropy(scores: Tensor, target: Tensor, allowed: Tensor) -> Tensor:
    """Cross-entropy of each row, [N], over the classes that ``allowed`` (bool [K] or [N, K]) leaves."""
    return soft_cross_entropy(scores, one_hot(target, scores.shape[1]), allowed)


def soft_cross_entropy(scores: Tensor, truth: Tensor, allowed: Tensor | None) -> Tensor:
    """The same for targets that are shares of classes, float32 [N, K]."""
    log_probability = torch.log_softmax(torch.where(_given(allowed), scores, UNSEEN), 1)
    return -(log_probability * truth).sum(1)


def squared_error(scores: Tensor, target: Tensor) -> Tensor:
    """Mean over the values of each row's squared error, [N]; ``scores`` and ``target`` are float32 [N, D]."""
    error = scores - target
    return (error * error).mean(1)


def binary_cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Mean over the labels of each row's binary cross-entropy, [N], from logits; ``target`` float32 [N, K] of zeros and ones.

    ``-t log p - (1 - t) log(1 - p) = softplus(-s) + (1 - t) s``, which overflows nowhere and has the right gradient at zero.
    """
    return (F.softplus(scores * -1.0) + (target * -1.0 + 1.0) * scores).mean(1)


def pixel_cross_entropy(scores: Tensor, target: Tensor, allowed: Tensor, ignore: int | None) -> Tensor:
    """Mean cross-entropy over the pixels of each map that count, [N]; 0 for a map without such a pixel.

    Args:
        scores: float32 [N, K, H, W].
        target: int64 [N, H, W].
        allowed: bool [K], the classes that have been seen.
        ignore: Value of pixels that count for nothing, or None.
    """
    rows, classes = target.shape[0], scores.shape[1]
    flat = cross_entropy(scores.permute(0, 2, 3, 1).reshape(-1, classes), target.reshape(-1), allowed).reshape(rows, -1)
    if ignore is None:
        return flat.mean(1)
    counts = (target.reshape(rows, -1) != ignore).to(scores.dtype)
    return (flat * counts).sum(1) / counts.sum(1).clamp_min(1.0)


def losses(spec: TargetSpec, scores: Tensor, target: Tensor, allowed: Tensor | None) -> Tensor:
    """The loss of each row, [N], for one kind of target.

    Args:
        spec: The target.
        scores: float32 [N, K, ...].
        target: As a step takes it, [N, ...].
        allowed: Classes that have been seen, for the kinds that mask others: bool [K], for ``class`` also [N, K].
    """
    return LOSSES[spec.kind](spec, scores, target, allowed)


LOSSES: dict[str, Callable[[TargetSpec, Tensor, Tensor, Tensor | None], Tensor]] = {
    "class": lambda spec, scores, target, allowed: cross_entropy(scores, target, _given(allowed)),
    "vector": lambda spec, scores, target, allowed: squared_error(scores, target),
    "multilabel": lambda spec, scores, target, allowed: binary_cross_entropy(scores, target),
    "map": lambda spec, scores, target, allowed: pixel_cross_entropy(scores, target, _given(allowed), spec.ignore),
}
"""The loss of every kind."""


def _given(allowed: Tensor | None) -> Tensor:
    assert allowed is not None
    return allowed
