"""Let what follows a join of channels act on its parts, where each may take it in."""

from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.affine import along_channels
from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_constant, new_operator
from edgecl.graph.step import StepGraph, shape_of

aten = torch.ops.aten

_FACTORS = (aten.mul.Tensor, aten.add.Tensor)
_RECTIFIERS = (aten.relu.default, aten.clamp.default, aten.hardtanh.default)


class SinkIntoParts(Pass):
    """``cat(a, b) * scale + shift``, rectified, becomes ``cat`` of parts that are scaled, shifted and rectified each.

    A frozen convolution among the parts takes scale and shift into its kernel, and a runtime fuses the rectifier. On the way back the
    gradient is cut into parts before it is scaled. It is what a layer in two parts (:func:`edgecl.split_channels`) has behind it.
    """

    requires = frozenset({"constants-folded"})
    ensures = frozenset({"constants-folded"})
    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        pieces: dict[tuple[fx.Node, int, int], fx.Node] = {}
        for node in graph.nodes:
            if node.op != "call_function" or node.kwargs or not node.args:
                continue
            first: Any = node.args[0]
            if node.target in (*_FACTORS, *_RECTIFIERS) and _is_join(first) and len(first.users) == 1:
                _into_join(graph, node, first, pieces)
            elif node.target is aten.slice.Tensor and node.args[1:2] == (1,) and _is_scaled(first):
                _before_slice(graph, node, first, pieces)
        return graph


def _is_join(node: Any) -> bool:
    """Whether a node joins maps along their channels."""
    return isinstance(node, fx.Node) and node.target is aten.cat.default and node.args[1:] == (1,)


def _is_scaled(node: Any) -> bool:
    """Whether a node is a map times a frozen vector along its channels, and nothing but parts of it are used."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or not _is_factor(node.args[1], node):
        return False
    return all(user.target is aten.slice.Tensor and user.args[1] == 1 for user in node.users)


def _is_factor(value: Any, like: fx.Node) -> bool:
    """Whether a value is frozen, [C, 1, ...] beside a map [N, C, ...]."""
    return len(shape_of(like)) > 2 and along_channels(value, like) and value.op == "get_attr"


def _into_join(graph: StepGraph, node: fx.Node, join: fx.Node, pieces: dict[tuple[fx.Node, int, int], fx.Node]) -> None:
    scaled = node.target in _FACTORS
    if scaled and not _is_factor(node.args[1], join):
        return
    parts, start = [], 0
    with graph.module.graph.inserting_before(join):
        for part in join.args[0]:  # type: ignore[union-attr]
            channels = shape_of(part)[1]  # type: ignore[arg-type]
            rest = [_piece(graph, node.args[1], start, start + channels, pieces)] if scaled else list(node.args[1:])
            parts.append(new_operator(graph, node.target, [part, *rest], node))
            start += channels
    join.update_arg(0, parts)
    node.replace_all_uses_with(join)
    graph.module.graph.erase_node(node)


def _before_slice(graph: StepGraph, node: fx.Node, scaled: fx.Node, pieces: dict[tuple[fx.Node, int, int], fx.Node]) -> None:
    if len(node.args) > 4 and node.args[4] != 1:
        return
    channels = shape_of(scaled)[1]
    start, end = (min(int(bound), channels) for bound in node.args[2:4])  # type: ignore[arg-type]
    with graph.module.graph.inserting_before(node):
        cut = new_operator(graph, aten.slice.Tensor, [scaled.args[0], *node.args[1:]], node)
        part = new_operator(graph, aten.mul.Tensor, [cut, _piece(graph, scaled.args[1], start, end, pieces)], scaled)
    node.replace_all_uses_with(part)
    graph.module.graph.erase_node(node)


def _piece(graph: StepGraph, factor: Any, start: int, end: int, pieces: dict[tuple[fx.Node, int, int], fx.Node]) -> fx.Node:
    """Some channels of a frozen vector, one node for the forward and the backward pass."""
    key = (factor, start, end)
    if key not in pieces:
        pieces[key] = new_constant(graph, graph.constant(factor)[start:end], factor)
    return pieces[key]
