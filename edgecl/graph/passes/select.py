"""Compute the channels of a weight gradient that are chosen, and not the others."""

import operator
from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_operator
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten


class SelectChannels(Pass):
    """A choice of output or input channels behind a weight gradient is made before it: the gradient of fewer is a smaller product.

    ``convolution_backward(g, x, w)[1].index_select(0, i)`` is that of ``g[:, i]``, and ``.index_select(1, i)`` that of ``x[:, i]``.
    A method writes the choice behind the gradient, as mathematics has it; what nobody reads is then not computed.

    Source: Wang et al., SparCL, NeurIPS 2022 (dynamic gradient masking), on whole channels: the product is a smaller dense one.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.target is aten.index_select.default and node.args[1] in (0, 1):
                whole: Any = node.args[0]
                if _is_scaled(whole) and len(whole.users) == 1 and len(whole.args[0].users) == 1:
                    _select_before_scale(graph, node, whole)
                elif _is_weight_gradient(whole) and len(whole.users) == 1:
                    _select_first(graph, node, whole)
        return graph


def _is_weight_gradient(node: Any) -> bool:
    if not (isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 1):
        return False
    backward: Any = node.args[0]
    return backward.target is aten.convolution_backward.default and not backward.args[7] and backward.args[9] == 1


def _is_scaled(node: Any) -> bool:
    """Whether a node is a weight gradient times a vector along its output channels (:mod:`edgecl.graph.passes.affine`)."""
    if not (isinstance(node, fx.Node) and node.target is aten.mul.Tensor and _is_weight_gradient(node.args[0])):
        return False
    scale = node.args[1]
    return isinstance(scale, fx.Node) and shape_of(scale) == (shape_of(node)[0], *[1] * (len(shape_of(node)) - 1))


def _select_before_scale(graph: StepGraph, node: fx.Node, scaled: fx.Node) -> None:
    """Put the scaled product of the chosen channels in the place of the choice."""
    whole: Any = scaled.args[0]
    scale: Any = scaled.args[1]
    with graph.module.graph.inserting_before(node):
        part = new_operator(graph, aten.index_select.default, (whole, *node.args[1:]), node)
        if node.args[1] == 0:
            scale = new_operator(graph, aten.index_select.default, (scale, 0, node.args[2]), node)
        product = new_operator(graph, aten.mul.Tensor, (part, scale), scaled)
    node.replace_all_uses_with(product)
    graph.module.graph.erase_node(node)
    graph.module.graph.erase_node(scaled)
    _select_first(graph, part, whole)


def _select_first(graph: StepGraph, node: fx.Node, whole: fx.Node) -> None:
    """Put the product of the chosen channels in the place of the choice."""
    backward: Any = whole.args[0]
    gradient, x, weight, _, *options, mask = backward.args
    axis, index = node.args[1:]
    operands = [gradient, x]
    with graph.module.graph.inserting_before(node):
        operands[int(axis)] = new_operator(graph, aten.index_select.default, (operands[int(axis)], 1, index), backward)  # type: ignore[arg-type]
        shape = new_operator(graph, aten.index_select.default, (weight, axis, index), backward)
        part = new_operator(graph, aten.convolution_backward.default, (*operands, shape, None, *options, [False, True, False]), backward)
        item = graph.module.graph.call_function(operator.getitem, (part, 1))
    item.meta.update({"val": value_of(part)[1], "custom": dict(backward.meta.get("custom") or {})})
    node.replace_all_uses_with(item)
    graph.module.graph.erase_node(node)
    graph.module.graph.erase_node(whole)
    backward.update_arg(10, [mask[0], False, mask[2]])
