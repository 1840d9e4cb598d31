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

from edgecl.graph.rules import matrices, padding, products, views
from edgecl.graph.rules.convolution import convolution_backward
from edgecl.graph.rules.elementwise import (
    hardtanh_backward,
    log_softmax_backward,
    sigmoid_backward,
    softmax_backward,
    tanh_backward,
    threshold_backward,
)
from edgecl.graph.rules.pooling import avg_pool2d, avg_pool2d_backward, max_pool2d_with_indices_backward
from edgecl.graph.rules.reductions import mean_of, of_number, sum_of, sum_of_all

aten = torch.ops.aten


@dataclass(frozen=True)
class Changing:
    """A rule that holds where the operands at ``factors`` (positions of arguments) are no constants."""

    rule: Callable[..., Any]
    factors: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """Rules of a runtime by operator: those that always hold, and those for factors that change, which go first.

    With ``rows``, maps lie channels last where convolutions with a changing kernel are faster so (:mod:`edgecl.graph.rules.rows`).
    """

    always: dict[Any, Callable[..., Any]]
    changing: dict[Any, Changing] = field(default_factory=dict)
    rows: bool = False


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

ONNX = Rules({**_PLAIN, aten.sum.dim_IntList: of_number, aten.mean.dim: of_number}, rows=True)
"""Rules for stock ONNX Runtime."""

EXECUTORCH = Rules(
    {
        **_PLAIN,
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
    },
    {
        aten.convolution.default: Changing(products.convolution, (1,)),
        aten.convolution_backward.default: Changing(products.convolution_backward, (2,)),
        aten.mm.default: Changing(matrices.mm, (0, 1)),
        aten.addmm.default: Changing(matrices.addmm, (1, 2)),
    },
)
"""Rules for stock ExecuTorch: its portable convolution is naive, XNNPACK's packs frozen kernels only, its padding cannot crop,
and its sums are float32's."""

RULES: dict[str, Rules] = {"onnx": ONNX, "executorch": EXECUTORCH}
"""Rules by engine."""
