"""A product that is added to or subtracted from something else, as one operator."""

from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_operator
from edgecl.graph.step import StepGraph, shape_of

aten = torch.ops.aten


class AddProducts(Pass):
    """``W - reshape(A B)`` becomes ``addmm(W, A, B, alpha=-1)``: the update of a large weight writes it once instead of twice."""

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.target is not aten.sub.Tensor or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
                continue
            whole, change = node.args
            product: Any = change.args[0] if change.target is aten.reshape.default else change  # type: ignore[union-attr]
            if not _is_own(change, product) or shape_of(whole) != shape_of(change):  # type: ignore[arg-type]
                continue
            with graph.module.graph.inserting_before(node):
                flat = new_operator(graph, aten.reshape.default, [whole, list(shape_of(product))], node)
                added = graph.module.graph.call_function(aten.addmm.default, (flat, *product.args), {"alpha": -1})
                added.meta.update({"val": product.meta["val"], "custom": dict(product.meta.get("custom") or {})})
                shaped = new_operator(graph, aten.reshape.default, [added, list(shape_of(node))], node)
            node.replace_all_uses_with(shaped)
        return graph


def _is_own(change: Any, product: Any) -> bool:
    """Whether a change is a product that nothing else reads."""
    return isinstance(product, fx.Node) and product.target is aten.mm.default and len(product.users) == len(change.users) == 1
