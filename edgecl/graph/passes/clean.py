"""Remove operators that do nothing and nodes that nobody uses."""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten

_COPIES = {aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default, aten.contiguous.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_SAME_IF_EQUAL = {aten.reshape.default, aten.expand.default, aten._to_copy.default}
_BY_ONE = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}


class Clean(Pass):
    """Write every view as a reshape, and a tensor filled with a number, from which another is subtracted, as the number.

    Drop copies, reshapes to the same shape, a transposition of the same transposition, factors of one, unused operators and unused inputs.
    """

    ensures = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.target in _VIEWS:
                node.target = aten.reshape.default  # a rule's result may have other strides, which only a reshape allows
            if node.target is aten.sub.Tensor and _is_filled(node.args[0]) and not node.kwargs:
                filled, x = node.args
                if shape_of(filled) == shape_of(node) == shape_of(x):  # type: ignore[arg-type]
                    node.target, node.args = aten.rsub.Scalar, (x, filled.args[1])  # type: ignore[union-attr]
            if node.target is aten.hardtanh_backward.default:
                _mask_by_output(node)
            if _is_transpose(node) and _is_transpose(node.args[0]) and _undo(node, node.args[0]):
                node.replace_all_uses_with(node.args[0].args[0])  # type: ignore[union-attr, arg-type]
            elif _is_identity(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            elif _is_reshape(node) and _is_reshape(node.args[0]):
                node.update_arg(0, node.args[0].args[0])  # type: ignore[union-attr]
        _merge_constants(graph)
        body = graph.module.graph
        body.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        keep = []
        for port, node in zip(graph.inputs, graph.placeholders, strict=True):
            if node.users:
                keep.append(port)
            else:
                body.erase_node(node)
        graph.module.delete_all_unused_submodules()
        return replace(graph, inputs=tuple(keep))


def _mask_by_output(node: fx.Node) -> None:
    """A clip's gradient passes where its input lies strictly between the limits, and there its output does: the input need not be kept."""
    x, *limits = node.args[1:]
    clips = [user for user in x.users if user.target is aten.hardtanh.default and list(user.args) == [x, *limits]]  # type: ignore[union-attr]
    if clips:
        node.update_arg(1, clips[0])


def _is_filled(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.full_like.default


def _is_reshape(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.reshape.default


def _is_transpose(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in (aten.t.default, aten.transpose.int)


def _undo(second: fx.Node, first: Any) -> bool:
    rank = len(shape_of(second))
    return _exchanged(second, rank) == _exchanged(first, rank)


def _exchanged(node: fx.Node, rank: int) -> set[int]:
    dims: Any = node.args[1:] or (0, 1)
    return {dim % max(rank, 1) for dim in dims}


def _is_identity(node: fx.Node) -> bool:
    if node.target in _COPIES:
        return True
    if node.target not in _SAME_IF_EQUAL | _BY_ONE or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _BY_ONE and (isinstance(node.args[1], fx.Node) or node.args[1] != 1):
        return False
    return shape_of(node.args[0]) == shape_of(node) and value_of(node.args[0]).dtype == value_of(node).dtype


def _merge_constants(graph: StepGraph) -> None:
    """One ``get_attr`` node a constant, however often the tracer met it."""
    first: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            kept = first.setdefault(str(node.target), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
