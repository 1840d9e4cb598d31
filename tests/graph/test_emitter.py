"""Every translation on ONNX Runtime against PyTorch, with PyTorch's own promotion of types, and the form of the model file."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from edgecl.graph.capture import capture
from edgecl.graph.lowering import build_step, canonicalise, lower
from edgecl.graph.quantised import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from edgecl.graph.step import UnsupportedOperatorError
from edgecl.methods import METHODS
from edgecl_device.engines.onnx import STATE_IN, STATE_OUT
from edgecl_export.onnx import IR_VERSION, OPSET, Emitter, WeightFile
from edgecl_export.onnx_ops import TRANSLATIONS

aten = torch.ops.aten
LEARNING = [name for name, kind in METHODS.items() if hasattr(kind, "learn")]

F = torch.tensor([[-2.5, -0.0, 0.5, 1.5], [2.5, 3.0, -1.0, 0.25], [7.0, -3.5, 2.0, 0.0]])
G = torch.tensor([[1.5, -0.0, 0.25, -1.5], [2.5, -3.0, 1.0, 0.75], [-7.0, 3.5, 2.0, 1.0]])
POSITIVE = F.abs() + 0.5
D = F.double() / 3
INT = torch.tensor([[-3, 0, 2, 1], [4, -1, 2, 5], [0, 7, -2, 2]])
BYTE = torch.tensor([[250, 0, 2, 1], [4, 255, 2, 5], [0, 7, 128, 2]], dtype=torch.uint8)
BOOL = F > 0.3
OTHER = G > 0.3
SCALAR = torch.tensor(0.75)
CUBE = torch.arange(24.0).reshape(2, 3, 4) - 11.5
IMAGE = torch.arange(2.0 * 4 * 5 * 6).sin().reshape(2, 4, 5, 6)
KERNEL = torch.arange(4.0 * 2 * 9).cos().reshape(4, 2, 3, 3)
SHORT = torch.arange(4.0 * 2 * 3).cos().reshape(4, 2, 3)
BIAS = torch.tensor([0.1, -0.2, 0.3, -0.4])
INDEX = torch.tensor([[0, 2, 1, 0], [1, 1, 0, 2]])

Case = tuple[Any, ...]

PAIRS = [(F, G), (F, D), (F, INT), (INT, F), (INT, INT + 3), (D, INT), (F, SCALAR), (SCALAR, F), (BYTE, BYTE.flip(0)), (BYTE, F), (BOOL, F)]
"""Operands of every mixture of types; a scalar tensor has less weight in PyTorch's promotion than one with dimensions."""

SCALARS = [(F, 2.5), (F, 3), (INT, 2), (INT, 2.5), (D, 0.1), (BYTE, 3), (BYTE, 0.5), (SCALAR, 2)]


def binary(operator: Any, pairs: list[Any] = PAIRS) -> list[Case]:
    return [(operator, *pair) for pair in pairs]


def scalar(operator: Any, pairs: list[Any] = SCALARS) -> list[Case]:
    return [(lambda x, o=operator, n=number: o(x, n), tensor) for tensor, number in pairs]


def unary(operator: Any, *tensors: Tensor) -> list[Case]:
    return [(operator, t) for t in tensors]


COMPARED = [*PAIRS, (F, F.clone()), (INT, INT.clone()), (BOOL, OTHER)]

CASES: dict[Any, list[Case]] = {
    aten.add.Tensor: [*binary(aten.add.Tensor), (aten.add.Tensor, BOOL, OTHER), (lambda x, y: aten.add.Tensor(x, y, alpha=3), F, INT)],
    aten.add.Scalar: [*scalar(aten.add.Scalar), (lambda x: aten.add.Scalar(x, 2, 3), F)],
    aten.sub.Tensor: [*binary(aten.sub.Tensor, PAIRS[:-1]), (lambda x, y: aten.sub.Tensor(x, y, alpha=0.5), F, D)],
    aten.sub.Scalar: scalar(aten.sub.Scalar),
    aten.rsub.Scalar: [*scalar(aten.rsub.Scalar), (lambda x: aten.rsub.Scalar(x, 2, 3), F), (lambda x: 1.0 - x, INT)],
    aten.mul.Tensor: [*binary(aten.mul.Tensor), (aten.mul.Tensor, BOOL, OTHER)],
    aten.mul.Scalar: scalar(aten.mul.Scalar),
    aten.div.Tensor: binary(aten.div.Tensor, [(F, POSITIVE), (INT, POSITIVE), (INT, INT.abs() + 1), (BYTE, BYTE // 2 + 1), (D, POSITIVE)]),
    aten.div.Scalar: scalar(aten.div.Scalar),
    aten.neg.default: unary(aten.neg.default, F, D, INT),
    aten.exp.default: unary(aten.exp.default, F, D, INT, BOOL),
    aten.log.default: unary(aten.log.default, POSITIVE, POSITIVE.double(), INT.abs() + 1),
    aten.sqrt.default: unary(aten.sqrt.default, POSITIVE, POSITIVE.double(), BYTE),
    aten.rsqrt.default: unary(aten.rsqrt.default, POSITIVE, POSITIVE.double(), INT.abs() + 1),
    aten.reciprocal.default: unary(aten.reciprocal.default, POSITIVE, INT.abs() + 1),
    aten.abs.default: unary(aten.abs.default, F, INT, D),
    aten.relu.default: unary(aten.relu.default, F, D),
    aten.sigmoid.default: unary(aten.sigmoid.default, F, D, INT),
    aten.tanh.default: unary(aten.tanh.default, F, D, BYTE),
    aten.erf.default: unary(aten.erf.default, F, BYTE),
    aten.round.default: unary(aten.round.default, F, D),
    aten.floor.default: unary(aten.floor.default, F, D),
    aten.sign.default: unary(aten.sign.default, F, INT),
    aten.sgn.default: unary(aten.sgn.default, F, D),
    aten.maximum.default: [*binary(aten.maximum.default), (aten.maximum.default, BOOL, OTHER)],
    aten.minimum.default: [*binary(aten.minimum.default), (aten.minimum.default, BOOL, OTHER)],
    aten.logical_not.default: unary(aten.logical_not.default, BOOL, F, INT),
    aten.logical_and.default: binary(aten.logical_and.default, [(BOOL, OTHER), (F, INT)]),
    aten.logical_or.default: binary(aten.logical_or.default, [(BOOL, OTHER), (F, BOOL)]),
    aten.bitwise_and.Tensor: binary(aten.bitwise_and.Tensor, [(BOOL, OTHER), (INT, INT.flip(0)), (BYTE, INT)]),
    aten.bitwise_or.Tensor: binary(aten.bitwise_or.Tensor, [(BOOL, OTHER), (INT, INT.flip(0))]),
    aten.bitwise_not.default: unary(aten.bitwise_not.default, BOOL, INT, BYTE),
    **{getattr(aten, name).Tensor: binary(getattr(aten, name).Tensor, COMPARED) for name in ("eq", "ne", "gt", "ge", "lt", "le")},
    **{getattr(aten, name).Scalar: scalar(getattr(aten, name).Scalar) for name in ("eq", "ne", "gt", "ge", "lt", "le")},
    aten.pow.Tensor_Scalar: scalar(aten.pow.Tensor_Scalar, [(POSITIVE, 1.5), (F, 2), (INT, 2), (INT, 2.0), (D, 3)]),
    aten.pow.Scalar: [(lambda x: aten.pow.Scalar(0.9, x), F), (lambda x: aten.pow.Scalar(2, x), INT.abs()), (lambda x: 0.9**x, SCALAR)],
    aten.pow.Tensor_Tensor: binary(aten.pow.Tensor_Tensor, [(POSITIVE, F), (POSITIVE, INT), (INT, INT.abs())]),
    aten.clamp.default: [
        (lambda x: aten.clamp.default(x, -1, 2), F),
        (lambda x: aten.clamp.default(x, None, 2), F),
        (lambda x: aten.clamp.default(x, -1), D),
        (lambda x: aten.clamp.default(x, 0, 3), INT),
        (lambda x: aten.clamp.default(x, 0.5, 3), INT),
    ],
    aten.clamp_min.default: scalar(aten.clamp_min.default),
    aten.clamp_max.default: scalar(aten.clamp_max.default),
    aten.hardtanh.default: [(aten.hardtanh.default, F), (lambda x: aten.hardtanh.default(x, 0.0, 6.0), D)],
    aten.where.self: [
        (aten.where.self, BOOL, F, G),
        (aten.where.self, BOOL, F, D),
        (aten.where.self, BOOL, INT, F),
        (aten.where.self, BOOL, OTHER, BOOL),
        (lambda c, x: torch.where(c, x, -1e30), BOOL, F),
        (lambda c, x: torch.where(c, 2.5, x), BOOL, INT),
        (lambda c, x: torch.where(c, 1, x), BOOL, BYTE),
        (lambda c: torch.where(c, 1, 2), BOOL),
    ],
    aten._to_copy.default: [
        (lambda x, t=t: aten._to_copy.default(x, dtype=t), x)
        for x, t in [
            (F, torch.float64),
            (F, torch.int64),
            (POSITIVE, torch.uint8),
            (F, torch.bool),
            (INT, torch.float32),
            (BOOL, torch.float32),
            (BYTE, torch.float32),
            (BOOL, torch.int64),
            (D, torch.float32),
            (INT, torch.int32),
        ]
    ],
    aten.mm.default: [
        (aten.mm.default, F, G.t().contiguous()),
        (lambda a, b: aten.mm.default(aten.t.default(a), b), F, G),
        (lambda a, b: aten.mm.default(a, aten.t.default(b)), F, G),
        (lambda a, b: aten.mm.default(aten.t.default(a), aten.t.default(b)), F, torch.ones(2, 3)),
        (lambda a, b: aten.mm.default(a, aten.t.default(b)), D, D),
        (lambda a: (lambda t: [aten.mm.default(a, t), t, t * 2.0])(aten.t.default(a)), F),  # the transpose is used elsewhere too
        (lambda a: aten.mm.default(aten.t.default(aten.t.default(a)), aten.t.default(a)), F),
    ],
    aten.addcmul.default: [
        (aten.addcmul.default, torch.linspace(-1, 1, 3).reshape(3, 1, 1), IMAGE[:, :3], torch.linspace(-2, 2, 3).reshape(3, 1, 1)),
        (aten.addcmul.default, torch.linspace(-1, 1, 2).reshape(2, 1), torch.randn(4, 2, 5), torch.ones(2, 1)),
    ],
    aten.baddbmm.default: [
        (aten.baddbmm.default, torch.ones(2, 3, 3), *(torch.stack([m, m + 1.0]) for m in (F, G.t().contiguous()))),
        (lambda c, a, b: aten.baddbmm.default(c, a, b, beta=0.5, alpha=-2), torch.ones(3), *(torch.stack([m] * 2) for m in (F, G.t()))),
        (lambda c, a, b: aten.baddbmm.default(c, a, b, beta=0), torch.ones(3), *(torch.stack([m] * 2) for m in (F, G.t()))),
    ],
    aten.addmm.default: [
        (aten.addmm.default, torch.ones(3, 3), F, G.t().contiguous()),
        (lambda c, a, b: aten.addmm.default(c, a, aten.t.default(b)), torch.tensor([1.0, 2.0, 3.0]), F, G),
        (lambda c, a, b: aten.addmm.default(c, aten.t.default(a), b, beta=0.5, alpha=-2), torch.ones(4, 4), F, G),
        (lambda c, a, b: aten.addmm.default(c, aten.t.default(a), b), torch.ones(4, 4).double(), D, D),
    ],
    aten.bmm.default: [(aten.bmm.default, CUBE, CUBE.transpose(1, 2).contiguous())],
    aten.convolution.default: [
        (lambda x, w, b: aten.convolution.default(x, w, b, [2, 1], [1, 2], [1, 2], False, [0, 0], 2), IMAGE, KERNEL, BIAS),
        (lambda x, w: aten.convolution.default(x, w, None, [1], [1], [1], False, [0], 2), IMAGE[:, :, 0].contiguous(), SHORT),
        (lambda x, w: aten.convolution.default(x, w, None, [2, 3], [1, 0], [1, 1], True, [1, 2], 2), IMAGE, KERNEL),
        (lambda x, w: aten.convolution.default(x, w, None, [2], [1], [1], True, [1], 2), IMAGE[:, :, 0].contiguous(), SHORT),
    ],
    aten.reshape.default: [
        (lambda x: aten.view.default(x, [2, -1]), CUBE),
        (lambda x: aten.view.default(x, []), torch.ones(1, 1)),
        (lambda x: aten._unsafe_view.default(x, [4, 6]), CUBE),
        (lambda x: aten.reshape.default(x, [-1]), BOOL),
    ],
    aten.unsqueeze.default: [(lambda x: aten.unsqueeze.default(x, -1), F), (lambda x: aten.unsqueeze.default(x, 0), SCALAR)],
    aten.squeeze.dim: [(lambda x: aten.squeeze.dim(x, 0), F[None]), (lambda x: aten.squeeze.dim(x, 0), F)],
    aten.squeeze.dims: [(lambda x: aten.squeeze.dims(x, [0, -1]), F[None, ..., None])],
    aten.expand.default: [
        (lambda x: aten.expand.default(x, [2, 3, 4]), F),
        (lambda x: aten.expand.default(x, [-1, 5]), INT[:, :1].contiguous()),
    ],
    aten.t.default: [(aten.t.default, F), (aten.t.default, F[0].contiguous())],
    aten.transpose.int: [(lambda x: aten.transpose.int(x, -1, 0), CUBE), (lambda x: aten.transpose.int(x, 1, 2), CUBE)],
    aten.permute.default: [(lambda x: aten.permute.default(x, [2, 0, 1]), CUBE), (lambda x: aten.permute.default(x, [-1, 0, -2]), CUBE)],
    aten.slice.Tensor: [
        (lambda x, a=a: aten.slice.Tensor(x, *a), CUBE)
        for a in [(0, 1, 2), (1, -2, 9223372036854775807), (2, 1, -1), (-1, 0, 4, 2), (-2, -3, -1), (2, None, 3), (2, 1), (0, -100, 100)]
    ],
    aten.select.int: [
        (lambda x: aten.select.int(x, 1, -1), CUBE),
        (lambda x: aten.select.int(x, -1, 2), CUBE),
        (lambda x: aten.select.int(x, 0, 1), F[0]),
    ],
    aten.diagonal.default: [
        (lambda x, a=a: aten.diagonal.default(x, *a), F) for a in [(), (1,), (-1,), (2,), (-2,), (1, 1, 0), (-1, -1, -2), (3,)]
    ],
    aten.cat.default: [
        (lambda *x: aten.cat.default(list(x)), F, G),
        (lambda *x: aten.cat.default(list(x), -1), F, INT, D),
        (lambda *x: aten.cat.default(list(x), 1), BOOL, INT),
        (lambda *x: aten.cat.default(list(x), 0), BYTE, BYTE),
    ],
    aten.split_with_sizes.default: [
        (lambda x: list(aten.split_with_sizes.default(x, [1] * (len(x) - 2) + [2])), F),
        (lambda x: aten.split_with_sizes.default(x, [1, CUBE.shape[-1] - 1], -1)[1], CUBE),
    ],
    aten.index_select.default: [
        (lambda x, i: aten.index_select.default(x, -1, i), CUBE, torch.tensor([3, 0, 0])),
        (lambda x, i: aten.index_select.default(x, 0, i), INT, torch.tensor([2])),
    ],
    aten.gather.default: [(lambda x, i: aten.gather.default(x, 0, i), F, INDEX), (lambda x, i: aten.gather.default(x, -1, i), F, INDEX)],
    aten.scatter_add.default: [
        (lambda x, i, s: aten.scatter_add.default(x, 0, i, s), F, INDEX, G),
        (lambda x, i, s: aten.scatter_add.default(x, -1, i, s), D, INDEX, D),
    ],
    aten.constant_pad_nd.default: [
        (lambda x, a=a: aten.constant_pad_nd.default(x, *a), t)
        for t, a in [
            (CUBE, ([1, 2], 0.5)),
            (CUBE, ([0, -1, 2, -1], -1.0)),
            (CUBE, ([-1, -1], 0.0)),
            (INT, ([1, 1, 0, 1], 7)),
            (BOOL, ([1, 0], True)),
            (CUBE, ([2, -3, -1, 0, 1, -1],)),
        ]
    ],
    aten.flip.default: [
        (lambda x: aten.flip.default(x, [0]), F),
        (lambda x: aten.flip.default(x, [-1, 0]), CUBE),
        (lambda x: aten.flip.default(x, [1]), BOOL),
    ],
    aten.sum.default: [*unary(aten.sum.default, F, INT, BOOL, BYTE, D), (lambda x: aten.sum.default(x, dtype=torch.float64), F)],
    aten.sum.dim_IntList: [
        (lambda x, a=a: aten.sum.dim_IntList(x, *a), t)
        for t, a in [(CUBE, ([1], True)), (CUBE, ([-1, 0],)), (INT, ([0],)), (BOOL, ([1], True)), (CUBE, ([], True)), (CUBE, (None,))]
    ],
    aten.mean.default: unary(aten.mean.default, F, D),
    aten.mean.dim: [(lambda x: aten.mean.dim(x, [-1, -2], True), CUBE), (lambda x: aten.mean.dim(x, [0]), CUBE)],
    aten.amax.default: [
        (aten.amax.default, F),
        (lambda x: aten.amax.default(x, [-1], True), CUBE),
        (lambda x: aten.amax.default(x, [0, 2]), CUBE),
        (lambda x: aten.amax.default(x, [1]), INT),
    ],
    aten.argmax.default: [
        (lambda x: aten.argmax.default(x, 1), F),
        (lambda x: aten.argmax.default(x, -1, True), CUBE.round() // 5),
        (aten.argmax.default, F),
        (lambda x: aten.argmax.default(x, None, True), F),
        (lambda x: aten.argmax.default(x, 0), INT),
    ],
    aten.cumsum.default: [
        (lambda x: aten.cumsum.default(x, 0), F),
        (lambda x: aten.cumsum.default(x, -1), CUBE > 0),
        (lambda x: aten.cumsum.default(x, 0), INT),
    ],
    aten.topk.default: [
        (lambda x: list(aten.topk.default(x, 2)), CUBE),
        (lambda x: list(aten.topk.default(x, 1, 0)), F),
        (lambda x: aten.topk.default(x, 2)[0], INT.reshape(-1)),
    ],
    aten._softmax.default: [(lambda x: aten._softmax.default(x, 0, False), F), (lambda x: aten._softmax.default(x, -1, False), D)],
    aten._log_softmax.default: [
        (lambda x: aten._log_softmax.default(x, 1, False), F),
        (lambda x: aten._log_softmax.default(x, -2, False), CUBE),
    ],
    aten.max_pool2d_with_indices.default: [
        (lambda x: list(aten.max_pool2d_with_indices.default(x, [2, 3], [2, 1], [1, 1], [1, 2], True)), IMAGE),
        (lambda x: aten.max_pool2d_with_indices.default(x, [2, 2])[0], IMAGE),
        (lambda x: aten.max_pool2d_with_indices.default(x, [3], [2], [1])[1], -IMAGE.abs() - 1),
    ],
    aten.avg_pool2d.default: [
        (lambda x: aten.avg_pool2d.default(x, [2, 3], [1, 2], [1, 1]), IMAGE),
        (lambda x: aten.avg_pool2d.default(x, [2]), IMAGE),
        (lambda x: aten.avg_pool2d.default(x, [1, 1]), IMAGE),
    ],
}

STEPS = (0.05, 3, -128, 127, torch.int8)
"""Scale, zero point and limits of int8."""

CASES |= {
    QUANTIZE: [(lambda x: DEQUANTIZE(QUANTIZE(x, *STEPS), *STEPS), F), (lambda x: DEQUANTIZE(QUANTIZE(x, *STEPS), *STEPS) * x, IMAGE)],
    DEQUANTIZE: [(lambda x: x * DEQUANTIZE(INT.to(torch.int8), 0.5, 0, *STEPS[2:]), F)],
    DEQUANTIZE_CHANNELS: [
        (lambda x: x * DEQUANTIZE_CHANNELS(INT.to(torch.int8), POSITIVE[:, 0], None, 0, *STEPS[2:]), F),
        (lambda x: x * DEQUANTIZE_CHANNELS(INT.to(torch.int8), POSITIVE[0], None, 1, *STEPS[2:]), F),
    ],
}


def test_every_translation_has_a_case() -> None:
    assert set(CASES) == set(TRANSLATIONS)


@pytest.mark.parametrize("operator", CASES, ids=str)
def test_translation(operator: Any, bench: Any) -> None:
    """All cases of an operator in one graph, without rules."""
    cases = CASES[operator]
    tensors = [t.contiguous() for case in cases for t in case[1:]]

    def run(*arguments: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        waiting = list(arguments)
        for function, *inputs in cases:
            value = function(*waiting[: len(inputs)])
            found += [value] if isinstance(value, Tensor) else list(value)
            waiting = waiting[len(inputs) :]
        return found

    graph = bench.check(run, *tensors, raw=True)
    assert operator in {node.target for node in graph.operators}


@pytest.mark.parametrize(
    "operator", ["relu", "sigmoid", "exp", "tanh", "abs", "sign", "floor", "maximum", "minimum", "clamp_min", "amax", "sum"]
)
def test_infinities(operator: str, bench: Any) -> None:
    x = torch.tensor([[float("inf"), -float("inf"), 1.0, 3.0]])
    function: Callable[..., Tensor] = {
        "maximum": lambda t: torch.maximum(t, torch.ones(1)), "minimum": lambda t: torch.minimum(t, torch.ones(1)),
        "clamp_min": lambda t: t.clamp_min(0.5), "amax": lambda t: t.amax(1), "sum": lambda t: t.sum(1),
    }.get(operator, getattr(torch, operator))  # fmt: skip
    bench.check(function, x, raw=True)


OUTPUTS: dict[str, Case] = {
    "an input": (lambda x: x, F),
    "an input twice": (lambda x: [x, x], F),
    "a constant": (lambda x: [x + 1.0, torch.arange(40.0)], F),
    "the same constant twice": (lambda x: [x + 1.0, torch.full((3,), 2.0), torch.full((3,), 2.0)], F),
    "one node twice": (lambda x: (lambda y: [y, y])(x * 2.0), F),
    "a node and its view": (lambda x: (lambda y: [y, y.reshape(-1), y.t()])(x * 2.0), F),
    "a node that others read": (lambda x: (lambda y: [y + 1.0, y, y * y])(x * 2.0), F),
    "a scalar": (lambda x: [x.sum(), x.sum() > 0], F),
    "a transposed input": (lambda x: [x.t(), x @ x.t()], F),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "lowered"])
def test_outputs_may_be(name: str, raw: bool, bench: Any) -> None:
    function, *tensors = OUTPUTS[name]
    if raw and "constant" in name:
        bench.check(function, *tensors)  # a constant exists only after folding
    bench.check(function, *tensors, raw=raw and "constant" not in name)


def test_transposes_that_go_into_a_product_are_not_emitted(bench: Any) -> None:
    path = bench.emit(bench.trace(lambda a, b: a.t() @ b, F, G))
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Gemm"]


def test_an_unknown_operator_is_named_with_its_place(bench: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Unfold(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = Model()
    graph = bench.trace(model, IMAGE, modules=[model])
    with pytest.raises(
        UnsupportedOperatorError, match=r"^step 'bench': operator aten\.im2col\.default in inner\.1 is not supported; replace"
    ):
        bench.emit(graph)


def test_a_diagonal_of_more_than_a_matrix_is_refused(bench: Any) -> None:
    with pytest.raises(UnsupportedOperatorError, match="takes a matrix"):
        bench.emit(bench.trace(lambda x: aten.diagonal.default(x), CUBE))


def test_versions_and_names(bench: Any, tools: Any) -> None:
    learner = tools.make_learner("ridge")
    model = onnx.load(bench.emit(build_step(capture(learner, "learn")).graph))
    onnx.checker.check_model(model, full_check=True)
    assert (IR_VERSION, OPSET) == (10, 18)
    assert model.ir_version == 10
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    names = {i.name for i in model.graph.input}
    assert names == {STATE_IN + n for n in ("inverse", "readout", "count", "min_s")} | {"z", "target", "weight"}
    written = {STATE_OUT + n for n in ("inverse", "readout", "count", "min_s")}
    assert {o.name for o in model.graph.output} == written | {"scores", "loss", "guard", "finite", "health.s", "health.min_s"}
    assert (STATE_IN, STATE_OUT) == ("state.", "next.")
    for value in [*model.graph.input, *model.graph.output]:
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)


def test_equal_constants_are_stored_once_and_steps_share_one_file(tmp_path: Path, bench: Any, tools: Any) -> None:
    """Encode, predict and learn on one file: its size is the sum of its distinct tensors, each at a multiple of 64 bytes."""
    table, other = torch.arange(100.0), torch.arange(60.0) * 2
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "one": lambda x: x * table + table.clone(),
        "two": lambda x: x - table,
        "three": lambda x: (x + table.reshape(10, 10).reshape(-1))[:60] * other,
    }
    weights = WeightFile(tmp_path / "weights.bin")
    x = torch.linspace(-1, 1, 100)
    graphs = {name: bench.lowered(function, x) for name, function in functions.items()}
    models = {name: Emitter(graph, weights).emit() for name, graph in graphs.items()}
    weights.close()
    assert (tmp_path / "weights.bin").stat().st_size == 448 + 240
    for name, model in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(ir.to_proto(model).SerializeToString())
        (got,) = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"]).run(
            None, {"a0": x.numpy()}
        )
        np.testing.assert_allclose(got, functions[name](x).numpy(), rtol=1e-6)
        large = [t for t in onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph.initializer if t.external_data]
        places = {e.key: e.value for t in large for e in t.external_data}
        assert large and places["location"] == "weights.bin"
        assert all(int(e.value) % 64 == 0 for t in large for e in t.external_data if e.key == "offset")


def test_constants_that_differ_only_in_shape_or_sign_of_zero_stay_apart(bench: Any) -> None:
    zeros, minus = torch.zeros(4), torch.full((4,), -0.0)
    graph = bench.lowered(lambda x: [x * zeros, x * minus, x.reshape(2, 2) * zeros.reshape(2, 2)], torch.ones(4))
    model = onnx.load(bench.emit(graph))
    found = [numpy_helper.to_array(t) for t in model.graph.initializer]
    floats = sorted((a.shape, bool(np.signbit(a).all())) for a in found if a.dtype == np.float32)
    assert floats == [((2, 2), False), ((4,), False), ((4,), True)]


@pytest.mark.parametrize("method", LEARNING)
def test_onnx_shape_inference_agrees_with_the_ports(method: str, bench: Any, tools: Any) -> None:
    learner = tools.make_learner(method)
    for step in learner.steps:
        graph = lower(canonicalise(capture(learner, step)))
        model = onnx.shape_inference.infer_shapes(onnx.load(bench.emit(graph)), check_type=True, strict_mode=True, data_prop=True)
        for port, value in zip(graph.outputs, model.graph.output, strict=True):
            shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            assert shape == port.spec.shape or (port.kind == "state" and math.prod(shape) == math.prod(port.spec.shape))
