"""Prove that a new weight is finite from what it is made of, instead of reading all of it."""

import operator
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

    The old weight is finite, as the loop keeps no other, so that the new one is where the bound is far from the largest float. The gradient
    of a convolution's kernel is a sum of such products, too.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.target is aten.sum.default and not node.kwargs and len(node.args) == 1:
                new: Any = node.args[0]
                factors = _factors(new)
                if factors and LEAST_GAIN * sum(value_of(f).numel() for f in factors) <= value_of(new).numel():
                    _replace(graph, node, factors)
        return graph


def _factors(new: Any) -> list[Any]:
    """Tensors the product of whose sums of sizes bounds the change of a state tensor; none where it is no sum of their products."""
    new = new.args[0] if new.target is aten.reshape.default else new
    if new.target is aten.addmm.default and _is_state(new.args[0], new):
        return list(new.args[1:]) if all(abs(new.kwargs.get(name, 1)) <= 1 for name in ("alpha", "beta")) else []
    if new.target is aten.sub.Tensor and not new.kwargs and isinstance(new.args[1], fx.Node) and _is_state(new.args[0], new):
        return _factors_of_change(new.args[1])
    return []


def _factors_of_change(change: Any) -> list[Any]:
    if change.target is aten.reshape.default:
        return _factors_of_change(change.args[0])
    if change.target is aten.mul.Tensor and isinstance(change.args[1], fx.Node):
        rest = _factors_of_change(change.args[0])
        return [*rest, change.args[1]] if rest else []
    if change.target is aten.mm.default:
        return list(change.args)
    if change.target is operator.getitem and change.args[1] == 1 and change.args[0].target is aten.convolution_backward.default:
        return list(change.args[0].args[:2])
    return []


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
