"""Rules: how a canonical operator is written for a runtime, one table a runtime.

A rule is a PyTorch function with the operator's own signature; it may return ``NotImplemented`` to keep the operator.
Every rule is tested against autograd over a grid of shapes.

A runtime packs a frozen kernel or matrix once, so that an operator may need another form where that operand changes: rules for that case
are in a table of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from edgecl.graph.rules import frozen, matrices, padding, products, views
from edgecl.graph.rules.convolution import convolution_backward
from edgecl.graph.rules.elementwise import (
    hardtanh_backward,
    hardtanh_backward_by_clip,
    hardtanh_backward_by_product,
    log_softmax_backward,
    sigmoid_backward,
    softmax_backward,
    tanh_backward,
    threshold_backward,
    threshold_backward_by_clip,
    threshold_backward_by_product,
)
from edgecl.graph.rules.pooling import avg_pool2d, avg_pool2d_backward, max_pool2d_with_indices_backward
from edgecl.graph.rules.reductions import mean_of, of_number, sum_of, sum_of_all

aten = torch.ops.aten


@dataclass(frozen=True)
class Of:
    """A rule that holds where the operands at some positions change, and those at others are constants."""

    rule: Callable[..., Any]
    changing: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rules:
    """Rules of a runtime by operator: those that always hold, and before them, in order, those for operands that change or are frozen."""

    always: dict[Any, Callable[..., Any]]
    special: dict[Any, tuple[Of, ...]] = field(default_factory=dict)


_PLAIN: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten.max_pool2d_with_indices_backward.default: max_pool2d_with_indices_backward,
    aten.avg_pool2d.default: avg_pool2d,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten.threshold_backward.default: threshold_backward,
    aten.hardtanh_backward.default: hardtanh_backward,
    aten._log_softmax_backward_data.default: log_softmax_backward,
    aten._softmax_backward_data.default: softmax_backward,
    aten.sigmoid_backward.default: sigmoid_backward,
    aten.tanh_backward.default: tanh_backward,
}
"""For runtimes without gradients of their own."""

ONNX = Rules(
    {
        **_PLAIN,
        aten.threshold_backward.default: threshold_backward_by_product,
        aten.hardtanh_backward.default: hardtanh_backward_by_product,
        aten.sum.dim_IntList: of_number,
        aten.mean.dim: of_number,
    },
    {aten.convolution_backward.default: (Of(frozen.convolution_backward, frozen=(2,)),)},
)
"""Rules for stock ONNX Runtime."""

EXECUTORCH = Rules(
    {
        **_PLAIN,
        aten.threshold_backward.default: threshold_backward_by_clip,
        aten.hardtanh_backward.default: hardtanh_backward_by_clip,
        aten.constant_pad_nd.default: padding.constant_pad_nd,
        aten.sum.dim_IntList: sum_of,
        aten.sum.default: sum_of_all,
        aten.mean.dim: mean_of,
        aten.baddbmm.default: matrices.baddbmm,
        aten.unsqueeze.default: views.unsqueeze,
        aten.squeeze.dim: views.squeeze,
        aten.squeeze.dims: views.squeeze,
        aten.select.int: views.select,
        aten.t.default: views.transpose,
        aten.transpose.int: views.transpose,
        aten.rsub.Scalar: views.rsub,
        aten.clamp_min.default: views.clamp_min,
        aten.where.self: views.where,
    },
    {
        aten.convolution.default: (Of(products.convolution, changing=(1,)), Of(frozen.convolution, changing=(2,), frozen=(1,))),
        aten.convolution_backward.default: (
            Of(products.convolution_backward, changing=(2,)),
            Of(frozen.convolution_backward, frozen=(2,)),
        ),
        aten.mm.default: (Of(matrices.mm, changing=(0, 1)),),
        aten.addmm.default: (Of(matrices.addmm, changing=(1, 2)),),
    },
)
"""Rules for stock ExecuTorch: its portable convolution is naive, XNNPACK's packs frozen kernels and biases only, its padding cannot crop,
its sums are float32's, and comparisons and choices are portable, ten times slower than XNNPACK's products and clips."""

RULES: dict[str, Rules] = {"onnx": ONNX, "executorch": EXECUTORCH}
"""Rules by engine."""
