"""Masks of rectifiers in one byte a value, for a runtime whose fast masks are floats."""

from typing import Any

import torch
from torch import fx

from edgecl.graph.memory import owner_of, views_of
from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_operator
from edgecl.graph.quantised import DEQUANTIZE, QUANTIZE
from edgecl.graph.rules.elementwise import LARGE
from edgecl.graph.step import StepGraph, value_of

aten = torch.ops.aten

LEAST_VALUES = 1024
"""Of a mask that is worth it, and that XNNPACK takes wherever it lies: the portable kernels have none for int8."""

_BYTE = (1.0, 0, -128, 127, torch.int8)


class PackMasks(Pass):
    """Keep a mask that a clip makes (:func:`edgecl.graph.rules.elementwise.threshold_backward_by_clip`) as int8 between both passes.

    XNNPACK writes and reads int8 as fast as it copies. A map that something else in the backward pass reads waits for it anyway, and its
    mask is made there.
    """

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if _is_mask(node) and not _waits_anyway(node):
                [reader] = node.users
                with graph.module.graph.inserting_before(reader):
                    packed = new_operator(graph, QUANTIZE, [node, *_BYTE], node)
                    reader.replace_input_with(node, new_operator(graph, DEQUANTIZE, [packed, *_BYTE], node))
        return graph


def _is_mask(node: fx.Node) -> bool:
    if node.target is not aten.clamp.default or node.args[1:] != (0.0, 1.0) or len(node.users) != 1:
        return False
    product: Any = node.args[0]
    return product.target is aten.mul.Tensor and product.args[1] == LARGE and value_of(node).numel() >= LEAST_VALUES


def _waits_anyway(mask: fx.Node) -> bool:
    """Whether the map that a mask is of is an input of the step, or read by something else in the backward pass."""
    own, queue = {mask}, [mask]
    while queue:  # what is computed for the mask alone
        sources = [n for n in queue.pop().all_input_nodes if n.op == "call_function" and own.issuperset(n.users)]
        own.update(sources)
        queue += sources
    read = {n for member in own for n in member.all_input_nodes if n not in own}
    others = [user for n in read for holder in (n, *views_of(n)) for user in holder.users if user not in own]
    return any(owner_of(n).op == "placeholder" for n in read) or any(map(_is_backward, others))


def _is_backward(node: fx.Node) -> bool:
    return (node.meta.get("custom") or {}).get("phase") == "backward"
