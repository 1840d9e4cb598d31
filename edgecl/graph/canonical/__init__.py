"""Canonical operators: what capture itself rewrites, for every runtime alike.

Batch norm in eval mode becomes a scale and a shift whose frozen factors fold to constants. Activations and layers that are
a few simple operators become those, by PyTorch's own table of decompositions where it has one that ends in operators with
a translation, else by the functions of this package. Everything else stays as autograd writes it, convolution and pooling
gradients whole. A function that returns ``NotImplemented`` keeps its operator, which is then refused by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

from edgecl.graph.canonical import elementwise, norms, pooling, shapes

aten = torch.ops.aten

_LIBRARY = """leaky_relu leaky_relu_backward elu elu_backward celu hardswish hardswish_backward hardsigmoid hardsigmoid_backward
silu gelu gelu_backward softplus_backward mish _prelu_kernel _prelu_kernel_backward glu glu_backward native_group_norm_backward
native_layer_norm_backward pixel_shuffle pixel_unshuffle channel_shuffle unbind stack masked_fill linalg_vector_norm"""
"""Operators whose decomposition in PyTorch's own table ends in operators that have a translation."""

CANONICAL: dict[Any, Callable[..., Any]] = {
    **get_decompositions([getattr(aten, name) for name in _LIBRARY.split()]),
    aten.native_batch_norm.default: norms.native_batch_norm,
    aten._native_batch_norm_legit_no_training.default: norms.batch_norm_eval,
    aten.native_batch_norm_backward.default: norms.native_batch_norm_backward,
    aten.native_layer_norm.default: norms.native_layer_norm,
    aten.native_group_norm.default: norms.native_group_norm,
    aten.fill.Scalar: torch.full_like,
    aten.softplus.default: elementwise.softplus,
    aten.expm1.default: elementwise.expm1,
    aten.split.Tensor: shapes.split_equal,
    aten.split_with_sizes.default: shapes.split_with_sizes,
    aten.slice_backward.default: shapes.slice_backward,
    aten.select_backward.default: shapes.select_backward,
    aten._adaptive_avg_pool2d.default: pooling.adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward.default: pooling.adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d.default: pooling.adaptive_max_pool2d,
    aten.adaptive_max_pool2d_backward.default: pooling.adaptive_max_pool2d_backward,
    aten.upsample_nearest1d.default: shapes.upsample_nearest,
    aten.upsample_nearest2d.default: shapes.upsample_nearest,
    aten.upsample_nearest1d_backward.default: shapes.upsample_nearest_backward,
    aten.upsample_nearest2d_backward.default: shapes.upsample_nearest_backward,
    aten.reflection_pad1d.default: shapes.reflection_pad,
    aten.reflection_pad2d.default: shapes.reflection_pad,
    aten.replication_pad1d.default: shapes.replication_pad,
    aten.replication_pad2d.default: shapes.replication_pad,
}
"""What capture writes out, by operator."""
