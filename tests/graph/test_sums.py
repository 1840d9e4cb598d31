"""Sums of many small terms are computed at once, with the values that autograd gives."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgecl.graph.lowering import canonicalise
from edgecl.graph.memory import peak_bytes
from edgecl.graph.passes import Clean, FoldConstants, JoinSums
from edgecl.graph.step import StepGraph, shape_of

aten = torch.ops.aten


def joined(bench: Any, tools: Any, function: Any, *tensors: Tensor) -> StepGraph:
    """The graph of a function behind the pass, its values checked."""
    graph = Clean()(JoinSums()(canonicalise(bench.trace(function, *tensors))))
    for got, want in zip(graph.run(*tensors), tools.results(function(*tensors)), strict=True):
        tools.assert_close(got, want.detach(), 1e-5)
    return graph


def count(graph: StepGraph, *kinds: Any) -> int:
    return sum(node.target in kinds for node in graph.operators)


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def used_often(times: int) -> Any:
    """A layer applied to its own result again and again."""
    return lambda x, weight, bias: [x := torch.tanh(torch.nn.functional.linear(x, weight, bias)) for _ in range(times)][-1]


@pytest.mark.parametrize("times", [2, 7])
def test_the_gradients_of_a_layer_that_is_used_often_are_one_product_and_one_sum(times: int, bench: Any, tools: Any) -> None:
    tensors = draws((3, 16), (16, 16), (16,), (3, 16))
    graph = joined(bench, tools, tools.gradients(used_often(times), *tensors[:-1]), *tensors)
    products = [node for node in graph.operators if node.target is aten.mm.default]
    assert [shape_of(node) for node in products if shape_of(node) == (16, 16)] == [(16, 16)]
    assert count(graph, aten.sum.dim_IntList) == 1
    assert count(graph, aten.add.Tensor) == 0


def test_a_value_doubled_again_and_again_is_not_taken_apart(bench: Any) -> None:
    """It has a million terms."""

    def run(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x + x
        return x

    bench.check(run, torch.randn(3))


def test_two_transpositions_of_a_number_are_dropped(bench: Any) -> None:
    bench.check(lambda x: x.t().t() * 2.0, torch.tensor(1.5))


def test_products_whose_operands_are_larger_than_they_are_stay(bench: Any, tools: Any) -> None:
    tensors = draws((600, 8), (8, 8), (8,), (600, 8))
    graph = joined(bench, tools, tools.gradients(used_often(3), *tensors[:-1]), *tensors)
    assert sum(shape_of(node) == (8, 8) for node in graph.operators if node.target is aten.mm.default) == 3
    assert count(graph, aten.sum.dim_IntList) == 3


STAY: dict[str, Any] = {
    "read by another": lambda a, b, c, d: [(p := a @ b) + c @ d, p * 2.0],
    "scaled": lambda a, b, c, d: torch.add(a @ b, c @ d, alpha=2.0),
    "broadcast": lambda a, b, c, d: a @ b + (c @ d)[:1],
}


@pytest.mark.parametrize("name", STAY)
def test_products_that_are_no_terms_of_a_sum_stay(name: str, bench: Any, tools: Any) -> None:
    graph = joined(bench, tools, STAY[name], *draws((4, 3), (3, 4), (4, 3), (3, 4)))
    assert count(graph, aten.mm.default) == 2
    assert count(graph, aten.cat.default) == 0


def test_a_product_added_to_itself_counts_twice(bench: Any, tools: Any) -> None:
    joined(bench, tools, lambda a, b: (p := a @ b) + p, *draws((4, 3), (3, 4)))
    joined(bench, tools, lambda a, b: (p := a @ b + a) + p, *draws((4, 4), (4, 4)))


def test_columns_that_are_no_transposed_rows_are_joined_too(bench: Any, tools: Any) -> None:
    graph = joined(bench, tools, lambda a, b, c, d, e: a @ b + e + c @ d, *draws((4, 3), (3, 4), (4, 2), (2, 4), (4, 4)))
    assert (count(graph, aten.mm.default), count(graph, aten.add.Tensor)) == (1, 1)


def test_sums_over_other_dimensions_or_shapes_stay_apart(bench: Any, tools: Any) -> None:
    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return a.sum(0) + b.sum(1) + c.sum(0) + d.sum((0, 1))

    graph = joined(bench, tools, function, *draws((3, 5), (5, 2), (4, 5), (2, 2, 5)))
    assert count(graph, aten.sum.dim_IntList) == 3


def test_gradients_of_slices_are_put_side_by_side(bench: Any, tools: Any) -> None:
    def function(x: Tensor) -> Tensor:
        first, second, third = x.split([2, 3, 4], 1)
        return first.exp().sum() + second.sin().sum() + third.tanh().sum()

    x, one = *draws((3, 9)), torch.tensor(1.0)
    graph = joined(bench, tools, tools.gradients(function, x), x, one)
    assert count(graph, aten.cat.default) == 1
    assert count(graph, aten.constant_pad_nd.default, aten.add.Tensor) == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slices_of_any_tensor(data: st.DataObject, bench: Any, tools: Any) -> None:
    """Apart, with gaps, overlapping, along several axes, indices among them."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    pieces: list[tuple[int, int, int]] = []
    for _ in range(data.draw(st.integers(1, 6))):
        axis = data.draw(st.integers(0, len(shape) - 1))
        start = data.draw(st.integers(0, shape[axis] - 1))
        pieces.append((axis, start, data.draw(st.integers(start, shape[axis]))))

    def function(x: Tensor) -> Tensor:
        total = x.sum() * 0.0
        for number, (axis, start, end) in enumerate(pieces):
            part = x.select(axis, start) if start == end else x.narrow(axis, start, end - start)
            total = total + (part * part).sum() * float(number + 1)
        return total

    x, one = *draws(shape), torch.tensor(1.0)
    joined(bench, tools, tools.gradients(function, x), x, one)


def test_padding_with_another_number_is_no_padding(bench: Any, tools: Any) -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.constant_pad_nd(a, [0, 2], 1.0) + torch.constant_pad_nd(b, [2, 0], 0.0)

    assert count(joined(bench, tools, function, *draws((3, 2), (3, 2))), aten.add.Tensor) == 1


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_has_its_weight_gradients_at_once(kind: Any, bench: Any, tools: Any) -> None:
    """Whatever its length: one product for each weight; and it needs less memory."""
    layer = kind(6, 5, batch_first=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]
        return found

    weights = [parameter.detach().clone() for parameter in layer.parameters()]
    for length in (4, 9):
        x, cotangent = draws((3, length, 6), (3, length, 5))
        run = tools.gradients(function, x, *weights)
        graph = joined(bench, tools, run, x, *weights, cotangent)
        shapes = [shape_of(node) for node in graph.operators if node.target is aten.mm.default]
        assert [shapes.count(tuple(weight.shape)) for weight in weights[:2]] == [1, 1]
        assert count(graph, aten.constant_pad_nd.default) == 0
        before = Clean()(FoldConstants()(canonicalise(bench.trace(run, x, *weights, cotangent))))
        assert peak_bytes(graph) < peak_bytes(before)


@pytest.mark.parametrize("function", [lambda x: x.t().t(), lambda x: x.transpose(0, 1).transpose(-1, -2), lambda x: x.t().transpose(1, 0)])
def test_a_transposition_of_the_same_transposition_is_dropped(function: Any, bench: Any) -> None:
    graph = Clean()(bench.trace(lambda x: function(x) * 2.0, torch.ones(2, 3)))
    assert [node.target for node in graph.operators] == [aten.mul.Tensor]


def test_another_transposition_stays(bench: Any) -> None:
    graph = Clean()(bench.trace(lambda x: x.transpose(0, 1).transpose(1, 2) * 2.0, torch.ones(2, 3, 4)))
    assert count(graph, aten.transpose.int) == 2
