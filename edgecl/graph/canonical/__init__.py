"""Canonical operators: what capture itself rewrites, for every runtime alike.

Batch norm in eval mode becomes a scale and a shift whose frozen factors fold to constants; in training mode its mean and
variance are written out. Activations and layers that are a few simple operators become those, by PyTorch's own table of
decompositions where it has one that ends in operators with a translation, else by the functions of this package. Everything
else stays as autograd writes it, convolution and pooling gradients whole. A function that returns ``NotImplemented`` keeps its
operator, which is then refused by name.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._decomp import get_decompositions

from edgecl.graph.canonical import elementwise, norms, pooling, recurrent, resampling, shapes

aten = torch.ops.aten

_LIBRARY = """leaky_relu leaky_relu_backward elu elu_backward celu hardswish hardswish_backward hardsigmoid hardsigmoid_backward
silu gelu gelu_backward softplus_backward _prelu_kernel _prelu_kernel_backward glu glu_backward native_group_norm_backward
native_layer_norm_backward pixel_shuffle pixel_unshuffle channel_shuffle unbind stack masked_fill linalg_vector_norm"""
"""Operators whose decomposition in PyTorch's own table ends in operators that have a translation."""

_RESAMPLING: dict[str, Callable[..., Any]] = {
    "upsample_nearest{}d": resampling.upsample_nearest,
    "upsample_nearest{}d_backward": resampling.upsample_nearest_backward,
    "_upsample_nearest_exact{}d": resampling.upsample_nearest_exact,
    "_upsample_nearest_exact{}d_backward": resampling.upsample_nearest_exact_backward,
    "reflection_pad{}d": resampling.reflection_pad,
    "reflection_pad{}d_backward": resampling.reflection_pad_backward,
    "replication_pad{}d": resampling.replication_pad,
    "replication_pad{}d_backward": resampling.replication_pad_backward,
}
"""Operators that are alike in one and in two dimensions."""

CANONICAL: dict[Any, Callable[..., Any]] = {
    **get_decompositions([getattr(aten, name) for name in _LIBRARY.split()]),
    aten.native_batch_norm.default: norms.native_batch_norm,
    aten._native_batch_norm_legit_no_training.default: norms.batch_norm_eval,
    aten.native_batch_norm_backward.default: norms.native_batch_norm_backward,
    aten.native_layer_norm.default: norms.native_layer_norm,
    aten.native_group_norm.default: norms.native_group_norm,
    aten.fill.Scalar: torch.full_like,
    aten.softplus.default: elementwise.softplus,
    aten._safe_softmax.default: elementwise.safe_softmax,
    aten.expm1.default: elementwise.expm1,
    aten.mish.default: elementwise.mish,
    aten.log1p.default: elementwise.log1p,
    aten.split.Tensor: shapes.split_equal,
    aten.slice_backward.default: shapes.slice_backward,
    aten.select_backward.default: shapes.select_backward,
    aten._adaptive_avg_pool2d.default: pooling.adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d_backward.default: pooling.adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d.default: pooling.adaptive_max_pool2d,
    aten.adaptive_max_pool2d_backward.default: pooling.adaptive_max_pool2d_backward,
    aten.unsafe_split.Tensor: shapes.split_equal,
    aten.unsafe_split_with_sizes.default: shapes.split_with_sizes,
    aten.repeat.default: shapes.repeat,
    aten.embedding.default: shapes.embedding,
    aten.index_add.default: shapes.index_add,
    aten.embedding_dense_backward.default: shapes.embedding_dense_backward,
    **{getattr(aten, name.format(n)).default: function for n in (1, 2) for name, function in _RESAMPLING.items()},
    aten.upsample_linear1d.default: resampling.upsample_linear,
    aten.upsample_linear1d_backward.default: resampling.upsample_linear_backward,
    aten.upsample_bilinear2d.default: resampling.upsample_linear,
    aten.upsample_bilinear2d_backward.default: resampling.upsample_linear_backward,
}
"""What capture writes out, by operator."""

LAYERS: dict[Any, Callable[..., Any]] = {
    torch.gru: recurrent.gru,
    torch.lstm: recurrent.lstm,
    torch.rnn_tanh: recurrent.rnn_tanh,
    torch.rnn_relu: recurrent.rnn_relu,
    torch.rms_norm: norms.rms_norm,
    F.rms_norm: norms.rms_norm,
}
"""Functions that PyTorch composes of operators, some of which write in place, below the place where capture could remove that."""
