"""Compute equal expressions once."""

from typing import Any

from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.quantised import quantization_of
from edgecl.graph.step import StepGraph


class MergeEqual(Pass):
    """A constant of the same value as an earlier one, or an operator on the same operands, is that one.

    What a backward pass computes anew is often in the forward pass.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        first: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                value = graph.constant(node).contiguous()
                alone = [user for user in node.users if quantization_of(user) is not None]  # a bias, whose integers are this layer's
                key: Any = (value.dtype, value.shape, value.numpy().tobytes(), *alone)
            elif node.op == "call_function":
                key = f"{node.target} {node.args} {node.kwargs}"
            else:
                continue
            kept = first.setdefault(key, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
        return graph
