"""Operators of an int8 trunk.

Between ``quantize`` and ``dequantize`` a tensor is int8; what lies between a ``dequantize`` and the next ``quantize`` runtimes compute in
integers.
"""

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines the operators
from torch import fx

aten = torch.ops.aten
_ops = torch.ops.quantized_decomposed

QUANTIZE = _ops.quantize_per_tensor.default
DEQUANTIZE = _ops.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = _ops.dequantize_per_channel.default
QUANTIZE_CHANNELS = _ops.quantize_per_channel.default

DEQUANTIZES = frozenset({DEQUANTIZE, DEQUANTIZE_CHANNELS})


LAYERS = frozenset({aten.convolution.default, aten.addmm.default, aten.mm.default, aten.add.Tensor, aten.mul.Tensor, aten.cat.default})
"""What both runtimes compute in integers."""

_BIASES = {aten.convolution.default: 2, aten.addmm.default: 0}
"""Places of what may be float."""

_OF_TENSORS = frozenset({aten.add.Tensor, aten.mul.Tensor})

ACTIVATIONS = frozenset({aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default})
"""What runtimes compute as the limits of a quantization."""

_MOVES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default})


def is_dequantized(node: Any) -> bool:
    """Whether a node's values are those of integers."""
    return isinstance(node, fx.Node) and node.target in DEQUANTIZES


def source_of(node: Any) -> Any:
    """The node behind transpositions and reshapes."""
    while isinstance(node, fx.Node) and node.target in _MOVES:
        node = node.args[0]
    return node


def is_packed(node: Any) -> bool:
    """Whether a node is a frozen tensor kept in integers, transposed or reshaped at most: folded, it would be float again."""
    found = source_of(node)
    return is_dequantized(found) and all(n.op == "get_attr" for n in found.all_input_nodes)


def quantization_of(node: fx.Node) -> fx.Node | None:
    """The quantization whose integers a runtime computes at once from those of a layer's operands, for the layer and an activation in it.

    The layer's operands are dequantized, a bias may be float; nothing but the activation, if any, and the quantization reads its result.
    """
    layer = node.args[0] if node.target in ACTIVATIONS else node
    if not isinstance(layer, fx.Node) or layer.target not in LAYERS:
        return None
    operands = [n for i, n in enumerate(layer.args) if i != _BIASES.get(layer.target)]
    tensors = [n for operand in operands for n in (operand if isinstance(operand, (list, tuple)) else [operand]) if isinstance(n, fx.Node)]
    numbers = layer.target in _OF_TENSORS and len(tensors) < 2  # a sum or a product with a number
    if numbers or not tensors or not all(is_dequantized(source_of(n)) for n in tensors):
        return None
    readers = list(layer.users)
    if len(readers) == 1 and readers[0].target in ACTIVATIONS:
        readers = list(readers[0].users)
    return readers[0] if len(readers) == 1 and readers[0].target is QUANTIZE else None


def is_never_float(node: Any) -> bool:
    """Whether a node is dequantized, transposed and reshaped only as part of the layers that read it."""
    readers = [user for user in getattr(node, "users", ()) if not (user.target in _MOVES and is_never_float(user))]
    return is_dequantized(source_of(node)) and all(quantization_of(user) is not None for user in readers)
