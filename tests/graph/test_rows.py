"""Maps channels last: convolutions of rows, and of frozen kernels, against autograd; and every operator that works on rows as it is."""

import itertools
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecl.graph.lowering import canonicalise, lower
from edgecl.graph.passes import HoldRows
from edgecl.graph.rules import frozen, rows
from edgecl.graph.rules.rows import Window
from edgecl.graph.step import StepGraph, shape_of

aten = torch.ops.aten
EXACT = 1e-10
CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def cases() -> list[dict[str, Any]]:
    """Kernels, strides, paddings and dilations in one to three dimensions, dense and depthwise."""
    found = []
    for kernel, stride, padding, dilation, groups in itertools.product(
        [(1,), (3,), (4,), (1, 1), (3, 3), (2, 5), (2, 3, 1)], (1, 2, 3), (0, 1, 2), (1, 2), (1, 6)
    ):
        sizes = (9, 8, 5)[: len(kernel)]
        if all(size + 2 * padding >= dilation * (k - 1) + 1 for size, k in zip(sizes, kernel, strict=True)):
            found.append({"sizes": sizes, "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups})
    return found


def drawn(case: dict[str, Any], batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    outputs = 6 if case["groups"] > 1 else 4
    shapes = (batch, 6, *case["sizes"]), (outputs, 6 // case["groups"], *case["kernel"]), (outputs,)
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, w, b


def close(got: Tensor, want: Tensor, bar: float, label: object) -> None:
    assert got.shape == want.shape, (label, got.shape, want.shape)
    worst, size = (got - want).abs().max().item(), want.abs().max().item()
    assert worst <= bar * max(size, 1e-30), f"{label}: off by {worst:.3g} of {size:.3g}"


def plain(held: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows as a map of this shape."""
    return held.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_of_rows_equal_autograd(batch: int, generator: torch.Generator) -> None:
    assert len(cases()) > 150
    for case in cases():
        x, w, b = drawn(case, batch, generator)
        rank = len(case["kernel"])
        options = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
        y, pullback = torch.func.vjp(lambda x, w, options=options, rank=rank: CONVOLVE[rank](x, w, **options), x, w)
        g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        to_x, to_w = pullback(g)
        window = Window.of(x.shape, w.shape, *([case[k]] * rank for k in ("stride", "padding", "dilation")), case["groups"])
        held, gradient = rows.rows_of(x), rows.rows_of(g)
        close(plain(rows.convolution(held, w, b, window), tuple(y.shape)), y + b.reshape(-1, *[1] * rank), EXACT, case)
        close(plain(rows.convolution(held, w, None, window), tuple(y.shape)), y, EXACT, case)
        close(plain(rows.input_gradient(gradient, w, window), tuple(x.shape)), to_x, EXACT, case)
        close(rows.weight_gradient(gradient, held, window), to_w, EXACT, case)


@pytest.mark.parametrize("batch", [1, 3])
def test_input_gradients_of_frozen_kernels_equal_autograd(batch: int, generator: torch.Generator) -> None:
    taken = 0
    for case in cases():
        x, w, _ = (tensor.float() for tensor in drawn(case, batch, generator))
        rank = len(case["kernel"])
        options = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
        y, pullback = torch.func.vjp(lambda x, w, options=options, rank=rank: CONVOLVE[rank](x, w, **options), x, w)
        g = torch.randn(y.shape, generator=generator)
        lists = [[case[k]] * rank for k in ("stride", "padding", "dilation")]
        found = frozen.convolution_backward(g, x, w, None, *lists, False, [0] * rank, case["groups"], [True, True, True])
        if found is not NotImplemented:
            taken += 1
            for got, want in zip(found, [*pullback(g), g.sum([0, *range(2, g.dim())])], strict=True):
                close(got, want, 1e-5, case)
    assert taken > 50


def test_which_frozen_kernels_keep_the_general_rule(generator: torch.Generator) -> None:
    def rule(
        x: tuple[int, ...], w: tuple[int, ...], stride: int, padding: int, groups: int, wanted: bool = True, flipped: bool = False
    ) -> Any:
        a, b = (torch.randn(shape, generator=generator) for shape in (x, w))
        y = F.conv2d(a, b, stride=stride, padding=padding, groups=groups)
        return frozen.convolution_backward(
            torch.ones_like(y), a, b, None, [stride] * 2, [padding] * 2, [1, 1], flipped, [0, 0], groups, [wanted, True, False]
        )

    assert rule((1, 4, 8, 8), (4, 1, 3, 3), 2, 1, 4) is not NotImplemented
    assert rule((1, 4, 8, 8), (4, 4, 3, 3), 2, 1, 1) is NotImplemented, "a dense one with a stride"
    assert rule((1, 4, 8, 8), (4, 4, 1, 1), 1, 1, 1) is NotImplemented, "padding beyond the kernel"
    assert rule((1, 4, 64, 64), (4, 4, 1, 1), 1, 0, 1) is NotImplemented, "a product over many positions"
    assert rule((1, 4, 8, 8), (4, 4, 3, 3), 1, 1, 1, wanted=False) is NotImplemented
    assert rule((1, 4, 8, 8), (4, 4, 3, 3), 1, 1, 1, flipped=True) is NotImplemented


def held(graph: StepGraph) -> list[Any]:
    """Operators of a lowered graph."""
    return [node.target for node in graph.operators]


OPERATORS: dict[str, Any] = {
    "vector": lambda y, v, z: y * v.reshape(-1, 1, 1) + v.reshape(1, -1, 1, 1),
    "by sample": lambda y, v, z: y * y.mean((2, 3), keepdim=True) + y.sum((2, 3), keepdim=True),
    "number": lambda y, v, z: (y * 2.0 + 1.0) / 3.0 - (1.0 - y),
    "scalar tensor": lambda y, v, z: y * v.sum(),
    "another map": lambda y, v, z: y * z + z,
    "activations": lambda y, v, z: F.relu(y) + F.relu6(y) * torch.sigmoid(y) + torch.tanh(y) + F.hardswish(y) + F.gelu(y),
    "choice": lambda y, v, z: torch.where(y > z, y, v.reshape(-1, 1, 1)).abs().sqrt(),
    "channel mean": lambda y, v, z: y - y.mean(1, keepdim=True) * 0.5,
    "channel sum": lambda y, v, z: y.sum(1) + z.sum((1,)),
    "all": lambda y, v, z: y.sum() * y + y.mean((0, 1, 2, 3)),
    "samples and positions": lambda y, v, z: y * y.sum((0, 2, 3), keepdim=True) + y.mean((0, 2, 3)).reshape(-1, 1, 1),
    "one axis": lambda y, v, z: y.sum(2) + y.mean(3).transpose(1, 2).sum(1, keepdim=True).transpose(1, 2)[:, :, :1] * 0.1,
    "largest": lambda y, v, z: y.amax((2, 3)) * y.amax(1).sum((1, 2)).reshape(-1, 1),
    "join channels": lambda y, v, z: torch.cat([y, z, y * z], 1),
    "join samples": lambda y, v, z: torch.cat([z, y], 0),
    "join rows": lambda y, v, z: torch.cat([y, y], 2),
    "slices": lambda y, v, z: y[:, 1:5, ::2, 1:] * 2.0,
    "first samples": lambda y, v, z: y[:1],
    "chosen channels": lambda y, v, z: y.index_select(1, torch.tensor([3, 0, 5])) * 2.0,
    "chosen rows": lambda y, v, z: y.index_select(2, torch.tensor([3, 0])),
    "pad channels": lambda y, v, z: F.pad(y, (0, 0, 0, 0, 2, 1)),
    "pad and crop": lambda y, v, z: F.pad(y, (1, -1, 0, 2, -1, 0)),
    "plane of the size of the map": lambda y, v, z: y * z[:1, :1],
    "pooling": lambda y, v, z: F.max_pool2d(y, 2) + F.avg_pool2d(y, 2),
    "flatten": lambda y, v, z: y.flatten(1) @ torch.arange(4 * prod(y.shape[1:])).cos().reshape(-1, 4),
    "global pooling": lambda y, v, z: F.adaptive_avg_pool2d(y, 1).flatten(1) * v,
    "convolution with a stride": lambda y, v, z: F.conv2d(y, torch.ones(4, 6, 3, 3) * 0.1, stride=2, padding=1),
    "frozen pointwise": lambda y, v, z: F.conv2d(y, torch.linspace(-1, 1, 30).reshape(5, 6, 1, 1), torch.ones(5)),
    "interpolation": lambda y, v, z: F.interpolate(y, scale_factor=2.0),
    "softmax": lambda y, v, z: F.log_softmax(y, 1) + F.softmax(y, 3),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_behind_a_convolution_in_rows(name: str, batch: int, bench: Any, generator: torch.Generator) -> None:
    """Values and gradients on ONNX Runtime, with a pointwise convolution before that changes, whose result lies in rows."""
    x, w, v, z = (torch.randn(s, generator=generator) * 0.5 for s in ((batch, 4, 6, 8), (6, 4, 1, 1), (6,), (batch, 6, 6, 8)))

    def run(x: Tensor, w: Tensor, v: Tensor, z: Tensor) -> list[Tensor]:
        def loss(w: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            y = OPERATORS[name](F.conv2d(x, w), v, z)
            return (y * torch.linspace(-0.4, 1, y.numel()).reshape(y.shape)).sum(), y

        gradients, y = torch.func.grad(loss, (0, 1, 2), has_aux=True)(w, v, z)
        return [y, *gradients]

    graph = bench.check(run, x, w, v, z, bar=3e-5)
    pointwise = [n for n in graph.operators if n.target is aten.convolution.default and shape_of(n.args[1]) == (6, 4, 1, 1)]
    assert not pointwise and aten.mm.default in held(graph)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_in_both_layouts(batch: int, bench: Any, generator: torch.Generator) -> None:
    """Dense, depthwise and pointwise, with and without strides, large and small maps, a residual; all of it trained."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(), nn.Conv2d(12, 12, 3, stride=2, padding=1),
        nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12), nn.Conv2d(12, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    names = [name for name, _ in net.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(net, parameters, (x,)).square().sum()  # type: ignore[no-any-return]

        return list(torch.func.grad(loss)(dict(zip(names, values, strict=True))).values())

    bench.check(run, torch.randn(batch, 3, 16, 16, generator=generator), *(p.detach() for p in net.parameters()), bar=1e-4)


def test_which_convolutions_are_better_in_rows() -> None:
    def better(x: tuple[int, ...], w: tuple[int, ...], groups: int = 1) -> bool:
        return Window.of(x, w, [1, 1], [w[2] // 2] * 2, [1, 1], groups).better_in_rows

    assert better((1, 64, 8, 8), (64, 64, 3, 3)) and better((1, 16, 32, 32), (16, 16, 3, 3))
    assert not better((1, 3, 32, 32), (16, 3, 3, 3)), "narrow rows"
    assert better((1, 64, 11, 11), (64, 1, 3, 3), 64) and not better((1, 64, 12, 12), (64, 1, 3, 3), 64)
    assert better((9, 64, 11, 11), (32, 64, 1, 1)) and not better((1, 64, 12, 12), (32, 64, 1, 1))
    assert not better((1, 64, 8, 8), (64, 32, 3, 3), 2), "groups of several channels"


def test_frozen_and_transposed_convolutions_alone_are_left(bench: Any, generator: torch.Generator) -> None:
    kernel = torch.randn(6, 4, 3, 3, generator=generator)

    def run(x: Tensor, w: Tensor) -> list[Tensor]:
        return [F.conv2d(x, kernel), F.conv_transpose2d(x, w)]

    x, w = torch.randn(1, 4, 6, 6, generator=generator), torch.randn(4, 6, 3, 3, generator=generator)
    graph = canonicalise(bench.trace(run, x, w))
    assert HoldRows()(graph) is not None and held(HoldRows()(graph)) == held(graph)
    bench.check(run, x, w)


def test_executorch_keeps_its_own_form(bench: Any, generator: torch.Generator) -> None:
    x, w = torch.randn(1, 4, 6, 6, generator=generator), torch.randn(6, 4, 1, 1, generator=generator)
    graph = lower(canonicalise(bench.trace(F.conv2d, x, w)), "executorch")
    assert aten.bmm.default in held(graph) and aten.mm.default not in held(graph)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(9, 4), (4, 9)])
def test_the_narrower_map_is_moved(batch: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
    """Convolutions that narrow or widen by two and more, with borders, dilation and unequal sizes, against autograd."""
    for taps, padding, dilation in (((3, 3), (1, 1), (1, 1)), ((2, 3), (0, 2), (1, 2)), ((1, 5), (0, 0), (1, 1))):
        x = torch.randn(batch, inputs, 7, 6, generator=generator, requires_grad=True)
        w = torch.randn(outputs, inputs, *taps, generator=generator, requires_grad=True)
        b = torch.randn(outputs, generator=generator)
        y = torch.nn.functional.conv2d(x, w, b, 1, padding, dilation)
        g = torch.randn(y.shape, generator=generator)
        to_x, to_w = torch.autograd.grad(y, (x, w), g)
        window = Window.of(x.shape, w.shape, (1, 1), padding, dilation, 1)
        assert (window.narrows, window.widens) == (inputs > outputs, outputs > inputs)
        held, gradient = rows.rows_of(x.detach()), rows.rows_of(g)
        torch.testing.assert_close(plain(rows.convolution(held, w.detach(), b, window), tuple(y.shape)), y.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(rows.input_gradient(gradient, w.detach(), window), tuple(x.shape)), to_x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows.weight_gradient(gradient, held, window), to_w, rtol=1e-4, atol=1e-4)
