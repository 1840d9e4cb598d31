"""Compute on a tensor before it is expanded, not on its copies."""

from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_operator
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten

_BY_NUMBER = {aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.mul.Tensor, aten.div.Tensor, aten.neg.default}
_BROADCAST = {
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.div.Tensor,
    aten.where.self,
    aten.threshold_backward.default,
    aten.hardtanh_backward.default,
}


class SinkExpand(Pass):
    """An operator with a number works on what is expanded, and its result is; one that broadcasts takes it as it is.

    The gradient of a mean over positions is one value a channel, which autograd copies to all of them first.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.op != "call_function" or node.kwargs or not _is_expand(node.args[0] if node.args else None):
                continue
            expanded: Any = node.args[0]
            source, numbers = expanded.args[0], [a for a in node.args[1:] if isinstance(a, fx.Node)]
            if node.target in _BY_NUMBER and all(len(shape_of(a)) == 0 for a in numbers):
                with graph.module.graph.inserting_before(node):
                    small = new_operator(graph, node.target, [source, *node.args[1:]], node)
                    wide = new_operator(graph, aten.expand.default, [small, list(shape_of(node))], expanded)
                node.replace_all_uses_with(wide)
            elif node.target in _BROADCAST and any(shape_of(a) == shape_of(node) for a in numbers):
                node.update_arg(0, source)
        return graph


def _is_expand(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.expand.default and value_of(node.args[0]).dim() > 0  # type: ignore[arg-type]
