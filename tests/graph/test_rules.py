"""Rules against autograd: in PyTorch in float64, and lowered and emitted on ONNX Runtime in float32."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecl.graph import cost
from edgecl.graph.lowering import canonicalise, lower
from edgecl.graph.rules import elementwise, pooling, products
from edgecl.graph.rules.convolution import convolution_backward
from edgecl.graph.step import shape_of
from edgecl.methods._losses import cross_entropy

aten = torch.ops.aten
EXACT = 1e-10


def close(got: Tensor, want: Tensor, bar: float, label: object) -> None:
    assert got.shape == want.shape, (label, got.shape, want.shape)
    worst, size = (got - want).abs().max().item(), want.abs().max().item()
    assert worst <= bar * max(size, 1e-30), f"{label}: off by {worst:.3g} of {size:.3g}"


def convolutions() -> list[dict[str, Any]]:
    """Every combination in one and two dimensions that has an output; channels 4 -> 4 or 2 -> 4."""
    found = []
    for kernel, stride, padding, dilation, groups in itertools.product(
        [(1,), (2,), (3,), (5,), (1, 1), (2, 2), (3, 3), (5, 5), (3, 1), (1, 5)], (1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 4)
    ):
        sizes = (11, 8)[: len(kernel)]  # with strides 2 and 3, some rests are not zero
        if all(size + 2 * padding >= dilation * (k - 1) + 1 for size, k in zip(sizes, kernel, strict=True)):
            found.append({"sizes": sizes, "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups})
    return found


def convolve(case: dict[str, Any]) -> Any:
    function: Any = F.conv1d if len(case["kernel"]) == 1 else F.conv2d
    options = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    return lambda x, w, b: function(x, w, b, **options)


def operands(case: dict[str, Any], batch: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return draw(batch, 4, *case["sizes"]), draw(8, 4 // case["groups"], *case["kernel"]), draw(8)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_convolution_backward_equals_autograd(batch: int, generator: torch.Generator) -> None:
    cases = convolutions()
    assert len(cases) > 500
    for case in cases:
        x, w, b = operands(case, batch, generator, torch.float64)
        y, pullback = torch.func.vjp(convolve(case), x, w, b)
        cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        rank = len(case["kernel"])
        options = [[case[k]] * rank for k in ("stride", "padding", "dilation")]
        found = convolution_backward(cotangent, x, w, [8], *options, False, [0] * rank, case["groups"], [True] * 3)
        for name, got, want in zip(("input", "weight", "bias"), found, pullback(cotangent), strict=True):
            assert got is not None
            close(got, want, EXACT, (name, batch, case))


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)), ids=str)
def test_convolution_backward_computes_only_what_the_mask_asks_for(mask: tuple[bool, ...], generator: torch.Generator) -> None:
    x, w, g = (torch.randn(s, generator=generator) for s in ((2, 4, 6, 6), (3, 4, 3, 3), (2, 3, 4, 4)))
    found = convolution_backward(g, x, w, [3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
    want = aten.convolution_backward.default(g, x, w, [3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask))
    assert [t is not None for t in found] == list(mask)
    for got, reference in zip(found, want, strict=True):
        if got is not None:
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


def test_convolution_backward_with_a_different_value_on_each_axis(generator: torch.Generator) -> None:
    options: Any = {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 2}
    x, w = torch.randn(2, 4, 11, 13, generator=generator).double(), torch.randn(6, 2, 3, 5, generator=generator).double()
    y, pullback = torch.func.vjp(lambda a, b: F.conv2d(a, b, **options), x, w)
    g = torch.randn(y.shape, generator=generator).double()
    found = convolution_backward(g, x, w, None, (2, 3), (1, 2), (2, 1), False, (0, 0), 2, (True, True, False))
    for got, want in zip(found, pullback(g), strict=False):
        assert got is not None
        close(got, want, EXACT, "axes")


DEPTHWISE: list[dict[str, Any]] = [
    {"sizes": (60,), "kernel": (5,), "padding": (2,), "dilation": (3,)},
    {"sizes": (7, 6), "kernel": (3, 3), "padding": (1, 1), "dilation": (1, 1)},
    {"sizes": (9, 13), "kernel": (3, 5), "padding": (2, 0), "dilation": (1, 2)},
    {"sizes": (12, 8), "kernel": (4, 2), "padding": (0, 3), "dilation": (2, 1)},
    {"sizes": (4, 5, 6), "kernel": (2, 3, 3), "padding": (1, 0, 2), "dilation": (1, 2, 1)},
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_weight_gradients_equal_autograd(case: dict[str, Any], batch: int, bench: Any, generator: torch.Generator) -> None:
    """Without a stride and on maps of some size these are shifted products; in PyTorch in float64, and on ONNX Runtime."""
    rank = len(case["sizes"])
    function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    options = {"padding": case["padding"], "dilation": case["dilation"], "groups": 6}
    x = torch.randn(batch, 6, *case["sizes"], generator=generator).double()
    w = torch.randn(6, 1, *case["kernel"], generator=generator).double()
    y, pullback = torch.func.vjp(lambda w: function(x, w, **options), w)
    g = torch.randn(y.shape, generator=generator).double()
    one = [1] * rank
    mask = (False, True, False)
    found = convolution_backward(g, x, w, None, one, case["padding"], case["dilation"], False, [0] * rank, 6, mask)[1]
    assert found is not None
    close(found, pullback(g)[0], EXACT, case)
    if rank < 3:

        def gradient(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
            return torch.func.vjp(lambda w: function(x, w, **options), w)[1](g)[0]

        graph = bench.check(gradient, x.float(), w.float(), g.float())
        assert aten.convolution.default not in {node.target for node in graph.operators}


def transposed_convolutions() -> list[dict[str, Any]]:
    """Strides, dilations, paddings, rests and groups of transposed convolutions in one and two dimensions, channels 4 -> 4 or 8."""
    found = []
    for kernel, stride, padding, dilation, rest, groups in itertools.product(
        [(1,), (3,), (4,), (1, 1), (3, 3), (2, 4)], (1, 2, 3), (0, 1), (1, 2), (0, 1), (1, 2, 4)
    ):
        if rest < max(stride, dilation) and all(dilation * (k - 1) + 1 >= 2 * padding for k in kernel):
            sizes = (5, 4)[: len(kernel)]
            options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": rest, "groups": groups}
            found.append({"sizes": sizes, "kernel": kernel, **options})
    return found


def transpose(case: dict[str, Any]) -> Any:
    function: Any = F.conv_transpose1d if len(case["kernel"]) == 1 else F.conv_transpose2d
    options = {k: case[k] for k in ("stride", "padding", "dilation", "output_padding", "groups")}
    return lambda x, w, b: function(x, w, b, **options)


@pytest.mark.parametrize("batch", [1, 3])
def test_transposed_convolution_equals_autograd(batch: int, generator: torch.Generator) -> None:
    """Gradients by both rules, and the forward pass as products."""
    cases = transposed_convolutions()
    assert len(cases) > 200
    for case in cases:
        rank, groups = len(case["kernel"]), case["groups"]
        shapes = (batch, 4, *case["sizes"]), (4, 8 // groups, *case["kernel"]), (8,)
        x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        y, pullback = torch.func.vjp(transpose(case), x, w, b)
        cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        options: Any = [[case[k]] * rank for k in ("stride", "padding", "dilation")]
        rest = [case["output_padding"]] * rank
        close(products.convolution(x, w, b, *options, True, rest, groups), y, EXACT, case)
        for rule in (convolution_backward, products.convolution_backward):
            found = rule(cotangent, x, w, [8], *options, True, rest, groups, [True] * 3)
            for name, got, want in zip(("input", "weight", "bias"), found, pullback(cotangent), strict=True):
                assert got is not None
                close(got, want, EXACT, (rule.__module__, name, batch, case))


def test_lowered_gradients_of_transposed_convolutions_on_onnx_runtime(bench: Any, generator: torch.Generator) -> None:
    """Every 11th combination, in one graph."""
    cases = transposed_convolutions()[::11]
    tensors = []
    for case in cases:
        x, w = (torch.randn(s, generator=generator) for s in ((2, 4, *case["sizes"]), (4, 8 // case["groups"], *case["kernel"])))
        tensors += [x, w, torch.randn(transpose(case)(x, w, None).shape, generator=generator)]

    def run(*arguments: Tensor) -> list[Tensor]:
        found = []
        for i, case in enumerate(cases):
            x, w, cotangent = arguments[3 * i : 3 * i + 3]
            y, pullback = torch.func.vjp(lambda a, b, c=case: transpose(c)(a, b, None), x, w)
            found += [y, *pullback(cotangent)]
        return found

    bench.check(run, *tensors, bar=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_lowered_convolution_gradients_on_onnx_runtime(batch: int, rank: int, bench: Any, tools: Any, generator: torch.Generator) -> None:
    """Many layers in one graph: every 7th combination, so that each value of each axis of the grid occurs."""
    cases = [c for c in convolutions() if len(c["kernel"]) == rank][batch :: 7 if rank == 2 else 4]
    tensors, counts = [], []
    for case in cases:
        x, w, b = operands(case, batch, generator, torch.float32)
        y = convolve(case)(x, w, b)
        tensors += [x, w, b, torch.randn(y.shape, generator=generator)]
        counts.append(4)

    def run(*arguments: Tensor) -> list[Tensor]:
        found = []
        for i, case in enumerate(cases):
            *inputs, cotangent = arguments[4 * i : 4 * i + 4]
            found += list(torch.func.vjp(convolve(case), *inputs)[1](cotangent))
        return found

    bench.check(run, *tensors, bar=1e-4)


POOLS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    {"kernel_size": 5, "stride": 2, "padding": 2, "ceil_mode": True},
]
MAXIMA = [*POOLS, {"kernel_size": 2, "dilation": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True}]
AVERAGES = [
    *POOLS,
    *({**p, "count_include_pad": False} for p in POOLS),
    {"kernel_size": 3, "stride": 2, "padding": 1, "divisor_override": 5},
    {"kernel_size": 1},
]
PLANES = [(1, 2, 7, 8), (2, 3, 8, 7), (2, 1, 6, 6)]


def images(shape: tuple[int, ...], kind: str, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return {"normal": x, "negative": -1 - x.abs(), "ties": x.round(), "equal": torch.full_like(x, -0.0)}[kind]


def pool_backward(pool: Any, case: dict[str, Any]) -> Any:
    def run(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y, pullback = torch.func.vjp(lambda t: pool(t, **case), x)
        return y, pullback(g)[0]

    return run


@pytest.mark.parametrize("case", MAXIMA, ids=str)
def test_max_pool_and_its_gradient(case: dict[str, Any], bench: Any, generator: torch.Generator) -> None:
    """Overlapping windows, padding, dilation, ties and all-negative inputs; at a tie the first maximum takes the gradient."""
    for shape, kind in zip(PLANES * 2, ("normal", "negative", "ties", "equal", "negative", "ties"), strict=True):
        x = images(shape, kind, generator)
        y = F.max_pool2d(x, **case)
        bench.check(pool_backward(F.max_pool2d, case), x, torch.randn(y.shape, generator=generator))


@pytest.mark.parametrize("case", AVERAGES, ids=str)
def test_average_pool_and_its_gradient(case: dict[str, Any], bench: Any, generator: torch.Generator) -> None:
    run = pool_backward(F.avg_pool2d, case)
    for shape in PLANES:
        x = images(shape, "normal", generator, torch.float64)
        g = torch.randn(F.avg_pool2d(x, **case).shape, generator=generator, dtype=x.dtype)
        y, gradient = run(x, g)
        kernel, stride, padding = (case.get(k, d) for k, d in (("kernel_size", 0), ("stride", ()), ("padding", 0)))
        full: Any = [[v] if isinstance(v, int) else list(v) for v in (kernel, stride, padding)]
        flags = [case.get("ceil_mode", False), case.get("count_include_pad", True), case.get("divisor_override")]
        forward = pooling.avg_pool2d(x, *full, *flags)
        if forward is not NotImplemented:
            close(forward, y, EXACT, case)
        close(pooling.avg_pool2d_backward(g, x, *full, *flags), gradient, EXACT, case)
    bench.check(run, x.float(), g.float())


@pytest.mark.parametrize(
    "layer",
    [lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, (1, 1)), lambda x: x.mean((2, 3)), lambda x: x.mean(-1)],
    ids=["adaptive", "pair", "mean", "last"],
)
def test_global_pooling(layer: Any, bench: Any, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 5, 7, generator=generator)
    bench.check(pool_backward(lambda t: layer(t), {}), x, torch.randn(layer(x).shape, generator=generator))


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clip": lambda x: F.hardtanh(x, -0.3, 0.4),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax last": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "log_softmax first": lambda x: F.log_softmax(x, 0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
EDGES = [-0.0, 0.0, 6.0, -6.0, 1.0, -1.0, 1e-30, -1e-30, 50.0, -50.0, 5.9999995, 6.0000005]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients(name: str, bench: Any, generator: torch.Generator) -> None:
    layer = ACTIVATIONS[name]
    x = torch.cat([torch.tensor([EDGES] * 3), torch.randn(3, 12, generator=generator) * 4], 1)
    for g in (torch.randn(x.shape, generator=generator), torch.zeros(x.shape), torch.full(x.shape, -0.0)):
        graph = bench.check(pool_backward(layer, {}), x, g)
    assert not {n.target for n in graph.operators} & {
        aten.threshold_backward.default, aten.hardtanh_backward.default, aten._softmax_backward_data.default,
        aten._log_softmax_backward_data.default, aten.sigmoid_backward.default, aten.tanh_backward.default,
    }  # fmt: skip


def test_elementwise_rules_equal_the_operators_in_float64(generator: torch.Generator) -> None:
    x = torch.cat([torch.tensor([EDGES] * 3), torch.randn(3, 12, generator=generator) * 4], 1).double()
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    pairs: list[tuple[Any, Any, tuple[Any, ...]]] = [
        (elementwise.threshold_backward, aten.threshold_backward, (x, 0.0)),
        (elementwise.threshold_backward, aten.threshold_backward, (x, 1.0)),
        (elementwise.hardtanh_backward, aten.hardtanh_backward, (x, 0.0, 6.0)),
        (elementwise.log_softmax_backward, aten._log_softmax_backward_data, (x.log_softmax(1), 1, torch.float64)),
        (elementwise.softmax_backward, aten._softmax_backward_data, (x.softmax(0), 0, torch.float64)),
        (elementwise.sigmoid_backward, aten.sigmoid_backward, (x.sigmoid(),)),
        (elementwise.tanh_backward, aten.tanh_backward, (x.tanh(),)),
    ]
    for rule, operator, arguments in pairs:
        close(rule(g, *arguments), operator(g, *arguments), EXACT, rule.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limits", [(0.0, 6.0), (-1.0, 1.0), (1.0, 1.0), (1.0, 1.5), (-1e30, 1e30), (0.0, math.inf), (-math.inf, 1.0)])
def test_masks_by_clips_are_those_of_comparisons(limits: tuple[float, float], dtype: torch.dtype, generator: torch.Generator) -> None:
    tiny = torch.finfo(torch.float32).tiny
    edges = [*limits, tiny, -tiny, 3e38, -3e38, math.inf, -math.inf]
    nearest = [float(torch.nextafter(torch.tensor(v), torch.tensor(to))) for v in (*limits, 1.0) for to in (-math.inf, math.inf) if v]
    x = torch.cat([torch.tensor([*EDGES, *edges, *nearest]), torch.randn(64, generator=generator) * 4]).to(dtype)
    g = torch.randn(x.shape, generator=generator, dtype=dtype)
    for threshold in (0.0, limits[0]):
        if math.isfinite(threshold):
            assert torch.equal(elementwise.threshold_backward_by_clip(g, x, threshold), aten.threshold_backward(g, x, threshold))
    low, high = limits
    want = torch.where((x > low) & (x < high), g, 0.0)
    assert torch.equal(elementwise.hardtanh_backward_by_clip(g, x, low, high), want)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_bias_that_changes_leaves_a_frozen_kernel(dims: int, bench: Any, generator: torch.Generator) -> None:
    """XNNPACK packs both or none."""
    kernel = torch.randn(4, 3, *[3] * dims, generator=generator)
    conv = {1: F.conv1d, 2: F.conv2d}[dims]
    x, bias = torch.randn(2, 3, *[7] * dims, generator=generator), torch.randn(4, generator=generator)
    graph = lower(canonicalise(bench.trace(lambda x, b: conv(x, kernel, b, padding=1), x, bias)), "executorch")
    [node] = [n for n in graph.operators if n.target is aten.convolution.default]
    assert node.args[2] is None
    close(graph.run(x, bias)[0], conv(x, kernel, bias, padding=1), 1e-6, dims)


@pytest.mark.parametrize("wide", ["x", "other", "both"])
def test_a_choice_of_rows_for_executorch_copies_them(wide: str, bench: Any, generator: torch.Generator) -> None:
    """What is not chosen may be anything, not a number among it."""
    shapes = [(3 if wide in (name, "both") else 1, 8, 16) for name in ("x", "other")]
    x, other = (torch.randn(shape, generator=generator) for shape in shapes)
    chosen = torch.tensor([True, False, True]).reshape(3, 1, 1)
    if wide != "other":
        x[1] = math.nan
    graph = lower(canonicalise(bench.trace(torch.where, chosen, x, other)), "executorch")
    assert all(shape_of(n) == (3,) for n in graph.operators if n.target is aten.where.self)
    assert torch.equal(graph.run(chosen, x, other)[0], torch.where(chosen, x, other))


def test_a_choice_by_one_flag_keeps_its_shape_on_executorch(bench: Any, generator: torch.Generator) -> None:
    for shape, flag in (((5, 64), (1, 1)), ((), ()), ((1, 64), (1, 1)), ((4, 64), (4, 1))):
        x, other = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        for value in (True, False):
            chosen = torch.full(flag, value)
            graph = lower(canonicalise(bench.trace(torch.where, chosen, x, other)), "executorch")
            assert torch.equal(graph.run(chosen, x, other)[0], torch.where(chosen, x, other))


def test_sums_of_whole_numbers_are_exact_on_executorch(bench: Any) -> None:
    """A method may compare them; the mean times the number of terms is not exact for 41 terms."""
    for size in (16, 41, 47, 55, 61, 82, 256):
        x = torch.zeros(8, size)
        x[:, 0] = x[:, -1] = 1.0
        graph = lower(canonicalise(bench.trace(lambda t: t.sum(1), x)), "executorch")
        assert torch.equal(graph.run(x)[0], torch.full((8,), 2.0))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 3, 6), (2, 3)], ids=str)
def test_batch_norm_in_eval_mode(affine: bool, shape: tuple[int, ...], bench: Any, generator: torch.Generator) -> None:
    """Value, input gradient and the gradients of trained weight and bias."""
    x, mean, g = (torch.randn(s, generator=generator) for s in (shape, 3, shape))
    variance = torch.rand(3, generator=generator) + 0.3
    vectors = [torch.randn(3, generator=generator), torch.randn(3, generator=generator)] if affine else []

    def layer(t: Tensor, *wb: Tensor) -> Tensor:
        return F.batch_norm(t, mean, variance, *(wb or (None, None)), training=False, eps=1e-3)

    def run(t: Tensor, cotangent: Tensor, *wb: Tensor) -> list[Tensor]:
        y, pullback = torch.func.vjp(layer, t, *wb)
        return [y, *pullback(cotangent)]

    bench.check(run, x, g, *vectors)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_cross_entropy_equals_torch_at_any_batch_size(batch: int, bench: Any, generator: torch.Generator) -> None:
    """The loss of each row and its gradient; and with masked classes, those of the remaining ones alone."""
    scores = torch.randn(batch, 6, generator=generator) * 3
    target = torch.randint(0, 4, (batch,), generator=generator)
    weights = torch.rand(batch, generator=generator)
    for allowed in (torch.ones(6, dtype=torch.bool), torch.tensor([True] * 4 + [False] * 2)):

        def written_out(s: Tensor, t: Tensor, w: Tensor, mask: Tensor = allowed) -> tuple[Tensor, Tensor]:
            loss, pullback = torch.func.vjp(lambda v: (cross_entropy(v, t, mask) * w).sum(), s)
            return loss, pullback(torch.ones_like(loss))[0]

        wide = scores.double().requires_grad_(True)
        reference = (F.cross_entropy(wide[:, allowed], target, reduction="none") * weights.double()).sum()
        (gradient,) = torch.autograd.grad(reference, wide)
        loss, got = written_out(scores.double(), target, weights.double())
        close(loss, reference.detach(), EXACT, "loss")
        close(got, gradient, EXACT, "gradient")
        bench.check(written_out, scores, target, weights)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_convolution_as_products_equals_autograd(batch: int, generator: torch.Generator) -> None:
    for case in convolutions():
        x, w, b = operands(case, batch, generator, torch.float64)
        y, pullback = torch.func.vjp(convolve(case), x, w, b)
        cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        rank = len(case["kernel"])
        rest: Any = (*([case[k]] * rank for k in ("stride", "padding", "dilation")), False, [0] * rank, case["groups"])
        close(products.convolution(x, w, b, *rest), y, EXACT, ("output", batch, case))
        close(products.convolution(x, w, None, *rest), y - b.reshape(1, -1, *[1] * rank), EXACT, ("no bias", batch, case))
        found = products.convolution_backward(cotangent, x, w, [8], *rest, [True] * 3)
        for name, got, want in zip(("input", "weight", "bias"), found, pullback(cotangent), strict=True):
            assert got is not None
            close(got, want, EXACT, (name, batch, case))


def test_convolution_as_products_is_written_for_changing_kernels_only(bench: Any, generator: torch.Generator) -> None:
    x, w = torch.randn(2, 4, 6, 6, generator=generator), torch.randn(8, 4, 3, 3, generator=generator)
    changing = lower(canonicalise(bench.trace(lambda a, b: F.conv2d(a, b), x, w)), "executorch")
    frozen = lower(canonicalise(bench.trace(lambda a: F.conv2d(a, w), x)), "executorch")
    kinds = [{n.target for n in graph.operators} for graph in (changing, frozen)]
    assert aten.bmm.default in kinds[0] and aten.convolution.default not in kinds[0]
    assert kinds[1] == {aten.convolution.default}
    torch.testing.assert_close(changing.run(x, w)[0], F.conv2d(x, w), rtol=1e-5, atol=1e-5)
    assert cost.count(changing).total_macs == cost.count(frozen).total_macs == 2 * 8 * 4 * 4 * 4 * 9


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("inner", [1, 3])
def test_products_of_changing_matrices_equal_autograd(bench: Any, generator: torch.Generator, rows: int, inner: int) -> None:
    a, b, c = (torch.randn(s, generator=generator) for s in ((rows, inner), (inner, 4), (rows, 4)))

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return torch.mm(a, b), torch.addmm(c, a, b), torch.addmm(c, a, b, beta=0.5, alpha=2)

    graph = lower(canonicalise(bench.trace(function, a, b, c)), "executorch")
    for got, want in zip(graph.run(a, b, c), function(a, b, c), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_padding_that_crops_is_written_as_slices_for_executorch(bench: Any, generator: torch.Generator) -> None:
    """Its kernel refuses negative amounts, and only when it runs."""
    x = torch.randn(2, 3, 6, 7, generator=generator)
    for amounts in ([-1, -2], [1, -1, -2, 3], [0, 0, -1, 0], [2, 1, 0, 1], [-1, 0, 1, 1, -1, -1]):
        want = aten.constant_pad_nd(x, amounts, 0.5)
        graph = lower(canonicalise(bench.trace(lambda t, a=amounts: aten.constant_pad_nd(t, a, 0.5), x)), "executorch")
        assert torch.equal(graph.run(x)[0], want)
        assert all(min(n.args[1]) >= 0 for n in graph.operators if n.target is aten.constant_pad_nd.default)


def test_cropped_gradients_of_convolutions_have_no_negative_padding_on_executorch(bench: Any, generator: torch.Generator) -> None:
    x, w = torch.randn(1, 4, 7, 7, generator=generator), torch.randn(4, 4, 3, 3, generator=generator)
    g = torch.randn(1, 4, 4, 4, generator=generator)

    def run(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(lambda a, b: F.conv2d(a, b, stride=2, padding=1), x, w)[1](g)  # type: ignore[no-any-return]

    graph = lower(canonicalise(bench.trace(run, x, w, g)), "executorch")
    assert all(min(n.args[1]) >= 0 for n in graph.operators if n.target is aten.constant_pad_nd.default)
    for got, want in zip(graph.run(x, w, g), run(x, w, g), strict=True):
        close(got, want, 1e-5, "crop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (3, 300, 1, 7), (1, 2, 257, 12)])
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_sums_for_executorch_equal_the_operator(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], bench: Any, generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator, dtype=dtype)
    operator = {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim}[name]
    for dims, keepdim in itertools.product(([], [0], [1], [-1, 0], [0, 2, 3], [1, 2], [3, 2, 1, 0]), (False, True)):
        want = getattr(x.double(), name)(dims, keepdim).to(dtype)
        graph = lower(canonicalise(bench.trace(lambda t, d=dims, k=keepdim: operator(t, d, k), x)), "executorch")
        close(graph.run(x)[0], want, 1e-6 if dtype == torch.float32 else 1e-14, (dims, keepdim))


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, -2), (0, 3)])
def test_a_product_with_an_addend_is_two_operators_on_executorch(beta: float, alpha: float, bench: Any, generator: torch.Generator) -> None:
    added, left, right = (torch.randn(*shape, generator=generator) for shape in ((4, 1), (2, 4, 3), (2, 3, 5)))
    graph = lower(
        canonicalise(bench.trace(lambda c, a, b: torch.baddbmm(c, a, b, beta=beta, alpha=alpha), added, left, right)), "executorch"
    )
    assert not any(n.target is aten.baddbmm.default for n in graph.operators)
    used = [value for value in (added, left, right) if beta or value is not added]
    close(graph.run(*used)[0], beta * added + alpha * (left @ right), 1e-6, (beta, alpha))


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_sums_of_an_integer_or_a_truth_value_are_of_pytorchs_type(engine: str, bench: Any) -> None:
    for x in (torch.tensor(True), torch.tensor(7, dtype=torch.int32), torch.tensor(7)):
        [found] = lower(canonicalise(bench.trace(lambda x: x.sum([]) + 0, x)), engine).run(x)
        assert found.dtype == torch.int64 and torch.equal(found, x.sum([]))


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_sums_of_a_number_over_its_axes_are_the_number(engine: str, bench: Any) -> None:
    x = torch.tensor(3.5)
    graph = lower(canonicalise(bench.trace(lambda t: (t.sum(0), t.mean(0, keepdim=True), t.sum(())), x)), engine)
    assert [value.item() for value in graph.run(x)] == [3.5] * 3
    assert not any(n.target in (aten.sum.dim_IntList, aten.mean.dim) for n in graph.operators)


def test_no_sum_for_executorch_has_many_terms(bench: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (10_000, 10_006, 10_007, 257):  # the second is twice a prime, the third is one
        prime = torch.rand(3, size, generator=generator)
        for function in (lambda t: t.sum(1), lambda t: t.mean(1), lambda t: t.sum()):
            graph = lower(canonicalise(bench.trace(function, prime)), "executorch")
            added = [n for n in graph.operators if n.target in (aten.sum.dim_IntList, aten.mean.dim)]
            terms = [math.prod(shape_of(n.args[0])[axis] for axis in n.args[1]) for n in added]
            assert terms and max(terms) <= 256, (size, terms)
            close(graph.run(prime)[0].double(), function(prime.double()), 3e-7, size)
    x = torch.ones(1, 65, 192)
    for function in (lambda t: t.sum(), lambda t: t.reshape(1, -1).sum(1), lambda t: t.sum((1, 2), keepdim=True), lambda t: t.mean((1, 2))):
        graph = lower(canonicalise(bench.trace(function, x)), "executorch")
        sums = [n for n in graph.operators if n.target in (aten.sum.dim_IntList, aten.mean.dim)]
        assert len(sums) > 1
        assert all(n.args[0].meta["val"].numel() <= 256 * n.meta["val"].numel() for n in sums)


VIEWS: dict[str, Any] = {
    "unsqueeze": lambda x: [x.unsqueeze(d) for d in range(-4, 4)],
    "squeeze": lambda x: [x[:, :1].squeeze(1), x[:, :1].squeeze(-2), x[:, :1].squeeze(0), x[:1, :1].squeeze((0, 1)), x.squeeze((0, -1))],
    "squeeze a number": lambda x: [x.sum().squeeze(0), x.sum().squeeze((0,))],
    "select": lambda x: [x.select(d, i) for d in range(-3, 3) for i in (0, 1, -1)],
    "transpose": lambda x: [x.transpose(a, b) for a in range(-3, 3) for b in range(-3, 3)],
    "t": lambda x: [x[0].t(), x[0, 0].t(), x.sum().t()],
    "rsub": lambda x: [1.5 - x, 2 - x, torch.rsub(x, 2.0, alpha=3.0), 1.5 - x.double(), 2 - x.to(torch.int64)],
    "clamp_min": lambda x: [x.clamp_min(0.25), x.to(torch.int64).clamp_min(0)],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_for_executorch_equal_the_operators(name: str, bench: Any, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 4, generator=generator) * 2.0

    def function(t: Tensor) -> list[Tensor]:
        return [y * 1 for y in VIEWS[name](t)]

    graph = lower(canonicalise(bench.trace(function, x)), "executorch")
    for got, want in zip(graph.run(x), function(x), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(got, want)


def test_no_view_is_left_that_xnnpack_does_not_take(bench: Any, generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 4, generator=generator)
    left = {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.t.default, aten.transpose.int}
    for function in VIEWS.values():
        graph = lower(
            canonicalise(bench.trace(lambda t, f=function: [y * 1.5 for y in f(t) if y.dim() > 1 and y.is_floating_point()], x)),
            "executorch",
        )
        assert not left & {node.target for node in graph.operators}
