"""Exact cost of a step, counted on its graph: integer multiply-accumulates (MACs) by phase, elementwise operations apart.

A MAC is one multiplication whose product is added to a sum; FLOPs are ``2 * macs``. Taps that fall on padding count,
as is usual. Canonical cost is counted on the canonical graph, executed cost on the lowered one; a gap between them is a
rule that does more work than the mathematics needs. An operator without a formula raises: nothing counts as zero by
default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from edgecl.graph.phases import PHASES
from edgecl.graph.quantised import DEQUANTIZES, QUANTIZE, is_packed
from edgecl.graph.step import StepGraph, module_of, shape_of, unsupported, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Work of one call of a step.

    Attributes:
        macs: Multiply-accumulates by phase (:data:`edgecl.graph.phases.PHASES`); phases without any are left out.
        elementwise: Operations on single elements: activations, comparisons, sums of a reduction, the update itself.
    """

    macs: dict[str, int]
    elementwise: int

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of all phases."""
        return sum(self.macs.values())

    @property
    def flops(self) -> int:
        """``2 * total_macs``; elementwise operations are not in it."""
        return 2 * self.total_macs


@dataclass(frozen=True)
class Work:
    """Cost of one node."""

    node: fx.Node
    phase: str
    macs: int
    elementwise: int


def count(graph: StepGraph) -> Cost:
    """Cost of a step graph.

    Raises:
        UnsupportedOperatorError: for an operator without a formula, with its place in the model.
    """
    work = work_by_node(graph)
    macs = {phase: sum(w.macs for w in work if w.phase == phase) for phase in PHASES}
    return Cost({phase: n for phase, n in macs.items() if n}, sum(w.elementwise for w in work))


def count_by_module(graph: StepGraph) -> dict[str, dict[str, int]]:
    """Multiply-accumulates of a step graph by module path and phase, in the order in which they run; what has none is left out.

    The method's own algebra, which belongs to no module, is under the empty path. The sum over modules is that of :func:`count`.

    Raises:
        UnsupportedOperatorError: for an operator without a formula, with its place in the model.
    """
    found: dict[str, dict[str, int]] = {}
    for work in work_by_node(graph):
        if work.macs:
            phases = found.setdefault(module_of(work.node), {})
            phases[work.phase] = phases.get(work.phase, 0) + work.macs
    return found


def work_by_node(graph: StepGraph) -> list[Work]:
    """Cost of every operator, in the order in which they run."""
    work: list[Work] = []
    for node in graph.operators:
        mark = (node.meta.get("custom") or {}).get("phase", "update")
        if node.target is aten.convolution_backward.default:
            work += _convolution_backward(node)
            continue
        if node.target not in FORMULAS:
            raise unsupported(graph.name, node)
        macs, elementwise = FORMULAS[node.target](node)
        phase = _gradient_phase(node) if mark == "backward" else mark
        work.append(Work(node, phase, macs, elementwise))
    return work


def _numel(node: object) -> int:
    assert isinstance(node, fx.Node)
    return prod(shape_of(node))


def _conv_macs(x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...], transposed: bool) -> int:
    """Every output element takes one MAC for each tap and input channel of its group (input element, if transposed)."""
    return prod(x if transposed else out) * prod(weight[1:])


def _convolution(node: fx.Node) -> tuple[int, int]:
    x, weight, bias, transposed = node.args[0], node.args[1], node.args[2], bool(node.args[6])
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    return _conv_macs(shape_of(x), shape_of(weight), shape_of(node), transposed), 0 if bias is None else _numel(node)


def _convolution_backward(node: fx.Node) -> list[Work]:
    gradient, x, weight, transposed, mask = node.args[0], node.args[1], node.args[2], bool(node.args[7]), node.args[10]
    assert isinstance(gradient, fx.Node) and isinstance(x, fx.Node) and isinstance(weight, fx.Node) and isinstance(mask, (list, tuple))
    macs = _conv_macs(shape_of(x), shape_of(weight), shape_of(gradient), transposed)
    return [
        Work(node, "input_gradient", macs if mask[0] else 0, 0),
        Work(node, "weight_gradient", macs if mask[1] else 0, _numel(gradient) if mask[2] else 0),
    ]


def _product(left: int, right: int) -> Callable[[fx.Node], tuple[int, int]]:
    """Matrix products: output elements times the inner size; an added matrix counts as elementwise."""

    def formula(node: fx.Node) -> tuple[int, int]:
        matrix = node.args[left]
        assert isinstance(matrix, fx.Node)
        return _numel(node) * shape_of(matrix)[-1], _numel(node) if left else 0

    return formula


def _free(node: fx.Node) -> tuple[int, int]:
    return 0, 0


def _output(times: int = 1) -> Callable[[fx.Node], tuple[int, int]]:
    return lambda node: (0, times * _numel(node))


def _input(node: fx.Node) -> tuple[int, int]:
    return 0, _numel(node.args[0])


def _sorted(node: fx.Node) -> tuple[int, int]:
    count = _numel(node.args[0])
    return 0, count * count.bit_length()


def _taps(kernel: Any) -> int:
    return int(prod(kernel) if len(kernel) == 2 else kernel[0] ** 2)


def _window(node: fx.Node) -> tuple[int, int]:
    value = value_of(node)
    out = value[0] if isinstance(value, (list, tuple)) else value
    return 0, int(out.numel()) * _taps(node.args[1])


def _average_backward(node: fx.Node) -> tuple[int, int]:
    return 0, _numel(node.args[0]) * _taps(node.args[2])


_FREE = """view.default _unsafe_view.default reshape.default unsqueeze.default squeeze.dim squeeze.dims expand.default t.default
transpose.int permute.default slice.Tensor select.int narrow.default cat.default index_select.default gather.default
constant_pad_nd.default flip.default _to_copy.default clone.default arange.default full.default zeros.default ones.default
new_zeros.default scalar_tensor.default full_like.default zeros_like.default ones_like.default
new_ones.default new_full.default diagonal.default stack.default split_with_sizes.default"""
_ONE_PER_OUTPUT = """add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar
neg.default exp.default erf.default log.default sqrt.default rsqrt.default reciprocal.default abs.default sign.default sgn.default
pow.Tensor_Scalar pow.Scalar pow.Tensor_Tensor maximum.default minimum.default relu.default sigmoid.default tanh.default
clamp.default clamp_min.default clamp_max.default hardtanh.default round.default floor.default where.self where.ScalarOther
where.ScalarSelf where.Scalar eq.Tensor eq.Scalar ne.Tensor ne.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar lt.Tensor
lt.Scalar le.Tensor le.Scalar logical_and.default logical_or.default logical_not.default bitwise_and.Tensor bitwise_or.Tensor
bitwise_not.default threshold_backward.default hardtanh_backward.default"""


def _overloads(names: str) -> list[object]:
    found = []
    for name in names.split():
        packet, overload = name.split(".")
        found.append(getattr(getattr(aten, packet), overload))
    return found


FORMULAS: dict[object, Callable[[fx.Node], tuple[int, int]]] = {
    **dict.fromkeys(_overloads(_FREE), _free),
    **dict.fromkeys(_overloads(_ONE_PER_OUTPUT), _output()),
    **dict.fromkeys(
        _overloads("sum.default sum.dim_IntList mean.default mean.dim amax.default any.default all.default argmax.default"), _input
    ),
    **dict.fromkeys(_overloads("mm.default bmm.default"), _product(0, 1)),
    **dict.fromkeys(_overloads("addmm.default baddbmm.default"), _product(1, 2)),
    aten.convolution.default: _convolution,
    aten.addcmul.default: _output(2),
    aten.max_pool2d_with_indices.default: _window,
    aten.avg_pool2d.default: _window,
    aten.max_pool2d_with_indices_backward.default: _input,
    aten.avg_pool2d_backward.default: _average_backward,
    aten.scatter_add.default: lambda node: (0, _numel(node.args[3])),
    aten.cumsum.default: _output(),
    aten.topk.default: _sorted,  # comparisons of a sort
    # maximum, difference, exponential, sum, and a logarithm with a difference or a quotient
    aten._log_softmax.default: _output(5),
    aten._softmax.default: _output(5),
    # product or exponential, sum, product, difference
    aten._log_softmax_backward_data.default: _output(4),
    aten._softmax_backward_data.default: _output(4),
    # product, rounding, sum, clip; difference and product, of weights none: runtimes compute with the integers
    QUANTIZE: _output(4),
    **dict.fromkeys(DEQUANTIZES, lambda node: (0, 0 if is_packed(node) else 2 * _numel(node))),
    aten.sigmoid_backward.default: _output(3),
    aten.tanh_backward.default: _output(3),
}
"""Cost ``(macs, elementwise)`` of each known operator. Moving data is free; a reduction counts its input elements."""

_PASS_THROUGH = set(
    _overloads(
        """view.default _unsafe_view.default reshape.default t.default transpose.int permute.default unsqueeze.default
        squeeze.dim squeeze.dims slice.Tensor narrow.default add.Tensor clone.default"""
    )
)


def _gradient_phase(node: fx.Node) -> str:
    """A backward operator is a weight gradient when its result, reshaped at most, is handed to the update."""
    queue, seen = list(node.users), set()
    while queue:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        mark = (user.meta.get("custom") or {}).get("phase")
        if user.op == "output" or mark == "update":
            return "weight_gradient"
        if user.target in _PASS_THROUGH:
            queue += list(user.users)
    return "input_gradient"
