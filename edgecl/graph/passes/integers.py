"""Quantised layers in the form that ONNX Runtime computes in integers."""

from typing import Any

import torch
from torch import Tensor, fx

from edgecl.graph.passes.base import Pass
from edgecl.graph.passes.clean import Clean
from edgecl.graph.passes.fold import new_constant, new_operator
from edgecl.graph.quantised import ACTIVATIONS, DEQUANTIZE_CHANNELS, QUANTIZE, QUANTIZE_CHANNELS, is_packed, quantization_of, source_of
from edgecl.graph.step import StepGraph

aten = torch.ops.aten

_LAYERS: dict[Any, tuple[int, int, int]] = {aten.convolution.default: (0, 1, 2), aten.addmm.default: (1, 2, 0)}
"""Places of input, weight and bias among the arguments of layers."""

_LIMITS = (-(2**31), 2**31 - 1, torch.int32)


class WriteIntegers(Pass):
    """Write as integers what XNNPACK makes integers of by itself, of the same formulas.

    A bias becomes int32 of scale ``scale of the input * scale of the weights``, in which the sums are. An activation whose limits are those
    of the quantization behind it goes, as the integers have the same limits, and zero points that are all zero go. No result changes, but
    for the rounding of the bias, far below that of the layer's result.
    """

    breaks = frozenset({"no-dead-code"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        for node in graph.nodes:
            source: Any = node.args[0] if node.args else None
            if node.target in _LAYERS and quantization_of(node) is not None:
                _quantize_bias(graph, node, *_LAYERS[node.target])
            if node.target is QUANTIZE and source.target in ACTIVATIONS and _saturates(node, source):
                node.update_arg(0, source.args[0])
        for node in graph.nodes:
            zeros: Any = node.args[2] if node.target is DEQUANTIZE_CHANNELS else None
            if zeros is not None and not graph.constant(zeros).any():
                node.update_arg(2, None)
        return graph


def stored(graph: StepGraph) -> dict[str, Tensor]:
    """Frozen tensors as every runtime has them in its files, those of integer layers as integers."""
    return Clean()(WriteIntegers()(graph.copy())).constants()


def _saturates(quantize: fx.Node, activation: fx.Node) -> bool:
    """Whether the limits of an activation, quantized, are the ends of the integers."""
    value = torch.tensor([-torch.inf, torch.inf])
    limits = torch.nan_to_num(activation.target(value, *activation.args[1:]), posinf=3e38, neginf=-3e38)  # type: ignore[operator]
    low, high = QUANTIZE(limits, *quantize.args[1:]).tolist()
    return (low, high) == quantize.args[3:5]


def _quantize_bias(graph: StepGraph, node: fx.Node, x: int, weight: int, bias: int) -> None:
    given: Any = node.args[bias]
    kernel = source_of(node.args[weight])
    if given is None or given.op != "get_attr" or not is_packed(kernel) or kernel.target is not DEQUANTIZE_CHANNELS:
        return
    scales = graph.constant(kernel.args[1]) * source_of(node.args[x]).args[1]
    zero = torch.zeros(len(scales), dtype=torch.int64)
    integers = QUANTIZE_CHANNELS(graph.constant(given), scales, zero, 0, *_LIMITS)
    with graph.module.graph.inserting_before(node):
        constants = [new_constant(graph, value, node) for value in (integers, scales)]
        node.update_arg(bias, new_operator(graph, DEQUANTIZE_CHANNELS, [*constants, None, 0, *_LIMITS], node))
