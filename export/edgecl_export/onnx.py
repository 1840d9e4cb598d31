"""ONNX emitter: a lowered step graph becomes an ONNX model whose frozen weights lie in a file shared by all steps.

Every name, size and type is written explicitly; nothing is optimised here, because the exporter that ships with
PyTorch was seen to delete ``+ 1e-8`` and to scale the gradient of a loss (``docs/design-notes.md``).
"""

import hashlib
import operator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, fx

from edgecl.graph.step import Port, StepGraph, shape_of, unsupported, value_of
from edgecl.learner import dtype_name
from edgecl_device.engines.onnx import STATE_IN, STATE_OUT
from edgecl_device.manifest import DTYPES
from edgecl_export.onnx_ops import TRANSLATIONS

aten = torch.ops.aten

IR_VERSION = 10
OPSET = 18
"""Read by ONNX Runtime 1.18 and later."""

INLINE_BYTES = 128
"""Constants up to this size stay in the model."""

ALIGNMENT = 64
"""Start of a tensor in the weight file, in bytes: a cache line."""

_TYPES = {getattr(torch, name): ir.DataType.from_numpy(np.dtype(name)) for name in DTYPES}


class WeightFile:
    """Frozen tensors of all steps of a bundle in one file; equal tensors are stored once.

    Args:
        path: File to write when :meth:`close` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._blobs: list[tuple[int, bytes]] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def place(self, array: np.ndarray[Any, Any]) -> tuple[int, int]:
        """Offset and length of an array in the file."""
        blob = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(blob).hexdigest()
        if key not in self._places:
            offset = -(-self._end // ALIGNMENT) * ALIGNMENT
            self._blobs.append((offset, blob))
            self._places[key] = (offset, len(blob))
            self._end = offset + len(blob)
        return self._places[key]

    def close(self) -> None:
        """Write the file, also when it is empty."""
        with self.path.open("wb") as file:
            for offset, blob in self._blobs:
                file.seek(offset)
                file.write(blob)


class Emitter:
    """Builds the ONNX graph of one step.

    Args:
        graph: The lowered step.
        weights: Where frozen tensors go.
    """

    def __init__(self, graph: StepGraph, weights: WeightFile) -> None:
        self.graph = graph
        self.weights = weights
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[fx.Node, Any] = {}
        self._types: dict[int, torch.dtype] = {}
        self._count = 0
        self._node: fx.Node | None = None

    def emit(self) -> ir.Model:
        """The whole model.

        Raises:
            UnsupportedOperatorError: for an operator without a translation, with its place in the model.
        """
        inputs = []
        for port, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
            value = _port_value(port, STATE_IN + port.name if port.kind == "state" else port.name)
            self._record(node, value)
            inputs.append(value)
        for node in self.graph.nodes:
            self._node = node
            if node.op == "get_attr":
                self._record(node, self.constant(self.graph.constant(node).cpu().numpy()))
            elif node.op == "call_function":
                self._record(node, self._translate(node))
        taken: set[int] = set()
        outputs = [self._output(port, node, taken) for port, node in zip(self.graph.outputs, self.graph.results, strict=True)]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET},
            name=self.graph.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="edgecl")
        RemoveUnusedNodesPass()(model)  # transposes that went into a Gemm
        return model

    def _translate(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        translation = TRANSLATIONS.get(node.target)
        if translation is None:
            raise unsupported(self.graph.name, node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        return translation(self, node, *args, **kwargs)

    def _record(self, node: fx.Node, value: Any) -> None:
        """Remember a node's value and the types of its tensors."""
        self.values[node] = value
        examples = value_of(node)
        for item, like in zip(value, examples, strict=False) if isinstance(value, (tuple, list)) else [(value, examples)]:
            if isinstance(like, Tensor):
                self._types[id(item)] = like.dtype

    def _output(self, port: Port, node: fx.Node, taken: set[int]) -> ir.Value:
        """The graph's output for a port: the node's own value under the port's name, or a copy of it.

        New state may keep the shape in which it is computed, as a reshape into an output copies all of it; the engine binds the same bytes.
        """
        while port.kind == "state" and node.target is aten.reshape.default:
            source: Any = node.args[0]
            if source.op != "call_function" or id(self.values[source]) in taken or source in self.graph.results:
                break
            node = source
        value = self.values[node]
        if value.producer() is None or id(value) in taken:
            self._node = node
            value = self.op("Identity", value)
        taken.add(id(value))
        like = _port_value(port, STATE_OUT + port.name if port.kind == "state" else port.name)
        value.name, value.shape, value.type = like.name, ir.Shape(shape_of(node)), like.type
        return value  # type: ignore[no-any-return]

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add an operator with one output."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Any) -> list[ir.Value]:
        """Add an operator with ``count`` outputs."""
        self._count += 1
        assert self._node is not None
        stem = f"{self._node.name}_{self._count}"
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        outputs = [ir.Value(name=f"{stem}_{i}" if count > 1 else stem) for i in range(count)]
        self.nodes.append(ir.node(op_type, list(inputs), attributes, outputs=outputs, name=stem))
        return outputs

    def constant(self, array: np.ndarray[Any, Any], inside: bool = False, of: str = "") -> ir.Value:
        """A frozen tensor: in the model when it is small or must be known when a runtime loads the graph, else in the weight file.

        Equal ones are one, unless they are ``of`` different operators.
        """
        array = np.ascontiguousarray(array).reshape(array.shape)
        sizes, digest = "x".join(map(str, array.shape)), hashlib.sha256(array.tobytes()).hexdigest()[:16]
        key = f"{'i' if inside else 'c'}_{array.dtype}_{sizes}_{digest}{of}"
        if key not in self.initializers:
            inline = ir.tensor(array, name=key)
            tensor: ir.TensorProtocol = inline
            if array.nbytes > INLINE_BYTES and not inside:
                offset, length = self.weights.place(array)
                tensor = ir.ExternalTensor(
                    self.weights.path.name,
                    offset,
                    length,
                    inline.dtype,
                    shape=ir.Shape(array.shape),
                    name=key,
                    base_dir=self.weights.path.parent,
                )
            value = ir.Value(name=key, shape=ir.Shape(array.shape), type=ir.TensorType(inline.dtype), const_value=tensor)
            self.initializers[key] = value
            self._types[id(value)] = getattr(torch, array.dtype.name)
        return self.initializers[key]

    def ints(self, values: Any) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.asarray(list(values), np.int64), inside=True)

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """``value`` as ``dtype``; no operator when it is that already."""
        if self._types.get(id(value)) == dtype:
            return value
        return self.op("Cast", value, to=int(_TYPES[dtype]))

    def boolean(self, value: ir.Value) -> ir.Value:
        """``value`` as bool."""
        return self.cast(value, torch.bool)

    def operand(self, value: Any, dtype: torch.dtype) -> ir.Value:
        """A value or a Python number as ``dtype``."""
        if isinstance(value, ir.Value):
            return self.cast(value, dtype)
        return self.constant(np.asarray(value, dtype_name(dtype)))

    def compute_dtype(self, node: fx.Node) -> torch.dtype:
        """The type in which PyTorch computes an elementwise operator: its operands' common type."""
        result: torch.dtype = value_of(node).dtype
        if result != torch.bool:
            return result
        operands: list[Any] = [value_of(a) if isinstance(a, fx.Node) else a for a in node.args]
        tensors = [a for a in operands if isinstance(a, Tensor)]
        if len(operands) == 1:
            return tensors[0].dtype
        left, right = (torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, Tensor) else a for a in operands[:2])
        return torch.result_type(left, right)

    def untransposed(self, node: Any, value: ir.Value) -> tuple[ir.Value, bool]:
        """The matrix behind a transpose and True, or the value itself and False: Gemm transposes for nothing."""
        if isinstance(node, fx.Node) and node.target is aten.t.default:
            return self.values[node.args[0]], True  # type: ignore[index]
        return value, False


def _port_value(port: Port, name: str) -> ir.Value:
    dtype = _TYPES[getattr(torch, port.spec.dtype)]
    return ir.Value(name=name, shape=ir.Shape(port.spec.shape), type=ir.TensorType(dtype))
