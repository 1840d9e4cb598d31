"""Prove that a new weight is finite from what it is made of, instead of reading all of it."""

from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_operator
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten

MARGIN = 2.0**26
"""The bound times this must be finite: a change below 2^102 takes no finite float32 to infinity, as half a unit in the last place of the
largest one is 2^103."""

LEAST_GAIN = 4
"""Times as many values as its factors a weight must have: factors are read once more and take two operators each."""


class ProveFinite(Pass):
    """The sum of a new weight, which a step checks, becomes a bound of its change: no value of ``A B`` exceeds ``sum|A| sum|B|``.

    The old weight is finite, as the loop keeps no other, so that the new one is where the bound is far from the largest float. A gradient of a
    convolution's kernel is a sum of such products, too.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.target is aten.sum.default and not node.kwargs and len(node.args) == 1:
                factors = _factors(node.args[0])
                if factors is not None and LEAST_GAIN * sum(value_of(f).numel() for f in factors) <= value_of(node.args[0]).numel():
                    _replace(graph, node, factors)
        return graph


def _factors(new: Any) -> list[Any] | None:
    """Tensors the product of whose sums of sizes bounds the change of a state tensor; None where there are none."""
    new = new.args[0] if new.target is aten.reshape.default else new
    if new.target is aten.addmm.default:
        old, *factors = new.args
        known = set(new.kwargs) <= {"alpha", "beta"} and abs(new.kwargs.get("alpha", 1)) <= 1 and abs(new.kwargs.get("beta", 1)) <= 1
        return factors if known and _is_state(old, new) else None
    if new.target is not aten.sub.Tensor or new.kwargs or not all(isinstance(a, fx.Node) for a in new.args):
        return None
    old, change = new.args
    if not _is_state(old, new):
        return None
    factors = []
    while change.target in (aten.reshape.default, aten.mul.Tensor):
        if change.target is aten.mul.Tensor:
            if not isinstance(change.args[1], fx.Node):
                return None
            factors.append(change.args[1])
        change = change.args[0]
    if change.target is aten.mm.default:
        return [*factors, *change.args]
    if getattr(change.target, "__name__", "") == "getitem" and change.args[1] == 1:
        backward = change.args[0]
        if backward.target is aten.convolution_backward.default:
            return [*factors, *backward.args[:2]]
    return None


def _is_state(old: Any, new: fx.Node) -> bool:
    return old.op == "placeholder" and value_of(old).dtype == torch.float32 and shape_of(old) == shape_of(new)


def _replace(graph: StepGraph, total: fx.Node, factors: list[Any]) -> None:
    with graph.module.graph.inserting_before(total):
        bound: Any = None
        for factor in factors:
            size = new_operator(graph, aten.abs.default, [factor], total)
            size = new_operator(graph, aten.sum.default, [size], total)
            bound = size if bound is None else new_operator(graph, aten.mul.Tensor, [bound, size], total)
        bound = new_operator(graph, aten.mul.Scalar, [bound, MARGIN], total)
    total.replace_all_uses_with(bound)
