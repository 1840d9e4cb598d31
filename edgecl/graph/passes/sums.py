"""Compute a sum of many small terms of one kind at once.

A layer that is used many times, as a recurrent one is at every step of its sequence, has a weight gradient that is a sum of one product a
use, a bias gradient that is a sum of sums, and an input gradient that is a sum of slices with zeros around each. Over operands side by
side these are one product, one sum and one concatenation: ``A B + C D = [A C] [B; D]``.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_operator
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten

SMALL = 4096
"""Elements that are copied in less time than an operator's call takes."""

Group = list[fx.Node]


class JoinSums(Pass):
    """See the module. Products and sums are joined where copying their operands costs less than what it saves."""

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        within: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if _is_sum(node) and node not in within:
                terms, inner = _terms(node)
                within.update(inner)
                groups = list(_groups(terms))
                if any(len(group) > 1 for group in groups):
                    with graph.module.graph.inserting_before(node):
                        node.replace_all_uses_with(_total(graph, [_joined(graph, group) for group in groups], node))
        return graph


def _is_sum(node: Any) -> bool:
    """Whether a node adds two tensors of its own shape and type."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.add.Tensor
        and not node.kwargs
        and node.args[0] is not node.args[1]  # twice itself: its terms double with every such sum
        and all(isinstance(a, fx.Node) and shape_of(a) == shape_of(node) and value_of(a).dtype == value_of(node).dtype for a in node.args)
    )


def _terms(root: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a sum adds, in order, and the sums within it that nothing else reads."""
    terms: list[fx.Node] = []
    inner: list[fx.Node] = []
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if node is root or (_is_sum(node) and len(node.users) == 1):
            inner.append(node)
            waiting += reversed(node.args)
        else:
            terms.append(node)
    return terms, inner


def _groups(terms: list[fx.Node]) -> Iterator[Group]:
    """Terms that can be joined, others alone."""
    alike: dict[Any, Group] = defaultdict(list)
    for number, term in enumerate(terms):
        alike[_kind(term) or number].append(term)
    for kind, group in alike.items():
        if isinstance(kind, tuple) and kind[0] is aten.constant_pad_nd.default:
            yield from _apart(group, kind[1])
        else:
            yield group


def _kind(term: fx.Node) -> Any:
    """What terms must have in common to be joined; None for a term that cannot be."""
    if term.target is aten.constant_pad_nd.default:
        _, amounts, *value = term.args
        axes = _padded(term)
        return (term.target, axes[0]) if len(axes) == 1 and min(amounts) >= 0 and value in ([], [0]) else None  # type: ignore[arg-type]
    if len(term.users) != 1:
        return None
    if term.target is aten.mm.default:
        return (term.target,) if _is_cheap(term, *term.all_input_nodes) else None
    found = _reduction(term)
    if found is None or not _is_cheap(term, found.args[0]):
        return None
    x, dims, *keep = found.args
    sizes = [size for axis, size in enumerate(shape_of(x)) if axis != dims[0]]
    return (found.target, str(dims), str(keep), str(sizes))


def _reduction(term: fx.Node) -> Any:
    """The sum over some dimensions that a term is, reshaped at most."""
    source: Any = term.args[0] if term.target is aten.reshape.default else term
    if source.target is not aten.sum.dim_IntList or source.kwargs or len(source.users) != 1:
        return None
    dims = source.args[1]
    return source if dims and dims[0] >= 0 else None


def _is_cheap(term: fx.Node, *operands: Any) -> bool:
    """Whether copies of a term's operands are small, or smaller than the term."""
    return sum(math.prod(shape_of(x)) for x in operands) <= max(SMALL, math.prod(shape_of(term)))


def _padded(node: fx.Node) -> list[int]:
    """The axes along which a node pads."""
    amounts: Any = node.args[1]
    rank = len(shape_of(node))
    return [rank - 1 - i // 2 for i in range(0, len(amounts), 2) if any(amounts[i : i + 2])]


def _place(pad: fx.Node, axis: int) -> tuple[int, int]:
    """Where, along an axis, a padded tensor is not padding."""
    before = pad.args[1][2 * (len(shape_of(pad)) - 1 - axis)]  # type: ignore[index]
    return before, before + shape_of(pad.args[0])[axis]  # type: ignore[operator, arg-type, return-value]


def _apart(pads: Group, axis: int) -> Iterator[Group]:
    """Padded tensors, those in a group at places that do not overlap, in order."""
    groups: list[Group] = []
    for pad in sorted(pads, key=lambda pad: _place(pad, axis)):
        group = next((g for g in groups if _place(g[-1], axis)[1] <= _place(pad, axis)[0]), None)
        if group is None:
            groups.append([pad])
        else:
            group.append(pad)
    yield from groups


def _joined(graph: StepGraph, group: Group) -> fx.Node:
    """One node for a group."""
    first = group[0]
    if len(group) == 1:
        return first
    if first.target is aten.constant_pad_nd.default:
        return _side_by_side(graph, group, _padded(first)[0])
    if first.target is aten.mm.default:
        left, right = (list(column) for column in zip(*(term.args for term in group), strict=True))
        if all(matrix.target is aten.t.default for matrix in left):  # rows are copied in one piece, columns are not
            rows = new_operator(graph, aten.cat.default, [[matrix.args[0] for matrix in left], 0], first)
            columns = new_operator(graph, aten.t.default, [rows], first)
        else:
            columns = new_operator(graph, aten.cat.default, [left, 1], first)
        return new_operator(graph, aten.mm.default, [columns, new_operator(graph, aten.cat.default, [right, 0], first)], first)
    sums = [_reduction(term) for term in group]
    whole = new_operator(graph, aten.cat.default, [[node.args[0] for node in sums], sums[0].args[1][0]], first)
    total = new_operator(graph, aten.sum.dim_IntList, [whole, *sums[0].args[1:]], first)
    return total if first is sums[0] else new_operator(graph, aten.reshape.default, [total, list(shape_of(first))], first)


def _side_by_side(graph: StepGraph, pads: Group, axis: int) -> fx.Node:
    """Padded tensors in one, zeros where none of them is."""
    size = shape_of(pads[0])[axis]
    starts = [_place(pad, axis)[0] for pad in pads[1:]]
    pieces: list[Any] = []
    for pad, start, end in zip(pads, [0, *starts], [*starts, size], strict=True):
        before, behind = _place(pad, axis)[0] - start, end - _place(pad, axis)[1]
        if before or behind:
            amounts = [0, 0] * (len(shape_of(pad)) - 1 - axis) + [before, behind]
            pieces.append(new_operator(graph, aten.constant_pad_nd.default, [pad.args[0], amounts, 0.0], pad))
        else:
            pieces.append(pad.args[0])
    if axis < len(shape_of(pads[0])) - 1 and all(piece.target is aten.unsqueeze.default and piece.args[1] == axis for piece in pieces):
        stacked = new_operator(graph, aten.cat.default, [[piece.args[0] for piece in pieces], axis], pads[0])
        return new_operator(graph, aten.reshape.default, [stacked, list(shape_of(pads[0]))], pads[0])
    return new_operator(graph, aten.cat.default, [pieces, axis], pads[0])


def _total(graph: StepGraph, parts: list[fx.Node], like: fx.Node) -> fx.Node:
    total = parts[0]
    for part in parts[1:]:
        total = new_operator(graph, aten.add.Tensor, [total, part], like)
    return total
