"""Apply a runtime's rules: canonical operators become operators that the runtime has."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.step import StepGraph, UnsupportedOperatorError, unsupported


class ApplyRules(Pass):
    """Rewrite by a table of rules, by tracing the graph again with the table as decompositions.

    Args:
        rules: A PyTorch function for each operator that the runtime lacks or runs badly.
    """

    breaks = frozenset({"no-dead-code", "constants-folded"})

    def __init__(self, rules: Mapping[Any, Callable[..., Any]]) -> None:
        self.rules = dict(rules)

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        examples = [torch.zeros(p.spec.shape, dtype=getattr(torch, p.spec.dtype)) for p in graph.inputs]
        with traceback.preserve_node_meta():
            module = make_fx(lambda *tensors: _Retrace(graph).run(*tensors), decomposition_table=self.rules)(*examples)
        for node, value in zip((n for n in module.graph.nodes if n.op == "placeholder"), examples, strict=True):
            node.meta.setdefault("val", value.to("meta"))
        return replace(graph, module=module)


class _Retrace(fx.Interpreter):
    """Runs a step's graph again; a rule's refusal names the step and its place in the model."""

    def __init__(self, graph: StepGraph) -> None:
        super().__init__(graph.module)
        self.step = graph.name
        self.extra_traceback = False  # no "While executing ..." behind an error's message

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except UnsupportedOperatorError as error:
            raise unsupported(self.step, n, str(error)) from error
