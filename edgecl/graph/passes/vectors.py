"""Compute the same expression of many small vectors at once: a runtime's call costs more than the arithmetic of a vector.

A network's norms have scale and shift vectors, and each has the same handful of operators around it, forward, backward and in the
update. They are joined into one vector, computed once, and split.
"""

import math
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch.fx.passes.tools_common import stable_topological_sort

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_constant, new_operator
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten

LEAST = 4
"""Fewer vectors are not joined."""

_SAME_SHAPE = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor}


class JoinVectors(Pass):
    """See the module.

    Vectors are joined when they are equal expressions of operands of the same kinds, and none of them depends on another: of equal
    ``level``, the number of such operators on the way to a node, neither can.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        groups = _groups(graph)
        if groups:
            _join(graph, groups)
            stable_topological_sort(graph.module)
        return graph


def _groups(graph: StepGraph) -> list[list[fx.Node]]:
    """Nodes to join, groups in an order in which they may be computed."""
    level: dict[fx.Node, int] = {}
    kind: dict[fx.Node, Any] = {}
    found: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        level[node] = max((level[source] + (source in kind) for source in node.all_input_nodes), default=0)
        if _is_vector_operator(node):
            operands = (kind.get(a, (a.op, len(shape_of(a)))) if isinstance(a, fx.Node) else str(a) for a in node.args)
            kind[node] = (node.target, *operands, len(shape_of(node)))
            found[level[node], kind[node]].append(node)
    return [group for (_, _), group in sorted(found.items(), key=lambda item: item[0][0]) if len(group) >= LEAST]


def _is_vector_operator(node: fx.Node) -> bool:
    if node.op != "call_function" or node.kwargs:
        return False
    if node.target in _SAME_SHAPE:
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        return bool(operands) and _is_vector(node) and all(_is_vector(a) and shape_of(a) == shape_of(node) for a in operands)
    return node.target is aten.reshape.default and _is_vector(node) and isinstance(node.args[0], fx.Node) and _is_vector(node.args[0])


def _is_vector(node: fx.Node) -> bool:
    """Whether a node is float32 [C, 1, ...]."""
    shape = shape_of(node) if isinstance(value_of(node), torch.Tensor) else ()
    return len(shape) > 0 and math.prod(shape) == shape[0] and value_of(node).dtype == torch.float32


def _join(graph: StepGraph, groups: list[list[fx.Node]]) -> None:
    body = graph.module.graph
    place: dict[fx.Node, tuple[int, int]] = {}
    joined: list[fx.Node] = []
    pieces: dict[fx.Node, fx.Node] = {}
    with body.inserting_before(body.output_node()):
        for number, group in enumerate(groups):
            args: list[Any] = []
            for i, first in enumerate(group[0].args):
                column = [node.args[i] for node in group]
                args.append(_operand(graph, column, place, joined) if isinstance(first, fx.Node) else first)
            if group[0].target is aten.reshape.default:
                args[1] = [-1, *[1] * (len(shape_of(group[0])) - 1)]
            whole = new_operator(graph, group[0].target, args, group[0])
            split = new_operator(graph, aten.split_with_sizes.default, [whole, [shape_of(node)[0] for node in group]], group[0])
            joined.append(whole)
            for index, node in enumerate(group):
                place[node] = (number, index)
                pieces[node] = body.call_function(operator.getitem, (split, index))
                pieces[node].meta.update({"val": value_of(split)[index], "custom": dict(node.meta.get("custom") or {})})
    for node, piece in pieces.items():
        node.replace_all_uses_with(piece, delete_user_cb=lambda user: user not in place)


def _operand(graph: StepGraph, column: list[Any], place: dict[fx.Node, tuple[int, int]], joined: list[fx.Node]) -> fx.Node:
    """One operand of all nodes of a group as one vector."""
    numbers = [place.get(node) for node in column]
    if numbers[0] is not None and numbers == [(numbers[0][0], i) for i in range(len(column))]:
        whole = joined[numbers[0][0]]
        if shape_of(whole)[0] == sum(shape_of(node)[0] for node in column):
            return whole
    if all(node.op == "get_attr" for node in column):
        return new_constant(graph, torch.cat([graph.constant(node) for node in column]), column[0])
    return new_operator(graph, aten.cat.default, [column], column[0])
