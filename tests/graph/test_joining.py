"""Passes that leave fewer and smaller operators: scales in kernels, vectors joined, equal expressions once; values are autograd's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecl.graph.lowering import canonicalise
from edgecl.graph.passes import Clean, FoldConstants, MergeEqual, ScaleKernels
from edgecl.graph.step import StepGraph, shape_of

aten = torch.ops.aten
KINDS: dict[str, dict[str, Any]] = {
    "depthwise": {"out": 6, "kernel_size": 3, "padding": 1, "groups": 6},
    "strided": {"out": 6, "kernel_size": 3, "padding": 1, "groups": 6, "stride": 2},
    "pointwise": {"out": 5, "kernel_size": 1},
    "grouped": {"out": 4, "kernel_size": 3, "groups": 2},
    "biased": {"out": 6, "kernel_size": 3, "padding": 1, "groups": 6, "bias": True},
    "biased pointwise": {"out": 5, "kernel_size": 1, "bias": True},
}


def targets(graph: StepGraph) -> list[Any]:
    return [node.target for node in graph.operators]


def block(out: int, **options: Any) -> nn.Sequential:
    """Convolution, batch norm with statistics of its own, ReLU6, behind a layer that makes the convolution's input a result."""
    generator = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, out, **{"bias": False, **options}), nn.BatchNorm2d(out), nn.ReLU6()).eval()
    for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
        tensor.data = torch.rand(tensor.shape, generator=generator) + 0.3
    return net


def gradient_of(net: nn.Module, trained: list[str]) -> Any:
    """``(x, *parameters) -> gradients of the sum of squares with respect to the parameters``."""

    def function(x: Tensor, *values: Tensor) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            found: Tensor = torch.func.functional_call(net, parameters, (x,))
            return (found * found).sum()

        return list(torch.func.grad(loss)(dict(zip(trained, values, strict=True))).values())

    return function


def tensors_of(net: nn.Module, trained: list[str], size: int = 12) -> list[Tensor]:
    x = torch.randn(1, 6, size, size, generator=torch.Generator().manual_seed(3))
    return [x, *(net.get_parameter(name).detach() for name in trained)]


def maps(graph: StepGraph, target: Any) -> list[tuple[int, ...]]:
    """Shapes of the feature maps that an operator computes."""
    return [shape_of(n) for n in graph.operators if n.target is target and len(shape_of(n)) == 4 and shape_of(n)[0] == 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [["0.weight", "1.weight", "2.weight", "2.bias"], ["0.weight", "1.weight"]], ids=["norm too", "kernels"])
def test_scales_and_shifts_move_into_kernels_that_are_trained(kind: str, trained: list[str], bench: Any) -> None:
    net = block(**KINDS[kind])
    trained = [*trained, *(["1.bias"] if "bias" in KINDS[kind] else [])]
    function, tensors = gradient_of(net, trained), tensors_of(net, trained)
    graph = bench.check(function, *tensors, bar=2e-5)
    squares = 2  # of the loss: its product, and its gradient's
    assert len(maps(graph, aten.mul.Tensor)) <= squares + 1, "no product with a scale, nor with a gradient for the sum of one"
    scaled = [n for n in graph.operators if n.target is aten.convolution.default and n.args[2] is not None]
    assert len(scaled) == 2, "the first one has a bias, and the shift is one"


def test_a_kernel_larger_than_its_feature_map_keeps_the_scale_behind_it(bench: Any) -> None:
    net = block(out=40, kernel_size=3, padding=1)
    trained = ["1.weight", "2.weight"]
    graph = bench.check(gradient_of(net, trained), *tensors_of(net, trained, size=3), bar=2e-5)
    assert any(n.target is aten.mul.Tensor and shape_of(n) == (9, 40) for n in graph.operators), "of the map, which lies in rows"
    assert not any(n.target is aten.mul.Tensor and shape_of(n) == (40, 6, 3, 3) for n in graph.operators)


@pytest.mark.parametrize("trained", [["2.weight", "2.bias"], ["2.bias"]], ids=["scale and shift", "shift"])
def test_a_frozen_kernel_behind_a_trained_scale_stays(trained: list[str], bench: Any) -> None:
    net = block(**KINDS["depthwise"])
    graph = bench.check(gradient_of(net, trained), *tensors_of(net, trained), bar=2e-5)
    kernels = [n.args[1] for n in graph.operators if n.target is aten.convolution.default]
    assert all(kernel.op == "get_attr" for kernel in kernels), "frozen kernels are packed once"


def test_the_input_gradient_of_a_frozen_layer_takes_its_scale_into_the_kernel(bench: Any) -> None:
    net, trained = block(**KINDS["pointwise"]), ["0.weight"]
    graph = bench.check(gradient_of(net, trained), *tensors_of(net, trained), bar=2e-5)
    assert len(maps(graph, aten.mul.Tensor)) == 2, "that of the loss, and the mask of the rectifier"


def test_a_convolution_that_others_read_is_left(bench: Any) -> None:
    def function(x: Tensor, w: Tensor, s: Tensor) -> list[Tensor]:
        def loss(w: Tensor, s: Tensor) -> Tensor:
            y = F.conv2d(x, w)
            return (y * s.reshape(-1, 1, 1) + y).exp().sum() * 1e-3

        return list(torch.func.grad(loss, (0, 1))(w, s))

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) * 0.3 for shape in [(1, 3, 8, 8), (4, 3, 1, 1), (4,)]]
    graph = canonicalise(bench.trace(function, *tensors))
    before = targets(graph)
    assert targets(Clean()(ScaleKernels()(MergeEqual()(graph)))).count(aten.convolution.default) == before.count(aten.convolution.default)
    bench.check(function, *tensors, bar=2e-5)


def norms(count: int) -> Any:
    """``count`` scales and shifts as norms have them, and their updates."""
    generator = torch.Generator().manual_seed(4)
    inverses = [torch.rand(3 + i, generator=generator) + 0.5 for i in range(count)]

    def function(*tensors: Tensor) -> list[Tensor]:
        weights, biases, maps = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        found = []
        for weight, bias, inverse, x in zip(weights, biases, inverses, maps, strict=True):
            scale = weight * inverse
            y = (x * scale.reshape(-1, 1, 1) + (bias - 0.5 * scale).reshape(-1, 1, 1)).tanh()
            gradient = y.sum([0, 2, 3])
            found += [y, weight - gradient * inverse, bias - gradient]
        return found

    tensors = [torch.randn(3 + i, generator=generator) for i in range(count)] * 2
    return function, [*tensors, *(torch.randn(1, 3 + i, 4, 4, generator=generator) for i in range(count))]


def test_vectors_of_many_layers_are_computed_at_once(bench: Any) -> None:
    function, tensors = norms(6)
    plain = Clean()(FoldConstants()(Clean()(bench.trace(function, *tensors))))
    graph = bench.check(function, *tensors)
    small = {aten.mul.Tensor, aten.sub.Tensor, aten.reshape.default}
    before, after = (sum(n.target in small and len(shape_of(n)) < 4 for n in g.operators) for g in (plain, graph))
    assert (before, after) == (6 * 8, 8)
    assert targets(graph).count(aten.split_with_sizes.default) == 4


def test_few_vectors_are_left(bench: Any) -> None:
    function, tensors = norms(3)
    assert aten.split_with_sizes.default not in targets(bench.check(function, *tensors))


def test_vectors_that_depend_on_each_other_are_not_joined(bench: Any) -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = x + weight * x.mean()
        return x

    tensors = [torch.linspace(-1, 1, 5) + i for i in range(7)]
    assert aten.split_with_sizes.default not in targets(bench.check(function, *tensors))


def test_vectors_of_other_ranks_are_reshaped_apart(bench: Any) -> None:
    def function(*maps: Tensor) -> list[Tensor]:
        return [(x.sum([1, 2], keepdim=True) if i % 2 else x.sum([1, 2])).reshape(-1, 1).exp() for i, x in enumerate(maps)]

    bench.check(function, *(torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(8)))


def test_two_layers_of_vectors_with_maps_between_are_joined_level_by_level(bench: Any) -> None:
    def function(x: Tensor, *weights: Tensor) -> list[Tensor]:
        firsts = [(x * (w * 2.0).sum()).exp().mean(1) for w in weights]
        return [first * w for first, w in zip(firsts, weights, strict=True)]

    tensors = [torch.linspace(-0.1, 0.1, 20).reshape(4, 5), *(torch.linspace(-1, 1, 4) + i * 0.1 for i in range(5))]
    graph = bench.check(function, *tensors)
    assert targets(graph).count(aten.split_with_sizes.default) == 2


def test_equal_expressions_and_constants_are_one(bench: Any) -> None:
    table, other = torch.arange(6.0), torch.arange(6.0)

    def function(x: Tensor) -> list[Tensor]:
        return [(x * table).exp(), (x * other).exp() + 1.0, (x * other).exp() + 2.0, x.sum() * 0 + other]

    x = torch.linspace(-1, 1, 6)
    graph = Clean()(MergeEqual()(Clean()(FoldConstants()(Clean()(bench.trace(function, x))))))
    found = targets(graph)
    assert (found.count(aten.exp.default), found.count(aten.add.Tensor), len(graph.constants())) == (1, 3, 1)
    for got, want in zip(graph.run(x), function(x), strict=True):
        assert torch.equal(got, want)


def test_constants_of_equal_bytes_and_another_type_stay_two(bench: Any) -> None:
    numbers, floats = torch.zeros(2, dtype=torch.int32).long(), torch.zeros(2, dtype=torch.float64)

    def function(x: Tensor) -> list[Tensor]:
        return [x.long() + numbers, x.double() + floats]

    x = torch.ones(2)
    graph = Clean()(MergeEqual()(Clean()(FoldConstants()(Clean()(bench.trace(function, x))))))
    assert [t.dtype for t in graph.run(x)] == [torch.int64, torch.float64]


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-30, 3.0, 5.9999995, 6.0, 7.0])
def test_a_clip_passes_gradients_strictly_between_its_limits(value: float, bench: Any) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: F.relu6(t).sum())(x)

    x = torch.full((1, 3), value)
    assert bench.check(function, x, bar=0.0) is not None
