"""Hold maps channels last where convolutions with a changing kernel are faster so (:mod:`edgecl.graph.rules.rows`).

A map [N, C, *sizes] is held as rows [N * positions, C] from a convolution that is better in rows to whatever needs the plain layout:
elementwise operators, reductions and joins work on rows as they are, everything else meets the map transposed back. Which layout a map has
follows from the operator that makes it.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from edgecl.graph.passes.base import Pass, is_constant
from edgecl.graph.passes.lower import retrace
from edgecl.graph.rules import rows as rules
from edgecl.graph.rules.convolution import input_gradient
from edgecl.graph.rules.rows import Window
from edgecl.graph.step import StepGraph, shape_of

aten = torch.ops.aten


class HoldRows(Pass):
    """See the module. It traces the graph again, as :class:`edgecl.graph.passes.lower.ApplyRules` does."""

    breaks = frozenset({"no-dead-code", "constants-folded"})

    def rewrite(self, graph: StepGraph) -> StepGraph:
        """See the class."""
        if not any(_in_rows(node) for node in graph.operators):
            return graph
        return retrace(graph, lambda *tensors: _Retrace(graph.module).run(*tensors))


_CONVOLUTIONS: dict[Any, int] = {aten.convolution.default: 0, aten.convolution_backward.default: 1}
"""Where an operator's input stands among its arguments; its kernel is next."""


def _window(node: fx.Node) -> Window | None:
    """Shapes of a convolution or of its gradients; None for another operator and a transposed one."""
    first = _CONVOLUTIONS.get(node.target)
    if first is None:
        return None
    x, weight = node.args[first : first + 2]
    start = 3 + first  # the bias, or the sizes of one, stands between
    stride, padding, dilation, transposed, _, groups = node.args[start : start + 6]
    return None if transposed else Window.of(shape_of(x), shape_of(weight), stride, padding, dilation, groups)  # type: ignore[arg-type]


def _in_rows(node: fx.Node) -> bool:
    """Whether a convolution, or its gradients, are to be computed in rows."""
    window = _window(node)
    if window is None or not window.better_in_rows:
        return False
    weight: Any = node.args[1 if node.target is aten.convolution.default else 2]
    return not is_constant(weight)


@dataclass
class _Map:
    """A map [N, C, *sizes] as rows [N * positions, C]."""

    rows: Tensor
    batch: int
    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, self.rows.shape[1], *self.sizes

    @property
    def whole(self) -> Tensor:
        """[N, *sizes, C]."""
        return self.rows.reshape(self.batch, *self.sizes, self.rows.shape[1])

    @classmethod
    def of_whole(cls, whole: Tensor) -> "_Map":
        return cls(whole.reshape(-1, whole.shape[-1]), whole.shape[0], tuple(whole.shape[1:-1]))

    @classmethod
    def of(cls, plain: "Tensor | _Map") -> "_Map":
        """Of [N, C, *sizes]; a map stays itself."""
        if isinstance(plain, _Map):
            return plain
        return cls(rules.rows_of(plain), plain.shape[0], tuple(plain.shape[2:]))

    def plain(self) -> Tensor:
        """[N, C, *sizes]."""
        if prod(self.sizes) == 1:
            return self.rows.reshape(self.shape)
        if self.batch == 1:
            return self.rows.t().reshape(self.shape)
        return self.rows.reshape(self.batch, -1, self.rows.shape[1]).transpose(1, 2).reshape(self.shape)


class _Retrace(fx.Interpreter):
    """Runs a step's graph again; a map is a :class:`_Map` or a plain tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.node: fx.Node
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem:
            return args[0][args[1]]
        window = _window(self.node)
        if window is not None and (_in_rows(self.node) or (window.pointwise and isinstance(args[0], _Map))):
            return (_convolution if target is aten.convolution.default else _convolution_backward)(window, *args)
        if target in _ON_ROWS and _any_map(args):
            result = _ON_ROWS[target](target, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return super().call_function(target, _plain(args), kwargs)

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().output(target, _plain(args), kwargs)


def _plain(value: Any) -> Any:
    """An argument, or all in a list of them, with plain tensors for maps."""
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.plain() if isinstance(value, _Map) else value


def _any_map(args: Sequence[Any]) -> bool:
    return any(isinstance(a, _Map) or (isinstance(a, (list, tuple)) and _any_map(a)) for a in args)


def _convolution(window: Window, x: Any, weight: Tensor, bias: Tensor | None, *shapes: Any) -> _Map:
    return _Map(rules.convolution(_Map.of(x).rows, weight, bias, window), window.batch, window.out)


def _convolution_backward(window: Window, gradient: Any, x: Any, weight: Tensor, bias_sizes: Any, *rest: Any) -> tuple[Any, Any, Any]:
    rows, (to_input, to_weight, to_bias) = _Map.of(gradient).rows, rest[-1]
    return (
        _input_gradient(window, gradient, weight) if to_input else None,
        rules.weight_gradient(rows, _Map.of(x).rows, window) if to_weight else None,
        rules.total(rows) if to_bias else None,
    )


def _input_gradient(window: Window, gradient: Any, weight: Tensor) -> Any:
    """A dense convolution's with a stride is the runtime's own: most of the rows to gather would be zeros."""
    if prod(window.stride) > 1 and not window.depthwise:
        shape = (window.batch, window.channels, *window.sizes)
        return input_gradient(_plain(gradient), shape, weight, window.stride, window.padding, window.dilation, window.groups)
    return _Map(rules.input_gradient(_Map.of(gradient).rows, weight, window), window.batch, window.sizes)


def _elementwise(target: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator on single elements; operands broadcast to the map, along its channels or sample by sample."""
    shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, (Tensor, _Map))))  # type: ignore[no-untyped-call]
    like = next((a for a in args if isinstance(a, _Map) and a.shape == shape), None)
    if like is None:
        return NotImplemented
    operands, by_sample = [], False
    for a in args:
        if isinstance(a, (Tensor, _Map)) and a.shape != shape:
            a = _plain(a)
            batch, *rest = [1] * (len(shape) - a.dim()) + list(a.shape)
            if prod(rest[1:]) > 1:
                return NotImplemented
            by_sample |= batch > 1
            a = a.reshape(batch, 1, rest[0]) if a.dim() else a
        elif isinstance(a, (Tensor, _Map)):
            a = _Map.of(a)
        operands.append(a)
    if by_sample:
        operands = [a.rows.reshape(a.batch, -1, a.rows.shape[1]) if isinstance(a, _Map) else a for a in operands]
    else:
        operands = [a.rows if isinstance(a, _Map) else a.reshape(-1) if isinstance(a, Tensor) and a.dim() else a for a in operands]
    result = target(*operands, **kwargs)
    return _Map(result.reshape(-1, result.shape[-1]), like.batch, like.sizes)


def _reduction(target: Any, x: _Map, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """A sum, mean or maximum over samples and positions, over positions, over channels, or over everything."""
    rank = len(x.shape)
    over = set(range(rank)) if not dims else {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    kept = (
        tuple(1 if d in over else n for d, n in enumerate(x.shape)) if keepdim else tuple(n for d, n in enumerate(x.shape) if d not in over)
    )
    positions = set(range(2, rank))
    plain = x.rows.dtype == torch.float32 and not kwargs and target is not aten.amax.default
    if plain and (over == positions | {0} or (over == positions and x.batch == 1)):
        whole = rules.total(x.rows)
        return (whole if target is aten.sum.dim_IntList else whole / float(x.rows.shape[0])).reshape(kept)
    if over == positions and x.batch > 1:
        return target(x.rows.reshape(x.batch, -1, x.rows.shape[1]), [1], **kwargs).reshape(kept)
    axes = {frozenset(positions): [0], frozenset({0} | positions): [0], frozenset({1}): [1], frozenset(range(rank)): [0, 1]}
    return target(x.rows, axes[frozenset(over)], **kwargs).reshape(kept) if frozenset(over) in axes else NotImplemented


def _sum(target: Any, x: _Map) -> Any:
    return target(x.rows)


def _reshape(target: Any, x: _Map, shape: Sequence[int]) -> Any:
    return target(x.rows, shape) if prod(x.sizes) == 1 else NotImplemented


def _cat(target: Any, parts: Sequence[Any], dim: int = 0) -> Any:
    maps = [_Map.of(part) for part in parts]
    axis = dim % len(maps[0].shape)
    if axis > 1:
        return NotImplemented
    return _Map(target([m.rows for m in maps], axis), maps[0].batch if axis else sum(m.batch for m in maps), maps[0].sizes)


def _axis(dim: int, rank: int) -> int:
    """Where an axis of [N, C, *sizes] is in [N, *sizes, C]."""
    return {0: 0, 1: rank - 1}.get(dim % rank, dim % rank - 1)


def _along(target: Any, x: _Map, dim: int = 0, *rest: Any) -> Any:
    """An operator along one axis: a slice or a choice of places."""
    axis = _axis(dim, len(x.shape))
    if axis == len(x.shape) - 1:
        return _Map(target(x.rows, 1, *rest), x.batch, x.sizes)
    return _Map.of_whole(target(x.whole, axis, *rest))


def _pad(target: Any, x: _Map, pads: Sequence[int], value: float = 0.0) -> Any:
    rank = len(x.shape)
    by_axis: list[Sequence[int]] = [(0, 0)] * rank
    for i in range(len(pads) // 2):
        by_axis[_axis(rank - 1 - i, rank)] = pads[2 * i : 2 * i + 2]
    if not any(n for pair in by_axis[:-1] for n in pair):
        return _Map(target(x.rows, list(by_axis[-1]), value), x.batch, x.sizes)
    return _Map.of_whole(target(x.whole, [n for pair in reversed(by_axis) for n in pair], value))


_NAMES = """add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar neg.default exp.default
erf.default log.default sqrt.default rsqrt.default reciprocal.default abs.default sign.default pow.Tensor_Scalar maximum.default
minimum.default relu.default sigmoid.default tanh.default clamp.default clamp_min.default clamp_max.default hardtanh.default where.self
eq.Tensor eq.Scalar ne.Tensor ne.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar
logical_and.default logical_or.default logical_not.default threshold_backward.default hardtanh_backward.default sigmoid_backward.default
tanh_backward.default _to_copy.default"""

_ON_ROWS: dict[Any, Callable[..., Any]] = {
    **{getattr(getattr(aten, name.split(".")[0]), name.split(".")[1]): _elementwise for name in _NAMES.split()},
    aten.sum.dim_IntList: _reduction,
    aten.mean.dim: _reduction,
    aten.amax.default: _reduction,
    aten.sum.default: _sum,
    aten.reshape.default: _reshape,
    aten.cat.default: _cat,
    aten.slice.Tensor: _along,
    aten.index_select.default: _along,
    aten.constant_pad_nd.default: _pad,
}
"""How an operator works on maps in rows; ``NotImplemented`` gives it plain ones."""
