"""How each ATen operator of a lowered step is written in ONNX, one small function each.

Numeric types are made equal before an operator, as ATen's promotion would; shapes are static throughout, so that every
size is a constant. An operator that is not in :data:`TRANSLATIONS` cannot be exported.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from edgecl.graph.quantised import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE, is_packed
from edgecl.graph.step import shape_of, unsupported, value_of

if TYPE_CHECKING:
    from edgecl_export.onnx import Emitter

aten = torch.ops.aten
Translation = Callable[..., ir.Value | Sequence[ir.Value]]
TRANSLATIONS: dict[Any, Translation] = {}
"""Translation by operator: ``function(emitter, node, *args, **kwargs)`` with ONNX values in place of nodes."""


def translates(*operators: Any) -> Callable[[Translation], Translation]:
    """Register a function for operators."""

    def register(function: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(operators, function))
        return function

    return register


_OF_BOOLEANS = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}
_ORDER = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"}


def _elementwise(op: str) -> Translation:
    """An operator of any number of operands that broadcast; operands take the type that PyTorch computes in."""

    def translate(e: "Emitter", node: fx.Node, *operands: Any) -> ir.Value:
        dtype = e.compute_dtype(node)
        if dtype == torch.bool and op in _ORDER.values():
            dtype = torch.uint8  # runtimes order numbers only
        return e.op(_OF_BOOLEANS.get(op, op) if dtype == torch.bool else op, *(e.operand(value, dtype) for value in operands))

    return translate


def _sum(op: str) -> Translation:
    """``left + alpha * right``, or minus."""
    plain = _elementwise(op)

    def translate(e: "Emitter", node: fx.Node, left: Any, right: Any, alpha: float = 1) -> Any:
        if alpha != 1:
            dtype = e.compute_dtype(node)
            right = e.op("Mul", e.operand(right, dtype), e.operand(alpha, dtype))
            return e.op(op, e.operand(left, dtype), right)
        return plain(e, node, left, right)

    return translate


def _logical(op: str) -> Translation:
    """An operator on truth values; numbers are true unless zero."""

    def translate(e: "Emitter", node: fx.Node, *operands: ir.Value) -> ir.Value:
        return e.op(op, *(e.boolean(value) for value in operands))

    return translate


def _bitwise(op: str) -> Translation:
    """An operator on the bits of integers, or on truth values."""

    def translate(e: "Emitter", node: fx.Node, *operands: ir.Value) -> ir.Value:
        dtype = value_of(node).dtype
        return e.op(op if dtype == torch.bool else f"Bitwise{op}", *(e.cast(value, dtype) for value in operands))

    return translate


for name, op in {"add": "Add", "sub": "Sub"}.items():
    TRANSLATIONS[getattr(aten, name).Tensor] = TRANSLATIONS[getattr(aten, name).Scalar] = _sum(op)
for name, op in {"mul": "Mul", "div": "Div", "eq": "Equal", **_ORDER}.items():
    TRANSLATIONS[getattr(aten, name).Tensor] = TRANSLATIONS[getattr(aten, name).Scalar] = _elementwise(op)
for name, op in {
    "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "abs": "Abs", "relu": "Relu",
    "sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "round": "Round", "floor": "Floor", "sign": "Sign", "sgn": "Sign",
    "maximum": "Max", "minimum": "Min",
}.items():  # fmt: skip
    TRANSLATIONS[getattr(aten, name).default] = _elementwise(op)
for overload in (aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.pow.Tensor_Tensor):
    TRANSLATIONS[overload] = _elementwise("Pow")
for name, op in {"logical_not": "Not", "logical_and": "And", "logical_or": "Or"}.items():
    TRANSLATIONS[getattr(aten, name).default] = _logical(op)
TRANSLATIONS[aten.bitwise_and.Tensor] = _bitwise("And")
TRANSLATIONS[aten.bitwise_or.Tensor] = _bitwise("Or")
TRANSLATIONS[aten.bitwise_not.default] = _bitwise("Not")


@translates(aten.ne.Tensor, aten.ne.Scalar)
def _not_equal(e: "Emitter", node: fx.Node, left: Any, right: Any) -> ir.Value:
    dtype = e.compute_dtype(node)
    return e.op("Not", e.op("Equal", e.operand(left, dtype), e.operand(right, dtype)))


@translates(aten.rsub.Scalar)
def _reverse_subtract(e: "Emitter", node: fx.Node, x: ir.Value, left: float, alpha: float = 1) -> ir.Value:
    dtype = e.compute_dtype(node)
    x = e.operand(x, dtype)
    return e.op("Sub", e.operand(left, dtype), x if alpha == 1 else e.op("Mul", x, e.operand(alpha, dtype)))


@translates(aten.rsqrt.default)
def _inverse_root(e: "Emitter", node: fx.Node, x: ir.Value) -> ir.Value:
    return e.op("Reciprocal", e.op("Sqrt", e.cast(x, value_of(node).dtype)))


@translates(aten.clamp.default, aten.hardtanh.default)
def _clip(e: "Emitter", node: fx.Node, x: ir.Value, low: float | None = None, high: float | None = None) -> ir.Value:
    dtype = value_of(node).dtype
    if node.target is aten.hardtanh.default:
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    return e.op("Clip", e.cast(x, dtype), *(None if v is None else e.operand(v, dtype) for v in (low, high)))


@translates(aten.clamp_min.default)
def _clip_low(e: "Emitter", node: fx.Node, x: ir.Value, low: float) -> ir.Value:
    return e.op("Max", *(e.operand(value, value_of(node).dtype) for value in (x, low)))


@translates(aten.clamp_max.default)
def _clip_high(e: "Emitter", node: fx.Node, x: ir.Value, high: float) -> ir.Value:
    return e.op("Min", *(e.operand(value, value_of(node).dtype) for value in (x, high)))


@translates(aten.where.self)
def _where(e: "Emitter", node: fx.Node, condition: ir.Value, yes: Any, no: Any) -> ir.Value:
    dtype = value_of(node).dtype
    if dtype == torch.bool:  # a choice between truth values has no kernel
        chosen = e.op("Where", e.boolean(condition), e.operand(yes, torch.uint8), e.operand(no, torch.uint8))
        return e.op("Cast", chosen, to=int(ir.DataType.BOOL))
    return e.op("Where", e.boolean(condition), e.operand(yes, dtype), e.operand(no, dtype))


@translates(aten._to_copy.default)
def _cast(e: "Emitter", node: fx.Node, x: ir.Value, **options: Any) -> ir.Value:
    return e.cast(x, value_of(node).dtype)


@translates(aten.addcmul.default)
def _scale_and_shift(e: "Emitter", node: fx.Node, shift: ir.Value, x: ir.Value, scale: ir.Value) -> ir.Value:
    """Of a map's channels (:class:`edgecl.graph.passes.ScaleMaps`): batch normalisation of statistics zero and one."""
    channels = shape_of(node)[1]
    zero, one = (e.constant(np.full(channels, value, np.float32)) for value in (0, 1))
    return e.op("BatchNormalization", x, *(e.op("Reshape", v, e.ints([channels])) for v in (scale, shift)), zero, one, epsilon=0.0)


# --- int8 ------------------------------------------------------------------------------------------------------------


@translates(QUANTIZE)
def _quantize(e: "Emitter", node: fx.Node, x: ir.Value, scale: float, zero: int, low: int, high: int, dtype: torch.dtype) -> ir.Value:
    return e.op("QuantizeLinear", x, *_scale(e, node, scale, zero, low, high, np.uint8))


@translates(DEQUANTIZE)
def _dequantize(
    e: "Emitter", node: fx.Node, x: ir.Value, scale: float, zero: int, low: int, high: int, dtype: torch.dtype, **options: Any
) -> ir.Value:
    return e.op("DequantizeLinear", x, *_scale(e, node, scale, zero, low, high, np.int8 if is_packed(node) else np.uint8))


def _scale(e: "Emitter", node: fx.Node, scale: float, zero: int, low: int, high: int, dtype: Any) -> list[ir.Value]:
    """Scale and zero point; of a map in uint8, 128 above int8's: the same values, and ONNX Runtime has the faster kernels for them."""
    if (low, high) != (-128, 127):
        raise unsupported(e.graph.name, node, f"must use all of int8, -128 to 127, got {low} to {high}")
    return [
        e.constant(np.asarray(scale, np.float32), inside=True),
        e.constant(np.asarray(zero + (128 if dtype is np.uint8 else 0), dtype), inside=True),
    ]


@translates(DEQUANTIZE_CHANNELS)
def _dequantize_channels(
    e: "Emitter", node: fx.Node, x: ir.Value, scales: ir.Value, zeros: ir.Value | None, axis: int, *rest: Any, **options: Any
) -> ir.Value:
    if zeros is not None:
        raise unsupported(e.graph.name, node, "must have zero points of zero in every channel")
    integers, channels = node.all_input_nodes
    if value_of(integers).dtype == torch.int32:
        return e.op("DequantizeLinear", x, scales, axis=axis)
    # Some rewrites expect it; one replaces it, and fails where two weights share it.
    none = e.constant(np.zeros(shape_of(channels), np.int8), of=f"_{node.name}")
    return e.op("DequantizeLinear", x, scales, none, axis=axis)


# --- matrix products -------------------------------------------------------------------------------------------------


@translates(aten.mm.default)
def _mm(e: "Emitter", node: fx.Node, left: ir.Value, right: ir.Value) -> ir.Value:
    (left, flip_left), (right, flip_right) = e.untransposed(node.args[0], left), e.untransposed(node.args[1], right)
    if not flip_left and not flip_right:
        return e.op("MatMul", left, right)
    return e.op("Gemm", left, right, transA=int(flip_left), transB=int(flip_right))


@translates(aten.addmm.default)
def _addmm(e: "Emitter", node: fx.Node, added: ir.Value, left: ir.Value, right: ir.Value, beta: float = 1, alpha: float = 1) -> ir.Value:
    (left, flip_left), (right, flip_right) = e.untransposed(node.args[1], left), e.untransposed(node.args[2], right)
    return e.op("Gemm", left, right, added, alpha=float(alpha), beta=float(beta), transA=int(flip_left), transB=int(flip_right))


@translates(aten.bmm.default)
def _bmm(e: "Emitter", node: fx.Node, left: ir.Value, right: ir.Value) -> ir.Value:
    return e.op("MatMul", left, right)


@translates(aten.baddbmm.default)
def _baddbmm(e: "Emitter", node: fx.Node, added: ir.Value, left: ir.Value, right: ir.Value, beta: float = 1, alpha: float = 1) -> ir.Value:
    dtype, product = value_of(node).dtype, e.op("MatMul", left, right)
    if alpha != 1:
        product = e.op("Mul", product, e.operand(alpha, dtype))
    if beta == 0:
        return product
    return e.op("Add", product, added if beta == 1 else e.op("Mul", added, e.operand(beta, dtype)))


@translates(aten.convolution.default)
def _convolution(
    e: "Emitter",
    node: fx.Node,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> ir.Value:
    rank = len(shape_of(node)) - 2
    stride, padding, dilation = (list(v) * rank if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    options: dict[str, Any] = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
    if transposed:
        options["output_padding"] = list(output_padding) * rank if len(output_padding) == 1 else list(output_padding)
    return e.op("ConvTranspose" if transposed else "Conv", x, weight, bias, **options)


# --- shapes ----------------------------------------------------------------------------------------------------------


@translates(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _reshape(e: "Emitter", node: fx.Node, x: ir.Value, *sizes: Any) -> ir.Value:
    return e.op("Reshape", x, e.ints(shape_of(node)))


@translates(aten.expand.default)
def _expand(e: "Emitter", node: fx.Node, x: ir.Value, *sizes: Any, **options: Any) -> ir.Value:
    return e.op("Expand", x, e.ints(shape_of(node)))


@translates(aten.t.default)
def _t(e: "Emitter", node: fx.Node, x: ir.Value) -> ir.Value:
    return e.op("Transpose", x, perm=[1, 0]) if len(shape_of(node)) == 2 else x


@translates(aten.transpose.int)
def _transpose(e: "Emitter", node: fx.Node, x: ir.Value, first: int, second: int) -> ir.Value:
    axes = list(range(len(shape_of(node))))
    axes[first], axes[second] = axes[second], axes[first]
    return e.op("Transpose", x, perm=axes)


@translates(aten.permute.default)
def _permute(e: "Emitter", node: fx.Node, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    return e.op("Transpose", x, perm=[a % len(axes) for a in axes])


@translates(aten.slice.Tensor)
def _slice(
    e: "Emitter", node: fx.Node, x: ir.Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> ir.Value:
    stop = np.iinfo(np.int64).max if end is None else end
    return e.op("Slice", x, e.ints([start or 0]), e.ints([stop]), e.ints([dim]), e.ints([step]))


@translates(aten.select.int)
def _select(e: "Emitter", node: fx.Node, x: ir.Value, dim: int, index: int) -> ir.Value:
    return e.op("Gather", x, e.constant(np.asarray(index, np.int64)), axis=dim)


@translates(aten.diagonal.default)
def _diagonal(e: "Emitter", node: fx.Node, x: ir.Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> ir.Value:
    sizes = shape_of(node.args[0])  # type: ignore[arg-type]
    if len(sizes) != 2:
        raise unsupported(e.graph.name, node, f"takes a matrix, got {list(sizes)}")
    (rows, columns), size = sizes, shape_of(node)[0]
    if dim1 % 2 > dim2 % 2:
        offset = -offset
    start = offset if offset >= 0 else -offset * columns
    flat = e.op("Reshape", x, e.ints([rows * columns]))
    return e.op("Gather", flat, e.constant(start + (columns + 1) * np.arange(size)), axis=0)


@translates(aten.cat.default)
def _cat(e: "Emitter", node: fx.Node, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    return e.op("Concat", *(e.cast(p, value_of(node).dtype) for p in parts), axis=dim % len(shape_of(node)))


@translates(aten.split_with_sizes.default)
def _split(e: "Emitter", node: fx.Node, x: ir.Value, sizes: Sequence[int], dim: int = 0) -> Sequence[ir.Value]:
    return e.ops("Split", len(sizes), x, e.ints(sizes), axis=dim)


@translates(aten.index_select.default)
def _index_select(e: "Emitter", node: fx.Node, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    return e.op("Gather", x, index, axis=dim)


@translates(aten.gather.default)
def _gather(e: "Emitter", node: fx.Node, x: ir.Value, dim: int, index: ir.Value, sparse_grad: bool = False) -> ir.Value:
    return e.op("GatherElements", x, index, axis=dim)


@translates(aten.scatter_add.default)
def _scatter_add(e: "Emitter", node: fx.Node, x: ir.Value, dim: int, index: ir.Value, source: ir.Value) -> ir.Value:
    size = shape_of(node.args[2])  # type: ignore[arg-type]
    if size != shape_of(node.args[3]):  # type: ignore[arg-type]  # ATen reads as much of the source as the index is long
        source = e.op("Slice", source, e.ints([0] * len(size)), e.ints(size), e.ints(range(len(size))))
    return e.op("ScatterElements", x, index, source, axis=dim, reduction="add")


@translates(aten.constant_pad_nd.default)
def _pad(e: "Emitter", node: fx.Node, x: ir.Value, pads: Sequence[int], value: float = 0.0) -> ir.Value:
    rank = len(shape_of(node))
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return e.op("Pad", x, e.ints(before + after), e.operand(value, value_of(node).dtype))


@translates(aten.flip.default)
def _flip(e: "Emitter", node: fx.Node, x: ir.Value, dims: Sequence[int]) -> ir.Value:
    count, lowest = len(dims), np.iinfo(np.int64).min
    return e.op("Slice", x, e.ints([-1] * count), e.ints([lowest] * count), e.ints(dims), e.ints([-1] * count))


# --- reductions ------------------------------------------------------------------------------------------------------


def _reduction(op: str) -> Translation:
    def translate(e: "Emitter", node: fx.Node, x: ir.Value, dims: Any = None, keepdim: bool = False, **options: Any) -> ir.Value:
        axes = [dims] if isinstance(dims, int) else list(dims or [])
        arguments = [e.cast(x, value_of(node).dtype), *([e.ints(axes)] if axes else [])]
        return e.op(op, *arguments, keepdims=int(keepdim))

    return translate


TRANSLATIONS[aten.sum.default] = TRANSLATIONS[aten.sum.dim_IntList] = _reduction("ReduceSum")
TRANSLATIONS[aten.mean.default] = TRANSLATIONS[aten.mean.dim] = _reduction("ReduceMean")
TRANSLATIONS[aten.amax.default] = _reduction("ReduceMax")


@translates(aten.argmax.default)
def _argmax(e: "Emitter", node: fx.Node, x: ir.Value, dim: int | None = None, keepdim: bool = False) -> ir.Value:
    if dim is None:
        flat = e.op("ArgMax", e.op("Reshape", x, e.ints([-1])), axis=0, keepdims=0)
        return e.op("Reshape", flat, e.ints(shape_of(node)))
    return e.op("ArgMax", x, axis=dim, keepdims=int(keepdim))


@translates(aten._softmax.default)
def _softmax(e: "Emitter", node: fx.Node, x: ir.Value, dim: int, half_to_float: bool) -> ir.Value:
    return e.op("Softmax", x, axis=dim)


@translates(aten._log_softmax.default)
def _log_softmax(e: "Emitter", node: fx.Node, x: ir.Value, dim: int, half_to_float: bool) -> ir.Value:
    return e.op("LogSoftmax", x, axis=dim)


@translates(aten.cumsum.default)
def _cumulative_sum(e: "Emitter", node: fx.Node, x: ir.Value, dim: int) -> ir.Value:
    return e.op("CumSum", e.cast(x, value_of(node).dtype), e.constant(np.asarray(dim, np.int64)))


@translates(aten.topk.default)
def _topk(e: "Emitter", node: fx.Node, x: ir.Value, count: int, dim: int = -1) -> Sequence[ir.Value]:
    return e.ops("TopK", 2, x, e.ints([count]), axis=dim)


# --- pooling ---------------------------------------------------------------------------------------------------------


@translates(aten.max_pool2d_with_indices.default)
def _max_pool(
    e: "Emitter",
    node: fx.Node,
    x: ir.Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Sequence[ir.Value]:
    kernel, stride, padding, dilation = (list(v) * 2 if len(v) == 1 else list(v) for v in (kernel, stride or kernel, padding, dilation))
    batch, channels, height, width = shape_of(node.args[0])  # type: ignore[arg-type]
    wants_indices = any(user.args[1] == 1 for user in node.users)
    found = e.ops(
        "MaxPool", 2 if wants_indices else 1, x,
        kernel_shape=kernel, strides=stride, pads=padding * 2, dilations=dilation, ceil_mode=int(ceil_mode),
    )  # fmt: skip
    if not wants_indices:
        return [found[0], found[0]]
    # ONNX counts positions in the whole tensor, ATen within a plane
    planes = np.arange(batch * channels, dtype=np.int64).reshape(batch, channels, 1, 1) * (height * width)
    return [found[0], e.op("Sub", found[1], e.constant(planes))]


@translates(aten.avg_pool2d.default)
def _avg_pool(
    e: "Emitter", node: fx.Node, x: ir.Value, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0), *rest: Any
) -> ir.Value:
    kernel, stride, padding = (list(v) * 2 if len(v) == 1 else list(v) for v in (kernel, stride or kernel, padding))
    if prod(kernel) == 1 and prod(stride) == 1:
        return x
    return e.op("AveragePool", x, kernel_shape=kernel, strides=stride, pads=padding * 2, count_include_pad=1)
