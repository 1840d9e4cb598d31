"""Rules: how a canonical operator is written for a runtime, one table a runtime.

A rule is a PyTorch function with the operator's own signature; it may return ``NotImplemented`` to keep the operator.
Every rule is tested against autograd over a grid of shapes.
"""

from collections.abc import Callable
from typing import Any

import torch

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

aten = torch.ops.aten

Rules = dict[Any, Callable[..., Any]]

ONNX: Rules = {
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
"""Rules for stock ONNX Runtime."""

RULES: dict[str, Rules] = {"onnx": ONNX}
"""Rule tables by engine."""
