"""Apply a runtime's rules: canonical operators become operators that the runtime has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.base import Pass, is_constant
from edgecl.graph.rules import Rules
from edgecl.graph.step import StepGraph, UnsupportedOperatorError, unsupported
from edgecl.graph.tracing import graph_of


class ApplyRules(Pass):
    """Rewrite by a table of rules, by tracing the graph again with the table as decompositions.

    Args:
        rules: PyTorch functions for the operators that the runtime lacks or runs badly.
    """

    breaks = frozenset({"no-dead-code", "constants-folded"})

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        return retrace(graph, lambda *tensors: _Retrace(graph, self.rules).run(*tensors), self.rules.always)


def retrace(graph: StepGraph, run: Callable[..., Any], table: Mapping[Any, Callable[..., Any]] | None = None) -> StepGraph:
    """A step's graph as what ``run`` does with its inputs, operators of the table decomposed; nodes keep their places in the model."""
    examples = [torch.zeros(p.spec.shape, dtype=getattr(torch, p.spec.dtype)) for p in graph.inputs]
    return replace(graph, module=graph_of(run, examples, table))


class _Retrace(fx.Interpreter):
    """Runs a step's graph again; a rule's refusal names the step and its place in the model."""

    def __init__(self, graph: StepGraph, rules: Rules) -> None:
        super().__init__(graph.module)
        self.rules = rules
        self.node: fx.Node
        self.step = graph.name
        self.extra_traceback = False  # no "While executing ..." behind an error's message

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        try:
            return super().run_node(n)
        except UnsupportedOperatorError as error:
            raise unsupported(self.step, n, str(error)) from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for special in self.rules.special.get(target, ()):
            if self._are(special.changing, False) and self._are(special.frozen, True):
                result = special.rule(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        return super().call_function(target, args, kwargs)

    def _are(self, positions: Sequence[int], constant: bool) -> bool:
        """Whether all operands at these positions are constants, or none; an absent one is neither."""
        operands = [self.node.args[i] for i in positions]
        return all(isinstance(operand, fx.Node) and is_constant(operand) is constant for operand in operands)
