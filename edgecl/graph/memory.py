"""Memory of a step's intermediate tensors: lifetimes over the order that runs, an arena plan, and its verifier.

Inputs, constants and outputs live in buffers of their own, which the ledger counts elsewhere. What a runtime adds for
itself (packed weights, scratch of a kernel) is not known before it runs; the ledger names it as not counted.
"""

import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

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
        first: Index of the node that writes it.
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
    kept = {_owner(node) for node in graph.results}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            owner = _owner(source)
            last[owner] = max(last.get(owner, 0), position[node])
    buffers = []
    for node in nodes:
        if node.op != "call_function" or _owner(node) is not node or node in kept:
            continue
        size = sum(_aligned(v.numel() * v.element_size()) for v in _tensors(node))
        buffers.append(Buffer(node.name, size, position[node], last.get(node, position[node])))
    return buffers


def plan(graph: StepGraph) -> Plan:
    """Place every buffer, largest first, at the lowest offset free over its lifetime.

    Source: Pisarchyk & Lee 2020, "Efficient Memory Management for Deep Neural Net Inference", greedy by size.
    """
    wanted = lifetimes(graph)
    placed: list[Buffer] = []
    for buffer in sorted(wanted, key=lambda b: (-b.nbytes, b.first)):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.first <= buffer.last and buffer.first <= other.last:
                if offset + buffer.nbytes <= other.offset:
                    break
                offset = max(offset, other.offset + other.nbytes)
        placed.append(Buffer(buffer.name, buffer.nbytes, buffer.first, buffer.last, offset))
    return Plan(max((b.offset + b.nbytes for b in placed), default=0), peak_bytes(graph), tuple(placed))


def peak_bytes(graph: StepGraph) -> int:
    """Largest sum of bytes alive at once, in the graph's present order."""
    change = np.zeros(len(graph.nodes) + 1, np.int64)
    for buffer in lifetimes(graph):
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
    owner_of: dict[fx.Node, int] = {}
    nodes = graph.nodes
    for index, node in enumerate(nodes):
        owner_of[node] = -1
        if node.op != "call_function":
            pass
        elif _same_bytes(node):
            owner_of[node] = owner_of[node.all_input_nodes[0]]
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
            owner_of[node] = index
        elif results.isdisjoint([node, *_views_of(node)]):
            raise GraphError(f"memory plan of {graph.name!r}: {node.name} has no place")
        for source in node.all_input_nodes:  # after the write: an operator must not overwrite what it reads
            owner = owner_of[source]
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


def _views_of(node: fx.Node) -> list[fx.Node]:
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
    return node.target in VIEWS or node.target is operator.getitem


def _owner(node: fx.Node) -> fx.Node:
    """The node whose buffer a node's value lies in."""
    while node.op == "call_function" and _same_bytes(node):
        node = node.all_input_nodes[0]
    return node


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
