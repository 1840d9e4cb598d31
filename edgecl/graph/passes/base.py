"""Pass contracts: a pass names the properties that it requires and those that it ensures; the base class checks both."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import fx

from edgecl.graph.quantised import is_packed
from edgecl.graph.step import GraphError, StepGraph


class Pass(ABC):
    """One rewrite of a step graph.

    Attributes:
        requires: Properties the graph must have.
        ensures: Properties the graph has afterwards, each verified by its check in :data:`CHECKS`.
        breaks: Properties that may no longer hold afterwards.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def rewrite(self, graph: StepGraph) -> StepGraph:
        """Return the rewritten graph. The argument's module may be changed and must not be used afterwards."""

    def __call__(self, graph: StepGraph) -> StepGraph:
        """Check, rewrite, check.

        Raises:
            GraphError: when a required property is missing or an ensured one does not hold.
        """
        label = type(self).__name__
        missing = self.requires - graph.properties
        if missing:
            raise GraphError(f"pass {label} on step {graph.name!r}: requires {sorted(missing)}; run the pass that ensures it before")
        result = self.rewrite(graph)
        result.module.graph.lint()
        for name in sorted(self.ensures):
            found = CHECKS[name](result)
            if found is not None:
                raise GraphError(f"pass {label} on step {graph.name!r}: {name} does not hold at {found.format_node()}")
        return replace(result, properties=(graph.properties - self.breaks) | self.ensures)


def dead_node(graph: StepGraph) -> fx.Node | None:
    """A node whose value nobody uses."""
    return next((n for n in graph.nodes if n.op in ("call_function", "get_attr") and not n.users), None)


def constant_expression(graph: StepGraph) -> fx.Node | None:
    """An operator that depends on constants alone."""
    return next((n for n in graph.operators if is_foldable(n)), None)


_LIKE = {getattr(torch.ops.aten, name).default for name in ["zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"]}


def is_constant(node: fx.Node) -> bool:
    """Whether a node's value is known before the graph runs: its operands are, or it needs no more than their shape."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "get_attr"
    return node.target in _LIKE or is_packed(node) or all(n.op == "get_attr" for n in node.all_input_nodes)


def is_foldable(node: fx.Node) -> bool:
    """Whether a node can be replaced by its value; a weight that is kept in int8 stays so."""
    return is_constant(node) and not is_packed(node)


CHECKS: dict[str, Callable[[StepGraph], fx.Node | None]] = {
    "no-dead-code": dead_node,
    "constants-folded": constant_expression,
}
"""Each property's check: a node that violates it, or None."""
