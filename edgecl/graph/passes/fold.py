"""Fold what is frozen: constant expressions, and the scale and shift of frozen batch norm into frozen convolutions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgecl.graph.passes.base import Pass, is_foldable
from edgecl.graph.step import StepGraph, shape_of, value_of

aten = torch.ops.aten


class FoldConstants(Pass):
    """Evaluate every operator that depends on constants alone."""

    ensures = frozenset({"constants-folded"})
    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.op == "call_function" and is_foldable(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _known(graph, source))
                with torch.no_grad():
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
                if isinstance(value, Tensor):
                    replace_by_constant(graph, node, value)
                else:
                    for item in list(node.users):  # getitem: the operator has several results
                        replace_by_constant(graph, item, value[item.args[1]])
                    graph.module.graph.erase_node(node)
        return graph


def _known(graph: StepGraph, node: fx.Node) -> Tensor:
    """A constant; of another node, whose values are not asked for, zeros of its shape."""
    return graph.constant(node) if node.op == "get_attr" else torch.zeros(shape_of(node), dtype=value_of(node).dtype)


class FoldConvolutionAffine(Pass):
    """``conv(x, W) * scale + shift`` with frozen factors becomes one convolution; on the way back the kernel takes the scale, too.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2.
    """

    requires = frozenset({"constants-folded"})
    ensures = frozenset({"constants-folded"})
    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            if node.op == "call_function" and node.target in (aten.mul.Tensor, aten.add.Tensor) and not node.kwargs:
                _fold_into_producer(graph, node)
            elif node.target is aten.convolution_backward.default:
                _fold_into_gradient(graph, node)
        return graph


def _fold_into_producer(graph: StepGraph, node: fx.Node) -> None:
    conv, factor = node.args[0], node.args[1]
    if not isinstance(conv, fx.Node) or conv.target is not aten.convolution.default or len(conv.users) != 1:
        return
    x, weight, bias = conv.args[:3]
    if bool(conv.args[6]) or not _frozen(weight) or not (bias is None or _frozen(bias)):
        return
    if (shape_of(conv), value_of(conv).dtype) != (shape_of(node), value_of(node).dtype):
        return  # the factor widens the result
    channels = shape_of(conv)[1]
    kernel = graph.constant(weight)  # type: ignore[arg-type]
    vector = _channel_vector(graph, factor, channels, kernel)
    if vector is None:
        return
    old_bias = graph.constant(bias) if isinstance(bias, fx.Node) else torch.zeros(channels, dtype=kernel.dtype)
    if node.target is aten.mul.Tensor:
        kernel, old_bias = kernel * vector.reshape(-1, *[1] * (kernel.dim() - 1)), old_bias * vector
    else:
        old_bias = old_bias + vector
    with graph.module.graph.inserting_before(conv):
        new = (new_constant(graph, kernel, conv), new_constant(graph, old_bias, conv))
    conv.args = (x, *new, *conv.args[3:])
    node.replace_all_uses_with(conv)
    graph.module.graph.erase_node(node)


def _fold_into_gradient(graph: StepGraph, node: fx.Node) -> None:
    """The input gradient of ``gradient * scale`` is that of ``gradient`` with the kernel's rows scaled."""
    scaled, _, weight = node.args[:3]
    if not isinstance(scaled, fx.Node) or scaled.target is not aten.mul.Tensor or len(scaled.users) != 1:
        return
    if not _frozen(weight) or bool(node.args[7]) or list(node.args[10]) != [True, False, False]:  # type: ignore[arg-type]
        return
    gradient: Any = scaled.args[0]
    if (shape_of(gradient), value_of(gradient).dtype) != (shape_of(scaled), value_of(scaled).dtype):
        return  # the factor widens the gradient
    kernel = graph.constant(weight)  # type: ignore[arg-type]
    vector = _channel_vector(graph, scaled.args[1], shape_of(scaled)[1], kernel)
    if vector is None:
        return
    with graph.module.graph.inserting_before(node):
        new = new_constant(graph, kernel * vector.reshape(-1, *[1] * (kernel.dim() - 1)), weight)  # type: ignore[arg-type]
    node.update_arg(0, gradient)
    node.update_arg(2, new)
    graph.module.graph.erase_node(scaled)


def _frozen(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _channel_vector(graph: StepGraph, factor: object, channels: int, kernel: Tensor) -> Tensor | None:
    """The factor as [C] of the kernel's dtype when it is a constant that varies along the channels only."""
    if isinstance(factor, (int, float)):
        return torch.full((channels,), float(factor), dtype=kernel.dtype)
    if not _frozen(factor):
        return None
    value = graph.constant(factor)  # type: ignore[arg-type]
    shape = [1] * (kernel.dim() - value.dim()) + list(value.shape)
    if shape[1] not in (1, channels) or any(size != 1 for i, size in enumerate(shape) if i != 1):
        return None
    return value.reshape(-1).expand(channels).to(kernel.dtype)


def new_constant(graph: StepGraph, value: Tensor, like: fx.Node) -> fx.Node:
    """A ``get_attr`` node for a new frozen tensor, inserted at the graph's current insertion point."""
    index = 0
    while hasattr(graph.module, f"_folded_{index}"):
        index += 1
    name = f"_folded_{index}"
    # In full: a stride of zero, as an expanded scalar has, is none that ExecuTorch takes.
    plain = value.detach().clone(memory_format=torch.contiguous_format)
    graph.module.register_buffer(name, plain)
    node = graph.module.graph.get_attr(name)
    node.meta.update({"val": plain, "custom": dict(like.meta.get("custom") or {})})
    return node


def new_operator(graph: StepGraph, target: Any, args: Sequence[Any], like: fx.Node) -> fx.Node:
    """A node that calls an operator, inserted at the graph's current insertion point; its place in the model is that of ``like``."""
    node = graph.module.graph.call_function(target, tuple(args))
    values = fx.node.map_arg(args, lambda a: torch.empty(shape_of(a), dtype=value_of(a).dtype, device="meta"))
    node.meta.update({"val": target(*values), "custom": dict(like.meta.get("custom") or {})})
    return node


def replace_by_constant(graph: StepGraph, node: fx.Node, value: Tensor) -> None:
    """Put a constant in a node's place."""
    with graph.module.graph.inserting_before(node):
        constant = new_constant(graph, value, node)
    node.replace_all_uses_with(constant)
    graph.module.graph.erase_node(node)
