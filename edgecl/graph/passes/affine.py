"""Move the scale and shift behind a convolution into its kernel and bias, where a kernel has fewer values than a feature map.

``conv(x, W, b) * s + t = conv(x, W s, b s + t)``. Backward, with ``V = W s`` and the gradient ``g`` behind the scale: the input gradient
is that of ``V``, and from ``dV``, the weight gradient of ``V``, follow ``dW = dV s``, ``db = s sum(g)``, ``ds = sum(dV W) + b sum(g)``: no
operator of a feature map's size is left. This is :class:`edgecl.graph.passes.fold.FoldConvolutionAffine` for what is trained.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.passes.tools_common import stable_topological_sort

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.fold import new_constant, new_operator
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten


class ScaleKernels(Pass):
    """See the module. Frozen kernels behind a changing scale stay as they are: nothing else asks for their gradient."""

    breaks = frozenset({"no-dead-code", "constants-folded"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        backward: dict[Any, list[fx.Node]] = {}
        for node in graph.operators:
            if node.target is aten.convolution_backward.default:
                backward.setdefault((node.args[1], node.args[2]), []).append(node)
        for node in graph.nodes:
            if node.target is aten.convolution.default and not node.args[6]:
                found = _match(node, backward.get((node.args[0], node.args[1]), []))
                if found is not None:
                    _rewrite(graph, found)
        stable_topological_sort(graph.module)
        return graph


@dataclass(frozen=True)
class _Scaled:
    """A convolution, what scales it, and what the backward pass does with both.

    Attributes:
        conv: The convolution.
        mul: Its product with the scale.
        scale: The scale, [C, 1, ...].
        backward: ``convolution_backward`` of ``gradient * scale``, or None.
        gradient: The gradient behind the scale.
        products: Products of ``gradient`` and the convolution's result, each summed over all but the channels.
    """

    conv: fx.Node
    mul: fx.Node
    scale: fx.Node
    backward: fx.Node | None
    gradient: fx.Node | None
    products: list[fx.Node]


def _match(conv: fx.Node, backwards: list[fx.Node]) -> _Scaled | None:
    weight: Any = conv.args[1]
    muls = [user for user in conv.users if user.target is aten.mul.Tensor and along_channels(user.args[1], conv)]
    if len(backwards) > 1 or len(muls) != 1:
        return None
    [mul] = muls
    scale: Any = mul.args[1]
    products = [user for user in conv.users if user is not mul]
    backward, gradient = None, None
    if backwards:
        [backward] = backwards
        scaled: Any = backward.args[0]
        if scaled.target is not aten.mul.Tensor or len(scaled.users) != 1 or scaled.args[1] is not scale:
            return None
        gradient = scaled.args[0]
    wanted: Any = backward.args[10] if backward is not None else (False, False, False)
    if products and not (wanted[1] and all(_summed(user, conv, gradient) for user in products)):
        return None
    if weight.op == "get_attr" and scale.op != "get_attr":
        return None  # its own gradient is asked for by nobody, and the kernel would be scaled in every step
    if weight.op != "get_attr" and prod(shape_of(weight)) >= prod(shape_of(conv)):
        return None
    return _Scaled(conv, mul, scale, backward, gradient, products)


def along_channels(factor: Any, like: fx.Node) -> bool:
    """Whether a factor is a vector along the channels, [C, 1, ...]."""
    if not isinstance(factor, fx.Node):
        return False
    channels, *rest = shape_of(like)[1:]
    return shape_of(factor) == (channels, *[1] * len(rest)) and value_of(factor).dtype == value_of(like).dtype


def _summed(node: fx.Node, conv: fx.Node, gradient: fx.Node | None) -> bool:
    """Whether a node is the gradient times the convolution's result, summed over all but the channels, and nothing else."""
    if node.target is not aten.mul.Tensor or set(node.args) != {conv, gradient} or len(node.users) != 1:
        return False
    [total] = node.users
    return total.target is aten.sum.dim_IntList and list(total.args[1:]) == [[0, *range(2, len(shape_of(conv)))]]


def _rewrite(graph: StepGraph, found: _Scaled) -> None:
    conv, backward = found.conv, found.backward
    weight: Any = conv.args[1]
    bias: Any = conv.args[2]
    rank, channels = len(shape_of(weight)), shape_of(conv)[1]
    body = graph.module.graph

    found.mul.prepend(conv)  # behind its scale; all its users come later
    with body.inserting_before(conv):
        factor = new_operator(graph, aten.reshape.default, [found.scale, [channels, *[1] * (rank - 1)]], found.mul)
        kernel = new_operator(graph, aten.mul.Tensor, [weight, factor], found.mul)
        vector = new_operator(graph, aten.reshape.default, [found.scale, [channels]], found.mul)
        scaled = None if bias is None else new_operator(graph, aten.mul.Tensor, [bias, vector], found.mul)
    conv.update_arg(1, kernel)
    conv.update_arg(2, scaled)
    found.mul.replace_all_uses_with(conv)
    body.erase_node(found.mul)
    if backward is not None:
        backward.update_arg(0, found.gradient)
        backward.update_arg(2, kernel)
        for item in [user for user in backward.users if user.args[1] == 2]:
            with body.inserting_after(item):
                own = new_operator(graph, aten.mul.Tensor, [item, vector], item)
            item.replace_all_uses_with(own)
            own.update_arg(0, item)
        for item in [user for user in backward.users if user.args[1] == 1]:
            with body.inserting_after(item):
                own = new_operator(graph, aten.mul.Tensor, [item, factor], item)
            item.replace_all_uses_with(own)
            own.update_arg(0, item)
            for product in found.products:
                [total] = product.users
                with body.inserting_after(own):
                    terms = new_operator(graph, aten.mul.Tensor, [item, weight], total)
                with body.inserting_after(terms):
                    summed = new_operator(graph, aten.sum.dim_IntList, [terms, list(range(1, rank))], total)
                if bias is not None:
                    with body.inserting_after(summed):
                        all_of_it = new_operator(graph, aten.sum.dim_IntList, [found.gradient, [0, *range(2, rank)]], total)
                    with body.inserting_after(all_of_it):
                        offset = new_operator(graph, aten.mul.Tensor, [bias, all_of_it], total)
                    with body.inserting_after(offset):
                        summed = new_operator(graph, aten.add.Tensor, [summed, offset], total)
                total.replace_all_uses_with(summed)
                body.erase_node(total)
                body.erase_node(product)
    _join_bias(graph, conv)


def _join_bias(graph: StepGraph, conv: fx.Node) -> None:
    """A shift that is all that follows the convolution becomes its bias, or part of it."""
    users = list(conv.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].args[0] is not conv or users[0].kwargs:
        return
    shift: Any = users[0].args[1]
    if not along_channels(shift, conv):
        return
    if shift.op == "get_attr":
        with graph.module.graph.inserting_before(conv):
            vector = new_constant(graph, graph.constant(shift).reshape(-1), shift)
    elif shift.target is aten.reshape.default and len(shape_of(shift.args[0])) == 1:
        vector = shift.args[0]
    else:
        return
    if conv.args[2] is not None:
        with graph.module.graph.inserting_before(conv):
            vector = new_operator(graph, aten.add.Tensor, [conv.args[2], vector], users[0])
    conv.update_arg(2, vector)
    users[0].replace_all_uses_with(conv)
