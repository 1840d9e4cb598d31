"""Memory of a step's intermediate tensors: lifetimes over the order that runs, an arena plan, and its verifier.

Inputs, constants and outputs live in buffers of their own, which the ledger counts elsewhere. What a runtime adds for
itself (packed weights, scratch of a kernel) is not known before it runs; the ledger names it as not counted.
"""

import operator
from bisect import insort
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from edgecl.graph.quantised import is_never_float, quantization_of
from edgecl.graph.step import GraphError, StepGraph, value_of

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
"""Operators whose result is the same bytes under another shape, on every runtime."""

ALIGNMENT = 64


@dataclass(frozen=True)
class Buffer:
    """An intermediate tensor and its place in the arena.

    Attributes:
        name: The node that computes it.
        nbytes: Its size, rounded up to :data:`ALIGNMENT`.
        first: Index of the node that writes it, of a quantization the layer whose result it is.
        last: Index of the last node that reads it or a view of it.
        offset: Its place in the arena.
    """

    name: str
    nbytes: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    """Arena of a step.

    Attributes:
        arena_bytes: Size of the arena.
        peak_bytes: Largest sum of bytes alive at once; no plan can need less.
        buffers: Every buffer with its offset.
    """

    arena_bytes: int
    peak_bytes: int
    buffers: tuple[Buffer, ...]


def lifetimes(graph: StepGraph) -> list[Buffer]:
    """Every buffer that the step needs while it runs, without offsets."""
    nodes = graph.nodes
    position = {node: i for i, node in enumerate(nodes)}
    kept = {owner_of(node) for node in graph.results}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            owner = owner_of(source)
            last[owner] = max(last.get(owner, 0), position[node])
    buffers = []
    first = {found: position[node] for node in reversed(nodes) if (found := quantization_of(node)) is not None}
    for node in nodes:
        if node.op != "call_function" or owner_of(node) is not node or node in kept or quantization_of(node) is not None:
            continue
        size = sum(_aligned(v.numel() * v.element_size()) for v in _tensors(node))
        buffers.append(Buffer(node.name, size, first.get(node, position[node]), last.get(node, position[node])))
    return buffers


def plan(graph: StepGraph) -> Plan:
    """Place every buffer of a step."""
    placed = arrange(lifetimes(graph))
    return Plan(_end(placed), _peak(placed), placed)


def arrange(wanted: Iterable[Buffer]) -> tuple[Buffer, ...]:
    """Place every buffer at the lowest offset free over its lifetime, in the best of three orders: by size, by lifetime, by both.

    Source: Pisarchyk & Lee 2020, "Efficient Memory Management for Deep Neural Net Inference", greedy by size.
    """
    buffers = list(wanted)
    least = _peak(buffers)
    best: tuple[Buffer, ...] | None = None
    for order in _ORDERS:
        found = _in_order(sorted(buffers, key=order))
        if best is None or _end(found) < _end(best):
            best = found
        if _end(best) == least:
            break
    assert best is not None
    return best


_ORDERS: tuple[Callable[[Buffer], tuple[int, int]], ...] = (
    lambda b: (-b.nbytes, b.first),
    lambda b: (b.first - b.last, -b.nbytes),
    lambda b: ((b.first - b.last - 1) * b.nbytes, b.first),
)


def _in_order(buffers: Iterable[Buffer]) -> tuple[Buffer, ...]:
    placed: list[Buffer] = []  # by offset
    for buffer in buffers:
        offset = 0
        for other in placed:
            if other.first <= buffer.last and buffer.first <= other.last:
                if offset + buffer.nbytes <= other.offset:
                    break
                offset = max(offset, other.offset + other.nbytes)
        insort(placed, replace(buffer, offset=offset), key=lambda b: b.offset)
    return tuple(placed)


def _end(placed: Iterable[Buffer]) -> int:
    return max((b.offset + b.nbytes for b in placed), default=0)


def peak_bytes(graph: StepGraph) -> int:
    """Largest sum of bytes alive at once, in the graph's present order."""
    return _peak(lifetimes(graph))


def least_bytes(graph: StepGraph) -> int:
    """The peak where an elementwise result takes the place of an operand of as many bytes that ends there, as runtimes may have it."""
    nodes = graph.nodes
    buffers = lifetimes(graph)
    alive = np.zeros(len(nodes) + 1, np.int64)
    ending: dict[int, list[int]] = {}
    for buffer in buffers:
        alive[buffer.first] += buffer.nbytes
        alive[buffer.last + 1] -= buffer.nbytes
        ending.setdefault(buffer.last, []).append(buffer.nbytes)
    alive = alive.cumsum()
    named = {node.name: node for node in nodes}
    for buffer in buffers:
        target = named[buffer.name].target
        elementwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        if (elementwise or target in _IN_PLACE) and buffer.nbytes in ending.get(buffer.first, []):
            alive[buffer.first] -= buffer.nbytes
    return int(alive.max())


_IN_PLACE = {aten._softmax.default, aten._log_softmax.default}


def kept_for_backward(graph: StepGraph) -> dict[str, int]:
    """Bytes by type that are alive when the loss is there and are read later: what the forward pass leaves for the backward pass.

    Empty for a step without a backward pass.
    """
    nodes = graph.nodes
    losses = [node for port, node in zip(graph.outputs, graph.results, strict=True) if port.name == "loss"]
    if not losses or not any((node.meta.get("custom") or {}).get("phase") == "backward" for node in nodes):
        return {}
    end = _before_backward(graph, losses[0])
    found: dict[str, int] = {}
    named = {node.name: node for node in nodes}
    for buffer in lifetimes(graph):
        if buffer.first <= end < buffer.last:
            name = str(_tensors(named[buffer.name])[0].dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + buffer.nbytes
    return found


def _before_backward(graph: StepGraph, loss: fx.Node) -> int:
    """Index of the node behind which the backward pass begins: the loss, unless it waits longer, as where weights alone add to it.

    What it begins with is a backward operator that needs the last product of the forward pass, which masks and the like do not.
    """
    nodes = graph.nodes
    needed, waiting = {loss}, [loss]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                waiting.append(source)
    products = [i for i, node in enumerate(nodes) if node in needed and node.target in _PRODUCTS]
    end = nodes.index(loss)
    behind = {nodes[products[-1]]} if products else set()
    for i in range(products[-1] + 1 if products else end, end):
        if behind.intersection(nodes[i].all_input_nodes):
            if (nodes[i].meta.get("custom") or {}).get("phase") == "backward":
                return i - 1
            behind.add(nodes[i])
    return end


_PRODUCTS = {aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default}


def _peak(buffers: Collection[Buffer]) -> int:
    change = np.zeros(max((b.last for b in buffers), default=-1) + 2, np.int64)
    for buffer in buffers:
        change[buffer.first] += buffer.nbytes
        change[buffer.last + 1] -= buffer.nbytes
    return int(change.cumsum().max())


def verify(graph: StepGraph, found: Plan) -> None:
    """Check a plan against the graph, without the planner's own bookkeeping: walk the nodes, write and read the arena.

    Every byte of the arena carries the name of the buffer written there last; each read must find its own name.

    Raises:
        GraphError: naming the node that would read another tensor's bytes, or a buffer that is missing or too small.
    """
    places = {b.name: b for b in found.buffers}
    arena = np.full(-(-found.arena_bytes // ALIGNMENT), -1, np.int64)
    results = set(graph.results)
    owners: dict[fx.Node, int] = {}
    nodes = graph.nodes
    for index, node in enumerate(nodes):
        owners[node] = -1
        if node.op != "call_function":
            pass
        elif (integers := quantization_of(node)) is not None:  # whose place a runtime writes, and no float
            owners[node] = nodes.index(integers)
            arena[_units(places[integers.name])] = owners[node]
        elif _same_bytes(node):
            owners[node] = owners[node.all_input_nodes[0]]
        elif node.name in places:
            place = places[node.name]
            need = sum(v.numel() * v.element_size() for v in _tensors(node))
            if place.nbytes < need:
                raise GraphError(f"memory plan of {graph.name!r}: {node.name} needs {need} bytes, its place has {place.nbytes}")
            if place.offset < 0 or place.offset % ALIGNMENT or place.offset + place.nbytes > found.arena_bytes:
                raise GraphError(
                    f"memory plan of {graph.name!r}: {node.name} must start at a multiple of {ALIGNMENT} and end within "
                    f"{found.arena_bytes} bytes, its place is {place.offset} to {place.offset + place.nbytes}"
                )
            arena[_units(place)] = index
            owners[node] = index
        elif results.isdisjoint([node, *views_of(node)]):
            raise GraphError(f"memory plan of {graph.name!r}: {node.name} has no place")
        for source in node.all_input_nodes:  # after the write: an operator must not overwrite what it reads
            owner = owners[source]
            if owner >= 0 and (arena[_units(places[nodes[owner].name])] != owner).any():
                raise GraphError(f"memory plan of {graph.name!r}: {node.name} reads {nodes[owner].name} after it was overwritten")


def _units(place: Buffer) -> slice:
    return slice(place.offset // ALIGNMENT, -(-(place.offset + place.nbytes) // ALIGNMENT))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    """What a node computes; of several results those that are used, as no runtime computes the others."""
    values = value_of(node)
    if isinstance(values, torch.Tensor):
        return [values]
    if node.target is torch.ops.aten.split_with_sizes.default:  # which no runtime does by halves
        return list(values)
    return [values[i] for i in sorted({int(str(user.args[1])) for user in node.users})]


def views_of(node: fx.Node) -> list[fx.Node]:
    """Every node whose value lies in a node's buffer, but itself."""
    found, queue = [], list(node.users)
    while queue:
        user = queue.pop()
        if user.op == "call_function" and _same_bytes(user):
            found.append(user)
            queue += list(user.users)
    return found


def _same_bytes(node: fx.Node) -> bool:
    if node.target is aten.t.default:  # a matrix product reads its operands transposed for nothing
        return all(user.target in (aten.mm.default, aten.addmm.default) for user in node.users)
    return node.target in VIEWS or node.target is operator.getitem or is_never_float(node)


def owner_of(node: fx.Node) -> fx.Node:
    """The node whose buffer a node's value lies in."""
    while node.op == "call_function" and _same_bytes(node):
        node = node.all_input_nodes[0]
    return node


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
