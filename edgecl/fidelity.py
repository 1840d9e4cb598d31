"""Whether the two parts of a model are the model: compared by running both on one sample, as tracing can lose what it cannot see.

``torch.fx`` records calls on tensors. It does not record contexts such as ``torch.autocast`` or ``torch.no_grad``, the backward pass of
a ``torch.autograd.Function``, numbers that were drawn, or buffers that change from call to call.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgecl.splitting import Split, SplitError, copied

GRADIENT = 1e-4
"""Largest difference of a gradient, relative to the parameter's own and at least a millionth of the largest."""


def check_values(model: nn.Module, parts: Split, x: Any) -> Any:
    """Check that the parts compute what the model does, to the bit, and return the model's output.

    Args:
        model: The user's model; left as it is.
        parts: Its trunk and suffix.
        x: An input [1, ...] as the model takes it, or a mapping of its inputs.

    Raises:
        SplitError: when two runs of the model differ, or the parts differ from it.
    """
    whole = copied(model).eval()
    with torch.no_grad():
        first, again, found = whole(*_copies(parts, x)), whole(*_copies(parts, x)), parts.suffix(parts.trunk(*_copies(parts, x)))
    if not _same(first, again):
        raise SplitError(
            "model: must give one result for one input in eval mode, two runs differ; take random numbers, and buffers that forward "
            "changes, out of it"
        )
    if not _same(first, found):
        raise SplitError(
            "model: its traced parts give another result than the model itself; take contexts such as torch.autocast, numbers drawn "
            "in forward, and branches on training or shapes out of forward, or cut a submodule without them"
        )
    return first


def check_gradients(model: nn.Module, parts: Split, x: Any) -> None:
    """Check that the suffix has the model's own gradients; parameters that the trunk uses, too, are left out.

    Args:
        model: The user's model; left as it is.
        parts: Its trunk and suffix.
        x: As for :func:`check_values`.

    Raises:
        SplitError: when the model has no gradients, or naming the first parameter whose gradient differs.
    """
    whole, suffix = copied(model).eval(), copied(parts.suffix)
    known = dict(whole.named_parameters(remove_duplicate=False))
    frozen = {id(known[name]) for name, _ in parts.trunk.named_parameters(remove_duplicate=False)}  # whatever else they are called
    names = [name for name, _ in parts.suffix.named_parameters() if id(known[name]) not in frozen]
    try:
        wanted = _gradients(whole, names, *_copies(parts, x))
    except RuntimeError as error:
        why = str(error).partition("; ")[0]
        raise SplitError(
            f"model: its layers behind the cut must have gradients, got {why}; write operations in place there as plain ones, or take a "
            "method that trains no layer of the model"
        ) from error
    with torch.no_grad():
        z = parts.trunk(*_copies(parts, x))
    found = _gradients(suffix, names, z)
    largest = max((g.abs().max().item() for g in wanted.values() if g.numel()), default=0.0)
    for name, gradient in wanted.items():
        difference = (gradient - found[name]).abs().max().item() if gradient.numel() else 0.0
        if difference > GRADIENT * max(gradient.abs().max().item() if gradient.numel() else 0.0, 1e-2 * GRADIENT * largest):
            raise SplitError(
                f"model: the gradient of {name!r} differs by {difference:.1e} between the model and its traced parts; take custom "
                "autograd functions and torch.no_grad out of the layers behind the cut, or cut behind them"
            )


def _copies(parts: Split, x: Any) -> list[Tensor]:
    """The inputs in the order of the model's forward, which may change them in place."""
    return [x.clone()] if isinstance(x, Tensor) else [x[name].clone() for name in parts.inputs]


def _gradients(module: nn.Module, names: list[str], *inputs: Any) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the output; zeros for parameters that it does not depend on."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for parameter in parameters.values():
        parameter.requires_grad_(parameter.is_floating_point())  # indices may be parameters, too, but have no gradient
    with torch.enable_grad():
        output = module(*inputs)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
        loss = (output * cotangent).sum()
        chosen = [parameters[name] for name in names]
        found = torch.autograd.grad(loss, chosen, allow_unused=True) if loss.requires_grad and chosen else [None] * len(chosen)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, chosen, found, strict=True)}


def _same(left: Any, right: Any) -> bool:
    """Whether two outputs hold the same tensors, to the bit but for the sign of zero; NaN equals NaN."""
    pairs = pytree.tree_leaves(left), pytree.tree_leaves(right)
    if [type(leaf) for leaf in pairs[0]] != [type(leaf) for leaf in pairs[1]]:
        return False
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b for a, b in zip(*pairs, strict=True))
