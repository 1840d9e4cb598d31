"""Compute a tensor again where it is needed, not keep it, until the activations fit."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from edgecl.graph.cost import FORMULAS
from edgecl.graph.memory import Buffer, lifetimes, owner_of, peak_bytes, plan, views_of
from edgecl.graph.passes.base import Pass
from edgecl.graph.step import StepGraph, value_of

DEEPEST = 8
"""Operators that are computed again for one tensor, at most."""


class Recompute(Pass):
    """Make room at the peak: a tensor that waits there for a later use is computed again for that use, by the same operators.

    Of all tensors that wait, the one goes first that frees the most bytes for an operation computed again; a copied element counts as
    one. Several that are made of one tensor go together where that tensor, which then waits for them, has fewer bytes. What is computed
    again reads inputs, state, constants and tensors that are alive then, or may live on until then below the peak. It ends when the arena
    fits into the limit, or nothing helps any more. No number changes.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; greedy by bytes for work as in Jain et al. 2020,
    "Checkmate", section 6.

    Args:
        limit_bytes: What the arena may have.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        done: list[_Done] = []
        refused: set[tuple[fx.Node, ...]] = set()
        goal = self.limit_bytes
        while (arena := plan(graph).arena_bytes) > self.limit_bytes:
            goal = min(goal, peak_bytes(graph) - (arena - self.limit_bytes))  # an arena has gaps
            if not _lower(graph, goal, done, refused):
                break
        return graph


@dataclass
class _State:
    """What is alive when.

    Attributes:
        position: Index of each node.
        buffers: Buffers by the node that computes them.
        alive: Bytes alive at each node.
    """

    position: dict[fx.Node, int]
    buffers: dict[fx.Node, Buffer]
    alive: np.ndarray[tuple[int], np.dtype[np.int64]]

    @classmethod
    def of(cls, graph: StepGraph) -> "_State":
        nodes = graph.nodes
        named = {node.name: node for node in nodes}
        buffers = {named[b.name]: b for b in lifetimes(graph)}
        alive = np.zeros(len(nodes) + 1, np.int64)
        for buffer in buffers.values():
            alive[buffer.first] += buffer.nbytes
            alive[buffer.last + 1] -= buffer.nbytes
        return cls({node: i for i, node in enumerate(nodes)}, buffers, alive.cumsum())

    @property
    def peak(self) -> int:
        return int(self.alive.max())

    @property
    def height(self) -> tuple[int, int]:
        """The peak, and how many nodes reach it."""
        return self.peak, int((self.alive == self.alive.max()).sum())

    def there(self, node: fx.Node, at: int) -> bool:
        """Whether a buffer is alive at a node, or can be without a new peak; results always are."""
        buffer = self.buffers.get(node)
        if buffer is None or buffer.last >= at:
            return True
        return int(self.alive[buffer.last + 1 : at + 1].max()) + buffer.nbytes < self.peak


@dataclass(frozen=True)
class _Choice:
    """A tensor that waits, and what computes it again.

    Attributes:
        node: What computes the tensor.
        users: Its readers behind the peak in order, each with what it reads: the node or a view of it.
        again: Nodes to be computed again before the first of them, in order, with the views that are read.
        work: Operations of those.
    """

    node: fx.Node
    users: tuple[tuple[fx.Node, fx.Node], ...]
    again: tuple[fx.Node, ...]
    work: int


@dataclass(frozen=True)
class _Done:
    """Choices that were made together, their clones, and whether the peak went down: else fewer nodes are at the peak."""

    choices: tuple[_Choice, ...]
    clones: tuple[dict[fx.Node, fx.Node], ...]
    lower: bool


def _lower(graph: StepGraph, goal: int, done: list[_Done], refused: set[tuple[fx.Node, ...]]) -> bool:
    """Bring the peak down to the goal, and append what was done; or as far as it goes, and return False."""
    state = _State.of(graph)
    while state.peak > goal:
        moves = [move for move in _moves(state) if _key(move) not in refused]
        if not moves:
            while done and not done[-1].lower:
                _undo(graph, done.pop())
            return False
        best = max(moves, key=lambda move: move.worth)
        clones = tuple(_apply(graph, choice) for choice in best.choices)
        after = _State.of(graph)
        done.append(_Done(best.choices, clones, after.peak < state.peak))
        if after.height < state.height:
            state = after
        else:
            _undo(graph, done.pop())
            refused.add(_key(best))
    return True


def _key(move: "_Move") -> tuple[fx.Node, ...]:
    return tuple(n for choice in move.choices for n in (choice.node, choice.users[0][0]))


def _undo(graph: StepGraph, done: _Done) -> None:
    for choice, clones in zip(reversed(done.choices), reversed(done.clones), strict=True):
        for user, source in choice.users:
            user.replace_input_with(clones[source], source)
        for clone in reversed(clones.values()):
            graph.module.graph.erase_node(clone)


@dataclass(frozen=True)
class _Move:
    """Choices made together, and the bytes that they free for an operation."""

    choices: tuple[_Choice, ...]
    worth: float


def _moves(state: _State) -> list[_Move]:
    """Tensors that wait, one by one; and all those that are made of one tensor, which then waits for them."""
    top = int(state.alive.argmax())
    waiting = [n for n, b in state.buffers.items() if b.first < top < b.last]
    moves = [_Move((c,), state.buffers[c.node].nbytes / c.work) for c in (_choice(state, node, top) for node in waiting) if c]
    made_of: dict[fx.Node, list[fx.Node]] = {}
    for node in waiting:
        gone = {o for o in map(owner_of, node.all_input_nodes) if o in state.buffers and state.buffers[o].last < top}
        if len(gone) == 1:
            made_of.setdefault(gone.pop(), []).append(node)
    for source, nodes in made_of.items():
        choices = tuple(c for c in (_choice(state, node, top, source) for node in nodes) if c)
        freed = sum(state.buffers[c.node].nbytes for c in choices) - state.buffers[source].nbytes
        if freed > 0:
            moves.append(_Move(choices, freed / sum(c.work for c in choices)))
    return moves


def _choice(state: _State, node: fx.Node, top: int, held: fx.Node | None = None) -> _Choice | None:
    """How a tensor that waits at the node of index ``top`` is computed again, if it can be, while ``held`` waits."""
    same = [n for n in (node, *views_of(node)) if state.position[n] < top]
    readers = [(user, source) for source in same for user in source.users]
    users = sorted(((u, s) for u, s in readers if state.position[u] > top), key=lambda pair: state.position[pair[0]])
    if not users or any(state.position[u] == top for u, _ in readers):
        return None
    at = state.position[users[0][0]]
    again = _again(state, node, at, DEEPEST, held)
    if again is None:
        return None
    extra = sum(state.buffers[n].nbytes for n in again if n in state.buffers and n is not node)
    if state.alive[at] + extra >= state.peak:
        return None
    behind = {n for _, source in users for n in _path(source)}
    views = sorted((n for n in behind if n not in again), key=state.position.__getitem__)
    return _Choice(node, tuple(users), (*again, *views), sum(map(_work, again)))


def _again(state: _State, node: fx.Node, at: int, most: int, held: fx.Node | None) -> list[fx.Node] | None:
    """What computes a tensor again before the node of index ``at``, in order; None where that is too much or cannot be."""
    if not isinstance(value_of(node), torch.Tensor) or node.target not in FORMULAS:
        return None
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        owner = owner_of(source)
        if source in found or owner.op != "call_function" or owner is held or state.there(owner, at):
            continue
        before = _again(state, owner, at, most - len(found) - 1, held) if most > len(found) + 1 else None
        if before is None:
            return None
        found += [n for n in (*before, *_path(source)) if n not in found]
    return [*found, node] if len(found) < most else None


def _path(node: fx.Node) -> list[fx.Node]:
    """The views between a tensor's buffer and a node, itself included, in order."""
    path = []
    while owner_of(node) is not node:
        path.append(node)
        node = node.all_input_nodes[0]
    return path[::-1]


def _apply(graph: StepGraph, choice: _Choice) -> dict[fx.Node, fx.Node]:
    """Compute again, and let the users behind the peak read that; what stands for what."""
    clones: dict[fx.Node, fx.Node] = {}
    with graph.module.graph.inserting_before(choice.users[0][0]):
        for node in choice.again:
            clones[node] = graph.module.graph.node_copy(node, lambda n: clones.get(n, n))
    for user, source in choice.users:
        user.replace_input_with(source, clones[source])
    return clones


def _work(node: fx.Node) -> int:
    """Operations of a node, one for each element at least; none of a view."""
    if owner_of(node) is not node:
        return 0
    return max(sum(FORMULAS[node.target](node)), int(value_of(node).numel()))
