"""Order nodes for peak memory."""

from typing import Any

import torch
from torch import fx

from edgecl.graph.cost import FORMULAS
from edgecl.graph.memory import VIEWS, owner_of, peak_bytes, views_of
from edgecl.graph.passes.base import Pass
from edgecl.graph.quantised import DEQUANTIZE
from edgecl.graph.step import StepGraph, value_of


class UpdateEarly(Pass):
    """Run each tensor's update as soon as its gradient exists, so that no two gradients wait for each other.

    What an update computes from state and inputs alone (a decayed weight, say) waits until it is used. The order stays as
    it was where the new one would need more memory.

    Source: "fused backward" of Lv et al. 2023 (LOMO), and operator reordering of Lin et al. 2022,
    "On-Device Training Under 256KB Memory", section 3.3.
    """

    requires = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        before, peak = graph.nodes, peak_bytes(graph)
        _arrange(graph, _early(before))
        if peak_bytes(graph) > peak:
            _arrange(graph, before)
        return graph


def _early(nodes: list[fx.Node]) -> list[fx.Node]:
    """Each update right after the last operator of another phase that it depends on."""
    trigger: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        latest = max((trigger[n] for n in node.all_input_nodes), default=-1)
        trigger[node] = i if node.op == "call_function" and not _is_update(node) else latest
    free = {node for node in nodes if node.op == "call_function" and trigger[node] < 0}
    # sorted() is stable: updates of one trigger keep their order; placeholders and constants come first
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    position = {node: i for i, node in enumerate(nodes)}
    for node in sorted((n for n in nodes if n not in free), key=trigger.__getitem__):
        order += [*sorted(_missing(node, free, done), key=position.__getitem__), node]
    return order + [node for node in nodes if node in free and node not in done]


def _missing(node: fx.Node, free: set[fx.Node], done: set[fx.Node]) -> list[fx.Node]:
    """What ``node`` needs, directly or not, of ``free`` and is not done yet; done from now on."""
    found, waiting = [], [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in free and source not in done:
                done.add(source)
                found.append(source)
                waiting.append(source)
    return found


def _arrange(graph: StepGraph, order: list[fx.Node]) -> None:
    anchor = graph.module.graph.output_node()
    for node in order:
        if node is not anchor:
            anchor.prepend(node)


def _is_update(node: fx.Node) -> bool:
    return (node.meta.get("custom") or {}).get("phase") == "update"


class WidenLate(Pass):
    """Copy a tensor into one of more bytes just before it is used: what waits is a mask's bits, not its floats, and a map, not its windows.

    What is made of state and constants alone, a kernel transposed for instance, is made just before it is used as well: they wait anyway.
    Only the order changes, and only where that needs no more memory at its peak.
    """

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        before, peak = graph.nodes, peak_bytes(graph)
        # where a node goes: before the node of that index, and the sooner the more others stand between
        place = {node: (i, 0) for i, node in enumerate(before)}
        given = _given(graph)
        for node in reversed(before):
            if node.users and (node in given or _is_late(node)):
                index, depth = min((place[user] for user in node.users), key=lambda at: (at[0], -at[1]))
                place[node] = (index, depth + 1)
        _arrange(graph, sorted(before, key=lambda node: (place[node][0], -place[node][1])))
        if peak_bytes(graph) > peak:
            _arrange(graph, before)
        return graph


_WIDENS = {torch.ops.aten._to_copy.default, torch.ops.aten.expand.default, torch.ops.aten.index_select.default, DEQUANTIZE}


def _given(graph: StepGraph) -> set[fx.Node]:
    """The operators that need nothing but state and constants."""
    there = {node for port, node in zip(graph.inputs, graph.placeholders, strict=True) if port.kind == "state"}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and all(n in there or n in found or n.op == "get_attr" for n in node.all_input_nodes):
            found.add(node)
    return found


def _is_late(node: fx.Node) -> bool:
    """Whether a node is a view, or makes more bytes of fewer."""
    if node.op != "call_function":
        return False
    return node.target in VIEWS or (node.target in _WIDENS and _bytes(node) > _bytes(node.args[0]))


def _bytes(node: Any) -> int:
    value = value_of(node)
    return int(value.numel() * value.element_size())


class NarrowEarly(Pass):
    """Make what is smaller as soon as it can be, where a larger tensor would wait for nothing else: a mask's bits wait, not the map.

    Only the order changes, and only where that needs no more memory at its peak.
    """

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        before, peak = graph.nodes, peak_bytes(graph)
        place = {node: (i, 0, i) for i, node in enumerate(before)}
        results = {owner_of(node) for node in graph.results}
        for node in before:
            if node.op == "call_function" and node.users and isinstance(value_of(node), torch.Tensor):
                cone = _alone(node)
                sources = {n for c in cone for n in c.all_input_nodes if n not in cone}
                owners = {owner_of(n) for n in sources}
                freed = [n for n in owners if n.op == "call_function" and n not in results and _waits_for(n, cone, place)]
                if sum(map(_bytes, freed)) > _bytes(node):
                    earlier = [n for n in (*sources, *(reader for n in freed for reader in _readers(n))) if n not in cone]
                    for member in sorted(cone, key=place.__getitem__):
                        latest = max(place[n] for n in (*earlier, *(n for n in member.all_input_nodes if n in cone)))
                        place[member] = (latest[0], latest[1] + 1, place[member][2])
        _arrange(graph, sorted(before, key=place.__getitem__))
        if peak_bytes(graph) > peak:
            _arrange(graph, before)
        return graph


def _alone(node: fx.Node) -> set[fx.Node]:
    """A node with those that compute something for it alone: from what it reads as well, or value by value."""
    cone, queue = {node}, [node]
    while queue:
        reader = queue.pop()
        for source in reader.all_input_nodes:
            if source.op != "call_function" or source in cone or not cone.issuperset(source.users):
                continue
            if set(source.all_input_nodes) <= set(reader.all_input_nodes) or _by_value(source, node):
                cone.add(source)
                queue.append(source)
    return cone


def _by_value(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node computes as many values as another, with at most some operations for each."""
    value = value_of(source)
    if not isinstance(value, torch.Tensor) or value.numel() != value_of(node).numel() or source.target not in FORMULAS:
        return False
    macs, elementwise = FORMULAS[source.target](source)
    return macs == 0 and elementwise > 0


def _waits_for(node: fx.Node, cone: set[fx.Node], place: dict[fx.Node, tuple[int, int, int]]) -> bool:
    """Whether a tensor would be free earlier without these nodes."""
    if not isinstance(value_of(node), torch.Tensor) or owner_of(node) is not node:
        return False
    others = [reader for reader in _readers(node) if reader not in cone]
    return max(place[n] for n in (node, *others)) < min(place[n] for n in cone)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a tensor or a view of it, and the views."""
    return [user for holder in (node, *views_of(node)) for user in holder.users]
