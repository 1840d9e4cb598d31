"""Which operators of a graph a delegate computes in one call.

ExecuTorch's own partitioner tries to merge every pair of operators and looks through the whole graph for each: too long for a recurrence
that is unrolled. Here every operator gets the number of borders between delegate and portable kernels that lie before it on the longest way
from an input; operators of one number are one part, for a way from one to the other crosses no border. That is as few parts as can be.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any


def parts_of(nodes: Iterable[Any], units: Sequence[list[Any]]) -> list[list[Any]]:
    """Parts that can each run in one call, first to last.

    Args:
        nodes: All nodes of a graph in an order in which they can run.
        units: Nodes that a delegate can take, each once, those together that it takes together: an operator, its weights, an activation.
    """
    order = list(nodes)
    taken = {node for unit in units for node in unit if node.op == "call_function"}
    number: dict[Any, int] = {}
    for node in order:
        number[node] = max((number[n] + (node not in taken and n in taken) for n in node.all_input_nodes), default=0)
    for node in reversed(order):
        if node in taken and node.users and taken.issuperset(node.users) and not _shrinks(node):
            number[node] = min(number[user] for user in node.users)  # where it is needed: its result need not be kept till then
    parts: dict[int, list[Any]] = defaultdict(list)
    for node in order:
        if node in taken:
            parts[number[node]].append(node)
    for unit in units:  # weights go where they are needed first
        operators = [node for node in unit if node in taken]
        parts[min(number[node] for node in operators)] += [node for node in unit if node not in taken]
    return [parts[key] for key in sorted(parts)]


def _shrinks(node: Any) -> bool:
    """Whether a node's result is smaller than what it reads, and would have to be kept for it."""
    sizes = [n.meta["val"].numel() for n in node.all_input_nodes if n.op != "placeholder"]
    return bool(sum(sizes) > node.meta["val"].numel())
