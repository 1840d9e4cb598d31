"""Interpolation, borders and adaptive windows against PyTorch, over every pair of small sizes."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecl.graph.canonical import elementwise, pooling, resampling

SIZES = list(itertools.product(range(1, 9), range(1, 14)))


def same(got: Tensor, want: Tensor, label: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=str(label))


def forward_and_gradient(function: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result, a random cotangent, and the gradient by autograd."""
    y, pullback = torch.func.vjp(function, x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, cotangent, pullback(cotangent)[0]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest(mode: str) -> None:
    forward, backward = {
        "nearest": (resampling.upsample_nearest, resampling.upsample_nearest_backward),
        "nearest-exact": (resampling.upsample_nearest_exact, resampling.upsample_nearest_exact_backward),
    }[mode]
    for size, out in SIZES:
        x = torch.arange(2.0 * size * 3).reshape(1, 2, size, 3)
        y, cotangent, gradient = forward_and_gradient(lambda t, o=out: F.interpolate(t, (o, 5), mode=mode), x)
        same(forward(x, (out, 5)), y, (size, out))
        same(backward(cotangent, (out, 5), x.shape), gradient, (size, out))


@pytest.mark.parametrize("align_corners", [False, True])
def test_linear(align_corners: bool) -> None:
    for size, out in SIZES:
        x = torch.randn(1, 2, size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        run: Any = lambda t, o=out: F.interpolate(t, (o, 5), mode="bilinear", align_corners=align_corners)  # noqa: E731
        y, cotangent, gradient = forward_and_gradient(run, x)
        same(resampling.upsample_linear(x, (out, 5), align_corners), y, (size, out))
        same(resampling.upsample_linear_backward(cotangent, (out, 5), x.shape, align_corners), gradient, (size, out))


@pytest.mark.parametrize("scale", [0.4, 0.75, 1.1, 1.3, 1.5, 2.0, 2.3, 2.5, 3.7])
def test_a_given_scale_is_kept_where_the_size_is_rounded(scale: float) -> None:
    for size in range(3, 9):
        x = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(0))
        for mode, function in (("nearest", resampling.upsample_nearest), ("nearest-exact", resampling.upsample_nearest_exact)):
            y = F.interpolate(x, scale_factor=scale, mode=mode)
            same(function(x, y.shape[2:], scale), y, (mode, size))
        y = F.interpolate(x, scale_factor=scale, mode="linear")
        torch.testing.assert_close(resampling.upsample_linear(x, y.shape[2:], False, scale), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_borders(mode: str) -> None:
    forward, backward = {
        "reflect": (resampling.reflection_pad, resampling.reflection_pad_backward),
        "replicate": (resampling.replication_pad, resampling.replication_pad_backward),
    }[mode]
    for padding in itertools.product((0, 1, 3), (0, 2), (0, 1), (0, 2)):
        x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
        y, cotangent, gradient = forward_and_gradient(lambda t, p=padding: F.pad(t, p, mode=mode), x)
        same(forward(x, padding), y, padding)
        same(backward(cotangent, x, padding), gradient, padding)


def test_adaptive_maxima() -> None:
    """At a tie the first maximum of a window takes the gradient, where windows overlap, too."""
    for size, out in SIZES:
        if out <= size + 2:
            x = torch.randn(1, 2, size, 5, generator=torch.Generator().manual_seed(size)).round()
            y, cotangent, gradient = forward_and_gradient(lambda t, o=out: F.adaptive_max_pool2d(t, (o, 3)), x)
            values, indices = pooling.adaptive_max_pool2d(x, (out, 3))
            same(values, y, (size, out))
            same(pooling.adaptive_max_pool2d_backward(cotangent, x, indices), gradient, (size, out))


def test_what_is_read_is_added_back() -> None:
    """The transpose of a gather: the inner products agree, for elements that are read often, once or never."""
    generator = torch.Generator().manual_seed(0)
    for index in ([0, 1, 2], [2, 2, 0], [1, 1, 1, 1], [0, 2, 1, 0], [2]):
        x, g = torch.randn(2, 3, generator=generator), torch.randn(2, len(index), generator=generator)
        left, right = (resampling.read(x, 1, index) * g).sum(), (x * resampling.add_back(g, 1, index, 3)).sum()
        torch.testing.assert_close(left, right)


def test_logarithm_of_one_plus_keeps_small_numbers() -> None:
    x = torch.tensor([0.0, 1e-30, 1e-10, -1e-9, 1e-4, 0.3, 0.5, 0.51, 7.0, 1e20, -0.7, torch.inf])
    torch.testing.assert_close(elementwise.log1p(x), torch.log1p(x), rtol=1e-6, atol=0)


def test_a_softmax_of_nothing_is_zero() -> None:
    x = torch.tensor([[1.0, 2.0, -torch.inf], [-torch.inf] * 3])
    torch.testing.assert_close(elementwise.safe_softmax(x, -1), torch.ops.aten._safe_softmax(x, -1))
