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
    group = _groups(units)
    taken = set(group)
    together = {node: group.get(node, [node]) for node in order}
    last = {node: members[-1] for node, members in together.items()}
    ends = [node for node in order if last[node] is node]  # in this order whatever a group reads comes before it
    number: dict[Any, int] = {}
    for end in ends:
        read = {n for node in together[end] for n in node.all_input_nodes if last[n] is not end}
        number[end] = max((number[last[n]] + (end not in taken and n in taken) for n in read), default=0)
    for end in reversed(ends):
        readers = {user for node in together[end] for user in node.users if last[user] is not end}
        if end in taken and readers and taken.issuperset(readers) and not _shrinks(together[end]):
            number[end] = min(number[last[user]] for user in readers)  # where it is needed: its result need not be kept till then
    for node in order:
        number[node] = number[last[node]]
    parts: dict[int, list[Any]] = defaultdict(list)
    for node in order:
        if node in taken:
            parts[number[node]].append(node)
    for unit in units:  # weights go where they are needed first
        operators = [node for node in unit if node in taken]
        parts[min(number[node] for node in operators)] += [node for node in unit if node not in taken]
    return [parts[key] for key in sorted(parts)]


def _groups(units: Sequence[list[Any]]) -> dict[Any, list[Any]]:
    """Operators by which others stay with them, in the order of execution; units that share one are one."""
    group: dict[Any, list[Any]] = {}
    for unit in units:
        operators = {node for node in unit if node.op == "call_function"}
        members = sorted(operators.union(*(group[node] for node in operators if node in group)))
        group.update(dict.fromkeys(members, members))
    return group


def _shrinks(group: Sequence[Any]) -> bool:
    """Whether the result of operators is smaller than what they read, and would have to be kept for it."""
    read = [n for node in group for n in node.all_input_nodes if n not in group]
    return bool(sum(n.meta["val"].numel() for n in read if n.op != "placeholder") > group[-1].meta["val"].numel())
