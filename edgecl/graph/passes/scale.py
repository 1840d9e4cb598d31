"""Scale and shift of a map's channels as one operator."""

from math import prod
from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.affine import along_channels
from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_constant, new_operator
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten

MOST_POSITIONS = 100
"""Of a map, up to which a product with a scale alone is faster as scale and shift: a runtime broadcasts it position by position."""


class ScaleMaps(Pass):
    """``x * scale + shift``, and on small maps ``x * scale``, become ``addcmul(shift, x, scale)`` with vectors [C, 1, ...].

    For a runtime with one operator for it: ONNX's batch normalisation, whose statistics are then zero and one.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.target is aten.add.Tensor and not node.kwargs and _is_scaled(node.args[0]) and _is_vector(node.args[1], node):
                scaled: Any = node.args[0]
                if len(scaled.users) == 1:
                    _replace(graph, node, node.args[1], scaled)
        for node in graph.nodes:
            if _is_scaled(node) and prod(shape_of(node)[2:]) <= MOST_POSITIONS and node.users:
                _replace(graph, node, None, node)
        return graph


def _is_scaled(node: Any) -> bool:
    """Whether a node is a map [N, C, ...] times a vector."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or not isinstance(node.args[0], fx.Node):
        return False
    return _is_vector(node.args[1], node) and shape_of(node.args[0]) == shape_of(node)


def _is_vector(value: Any, like: fx.Node) -> bool:
    """Whether a value is float32 [C, 1, ...] beside a map [N, C, ...] of more than one position."""
    return value_of(like).dtype == torch.float32 and prod(shape_of(like)[2:]) > 1 and along_channels(value, like)


def _replace(graph: StepGraph, node: fx.Node, shift: Any, scaled: fx.Node) -> None:
    x, scale = scaled.args
    with graph.module.graph.inserting_before(node):
        if shift is None:
            shift = new_constant(graph, torch.zeros(shape_of(scale)), node)  # type: ignore[arg-type]
        node.replace_all_uses_with(new_operator(graph, aten.addcmul.default, [shift, x, scale], node))
