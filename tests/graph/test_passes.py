"""Passes: contracts, folding, cleaning and order; and random graphs keep their values through all of them."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgecl.graph.capture import capture, capture_encode
from edgecl.graph.lowering import canonicalise, lower
from edgecl.graph.memory import peak_bytes
from edgecl.graph.passes import Clean, FoldConstants, FoldConvolutionAffine, Pass, UpdateEarly
from edgecl.graph.phases import phase
from edgecl.graph.step import GraphError, StepGraph, shape_of
from edgecl_device.manifest import TensorSpec

aten = torch.ops.aten


def targets(graph: StepGraph) -> list[Any]:
    return [node.target for node in graph.operators]


class Nothing(Pass):
    """Changes nothing."""

    def rewrite(self, graph: StepGraph) -> StepGraph:
        return graph


class Promises(Nothing):
    ensures: ClassVar[frozenset[str]] = frozenset({"no-dead-code"})


class Demands(Nothing):
    requires: ClassVar[frozenset[str]] = frozenset({"constants-folded"})


class Breaks(Nothing):
    breaks: ClassVar[frozenset[str]] = frozenset({"no-dead-code"})


def test_a_pass_whose_requirement_is_missing_is_refused(bench: Any) -> None:
    graph = bench.trace(lambda x: x * 2.0, torch.ones(2))
    with pytest.raises(GraphError, match=r"pass Demands on step 'bench': requires \['constants-folded'\]"):
        Demands()(graph)
    Demands()(FoldConstants()(graph))


def test_a_pass_that_does_not_do_what_it_ensures_is_refused(bench: Any) -> None:
    graph = bench.trace(lambda x: (x.exp(), x * 2.0)[1], torch.ones(2))
    with pytest.raises(GraphError, match=r"pass Promises on step 'bench': no-dead-code does not hold at .*exp"):
        Promises()(graph)
    assert Promises()(Clean()(graph)).properties == {"no-dead-code"}


def test_properties_are_gained_and_lost(bench: Any) -> None:
    graph = Clean()(bench.trace(lambda x: x * 2.0, torch.ones(2)))
    assert graph.properties == {"no-dead-code"}
    assert Breaks()(graph).properties == frozenset()
    assert FoldConstants()(graph).properties == {"constants-folded"}
    with pytest.raises(GraphError, match=r"UpdateEarly.*no-dead-code"):
        UpdateEarly()(FoldConstants()(graph))


def test_expressions_of_constants_are_folded(bench: Any) -> None:
    table = torch.arange(6.0)
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))

    def function(t: Tensor) -> Tensor:
        return t * (table.exp().sum() + torch.arange(6)).sqrt() + torch.full((6,), 2.0) + torch.zeros_like(t) + torch.ones_like(t)

    graph = FoldConstants()(bench.trace(function, x))
    assert targets(Clean()(graph)) == [aten.mul.Tensor, aten.add.Tensor, aten.add.Tensor, aten.add.Tensor]
    torch.testing.assert_close(graph.run(x)[0], function(x))


def test_an_operator_of_constants_with_several_results_is_folded(bench: Any) -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    graph = FoldConstants()(bench.trace(lambda x: x * F.max_pool2d(image, 2), torch.ones(1, 1, 2, 2)))
    assert targets(Clean()(graph)) == [aten.mul.Tensor]
    assert graph.run(torch.ones(1, 1, 2, 2))[0].flatten().tolist() == [5.0, 7.0, 13.0, 15.0]


def convolution_and_norm(**options: Any) -> nn.Sequential:
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **options), nn.BatchNorm2d(6)).eval()
    for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
        tensor.data = torch.rand(tensor.shape, generator=generator) + 0.2
    return net


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2}, {"bias": False, "groups": 2, "stride": 2}], ids=str)
def test_frozen_batch_norm_is_folded_into_a_frozen_convolution(options: Any) -> None:
    net = convolution_and_norm(**options)
    graph = canonicalise(capture_encode(net, TensorSpec("x", (1, 4, 5, 5), "float32")))
    assert targets(graph) == [aten.convolution.default]
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(graph.run(x)[0], net(x), rtol=1e-5, atol=1e-5)


UNFOLDABLE: dict[str, tuple[Any, ...]] = {
    "used twice": (lambda x, w: (lambda y: y * 2.0 + y)(F.conv2d(x, torch.ones(2, 3, 1, 1))), (1, 3, 4, 4), (1,)),
    "trained kernel": (lambda x, w: F.conv2d(x, w) * 2.0, (1, 3, 4, 4), (2, 3, 1, 1)),
    "trained factor": (lambda x, w: F.conv2d(x, torch.ones(2, 3, 1, 1)) * w, (1, 3, 4, 4), (1, 2, 1, 1)),
    "varies over positions": (lambda x, w: F.conv2d(x, torch.ones(2, 3, 1, 1)) * torch.arange(4.0), (1, 3, 4, 4), (1,)),
    "widens the shape": (lambda x, w: F.conv2d(x, torch.ones(1, 3, 1, 1)) * torch.arange(2.0).reshape(2, 1, 1, 1), (1, 3, 4, 4), (1,)),
    "widens the rank": (lambda x, w: F.conv2d(x, torch.ones(2, 3, 1, 1)) * torch.full((1, 1, 1, 1, 1), 2.0), (1, 3, 4, 4), (1,)),
    "widens the type": (lambda x, w: F.conv2d(x, torch.ones(2, 3, 1, 1)) * torch.full((2, 1, 1), 0.1).double(), (1, 3, 4, 4), (1,)),
    "transposed": (lambda x, w: F.conv_transpose2d(x, torch.ones(3, 2, 1, 1)) * 2.0, (1, 3, 4, 4), (1,)),
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_cannot_be_folded_stays(name: str, bench: Any, tools: Any, generator: torch.Generator) -> None:
    function, *shapes = UNFOLDABLE[name]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    graph = canonicalise(bench.trace(function, *tensors))
    assert aten.mul.Tensor in targets(graph)
    tools.assert_close(
        graph.run(*(t for t, p in zip(tensors, ("a0", "a1"), strict=True) if p in {i.name for i in graph.inputs}))[0],
        function(*tensors),
        1e-6,
    )


def test_a_number_is_folded_in_the_precision_of_the_kernel(bench: Any) -> None:
    kernel = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    graph = canonicalise(bench.trace(lambda x: F.conv2d(x, kernel) * 0.1 + 0.7, torch.ones(1, 3, 2, 2, dtype=torch.float64)))
    assert targets(graph) == [aten.convolution.default]
    assert graph.run(torch.ones(1, 3, 2, 2, dtype=torch.float64))[0].flatten()[0].item() == pytest.approx(1.0, abs=1e-15)


def test_trained_batch_norm_is_not_folded(tools: Any) -> None:
    """Its weight is state; the convolution before it is trained too, or frozen."""
    for trainable in (("0.norm.*", "5.*"), ("0.*",)):
        graph = canonicalise(capture(tools.make_learner("finetune", trainable=trainable), "learn"))
        assert "param.0.norm.weight" in {p.name for p in graph.outputs}
        forward = [
            n for n in graph.operators if (n.meta.get("custom") or {}).get("module") == "0.norm" and n.meta["custom"]["phase"] == "forward"
        ]
        assert aten.mul.Tensor in {n.target for n in forward}


def test_clean_removes_what_does_nothing(bench: Any) -> None:
    def function(x: Tensor, unused: Tensor) -> Tensor:
        y = x.clone().reshape(3, 4).expand(3, 4).to(torch.float32) * 1.0
        return (y.reshape(12).reshape(2, 6).reshape(4, 3) / 1).contiguous().detach() + 1.0

    x = torch.arange(12.0).reshape(3, 4)
    graph = Clean()(bench.trace(function, x, torch.ones(2)))
    assert targets(graph) == [aten.reshape.default, aten.add.Tensor]
    assert [p.name for p in graph.inputs] == ["a0"]
    assert torch.equal(graph.run(x)[0], function(x, x))


def test_clean_keeps_what_changes_shape_or_type(bench: Any, tools: Any) -> None:
    def function(x: Tensor, n: Tensor) -> list[Tensor]:
        return [x.expand(2, 3), n * 1.0, x * torch.ones(4, 1), n.to(torch.float32)]

    tensors = (torch.ones(1, 3), torch.arange(3))
    for got, want in zip(Clean()(bench.trace(function, *tensors)).run(*tensors), function(*tensors), strict=True):
        tools.assert_close(got, want, 0.0)


OPTIMISERS: list[dict[str, Any]] = [
    {},
    {"optimizer": "momentum"},
    {"optimizer": "adam"},
    {"weight_decay": 0.1},
    {"optimizer": "adam", "weight_decay": 0.1},
]


@pytest.mark.parametrize("config", OPTIMISERS, ids=str)
def test_early_updates_keep_the_values_and_do_not_raise_the_peak(config: Any, tools: Any, generator: torch.Generator) -> None:
    learner = tools.make_learner("finetune", **config)
    plain = canonicalise(capture(learner, "learn"))
    values = {**tools.random_state(learner, generator), **tools.random_inputs(plain, generator)}
    arguments = [values[p.name] for p in plain.inputs]
    want, before, names = plain.run(*arguments), peak_bytes(plain), {n.name for n in plain.nodes}
    early = UpdateEarly()(plain)
    assert {n.name for n in early.nodes} == names
    early.module.graph.lint()
    for got, reference in zip(early.run(*arguments), want, strict=True):
        assert torch.equal(got, reference)
    assert peak_bytes(early) <= before


def chain(bench: Any, decay: bool) -> StepGraph:
    """Three gradients, each of which is used only by its own update; all updates come last."""

    def function(p: Tensor, q: Tensor, r: Tensor, x: Tensor) -> list[Tensor]:
        with phase("backward"):
            g = x.exp()
            h = (g * 2.0).exp()
            i = (h * 3.0).exp()
        with phase("update"):
            kept = [t * 0.9 if decay else t for t in (p, q, r)]
            return [t - v.sqrt() for t, v in zip(kept, (g, h, i), strict=True)]

    return Clean()(bench.trace(function, *[torch.ones(1000)] * 4))


@pytest.mark.parametrize("decay", [False, True])
def test_an_update_runs_as_soon_as_its_gradient_exists(decay: bool, bench: Any) -> None:
    graph = chain(bench, decay)
    before = peak_bytes(graph)
    early = UpdateEarly()(graph)
    order = [n.name for n in early.operators]
    assert order.index("sub") < order.index("exp_1") < order.index("sub_1") < order.index("exp_2") < order.index("sub_2")
    if decay:  # a decayed weight waits for its gradient
        assert order.index("exp") < order.index("mul_2") < order.index("exp_1") < order.index("mul_3")
    assert peak_bytes(early) < before


def test_a_long_chain_of_updates_is_ordered(bench: Any) -> None:
    def function(x: Tensor) -> Tensor:
        with phase("update"):
            for _ in range(1500):
                x = x + 1.0
        return x

    graph = UpdateEarly()(Clean()(bench.trace(function, torch.zeros(2))))
    assert graph.run(torch.zeros(2))[0].tolist() == [1500.0, 1500.0]


def test_the_old_order_stays_where_the_new_one_needs_more(bench: Any) -> None:
    def function(p: Tensor, x: Tensor) -> list[Tensor]:
        with phase("backward"):
            g = x.sum(0)  # small
            h = (x * 2.0).exp().sum()
        with phase("update"):
            wide = g.unsqueeze(0) * p  # large, and needed only at the end
            return [wide.exp().sum() + h, g.sum()]

    graph = Clean()(bench.trace(function, torch.ones(500, 8), torch.ones(500, 8)))
    names, before = [n.name for n in graph.nodes], peak_bytes(graph)
    early = UpdateEarly()(graph)
    assert peak_bytes(early) <= before
    assert sorted(n.name for n in early.nodes) == sorted(names)


UNARY = {
    "neg": lambda a: -a,
    "exp": lambda a: (a * 0.1).exp(),
    "relu": F.relu,
    "tanh": torch.tanh,
    "scale": lambda a: a * 1.5,
    "one": lambda a: a * 1.0,
    "transpose": lambda a: a.t().reshape(3, 4),
    "flat": lambda a: a.reshape(-1).reshape(4, 3).reshape(3, 4),
    "copy": lambda a: a.clone(),
    "softmax": lambda a: a.softmax(1),
    "centre": lambda a: a - a.mean(1, keepdim=True),
    "total": lambda a: a * 0.01 + a.sum() * 0.01,
    "constant": lambda a: a + torch.arange(12.0).reshape(3, 4).sqrt(),
    "like": lambda a: a + torch.ones_like(a),
    "clip": lambda a: a.clamp(-2, 2),
    "shift": lambda a: torch.cat([a[:, 1:], a[:, :1]], 1),
    "flip": lambda a: a.flip(0),
    "positive": lambda a: torch.where(a > 0, a, 0.5),
    "gradient": lambda a: torch.func.grad(lambda t: (F.relu6(t).log_softmax(1) * torch.arange(4.0)).sum())(a),
}
BINARY = {
    "add": torch.add,
    "mul": lambda a, b: a * b * 0.1,
    "sub": torch.sub,
    "max": torch.maximum,
    "product": lambda a, b: (a @ b.t()) @ b * 0.01,
    "choose": lambda a, b: torch.where(a > b, a, b * 0.5),
}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_graphs_keep_their_values(data: st.DataObject, bench: Any, tools: Any) -> None:
    """A random program of twelve operators on two inputs, through all passes, in PyTorch and on ONNX Runtime."""
    program = [
        (data.draw(st.sampled_from(sorted(UNARY) + sorted(BINARY))), data.draw(st.integers(0, 99)), data.draw(st.integers(0, 99)))
        for _ in range(12)
    ]
    kept = data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=4))

    def function(*inputs: Tensor) -> list[Tensor]:
        values = list(inputs)
        for i, (name, left, right) in enumerate(program):
            with phase("update" if i % 3 == 0 else "backward"):
                a, b = values[left % len(values)], values[right % len(values)]
                values.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
        return [values[k] for k in kept]

    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    inputs = [torch.randn(3, 4, generator=generator) for _ in range(2)]
    want = function(*inputs)
    captured = bench.trace(function, *inputs)
    named = {"a0": inputs[0], "a1": inputs[1]}
    graph = lower(canonicalise(captured))
    again = UpdateEarly()(Clean()(replace(graph)))
    for form in (graph, again):
        for got, reference in zip(form.run(*(named[p.name] for p in form.inputs)), want, strict=True):
            tools.assert_close(got, reference, 1e-4)
    for got, reference in zip(bench.onnx(graph, named), want, strict=True):
        tools.assert_close(got, reference, 1e-4)


def test_passes_need_no_convolution() -> None:
    graph = capture_encode(nn.Flatten(), TensorSpec("x", (1, 2, 3), "float32"))
    assert targets(FoldConvolutionAffine()(FoldConstants()(Clean()(graph)))) == [aten.reshape.default]


@pytest.mark.parametrize("rectify", [torch.relu, F.hardtanh, torch.sigmoid])
def test_what_follows_a_join_of_channels_goes_into_its_parts(bench: Any, tools: Any, generator: torch.Generator, rectify: Any) -> None:
    frozen, behind = torch.randn(3, 4, 3, 3, generator=generator), torch.randn(2, 5, 3, 3, generator=generator)
    scale, shift = torch.rand(5, 1, 1, generator=generator) + 0.5, torch.randn(5, 1, 1, generator=generator)
    scale_behind = torch.rand(2, 1, 1, generator=generator) + 0.5

    def layers(x: Tensor, trained: Tensor) -> Tensor:
        joined = torch.cat([F.conv2d(x, trained, padding=1), F.conv2d(x, frozen, padding=1)], 1)
        return F.conv2d(rectify(joined * scale + shift), behind) * scale_behind

    x, trained = torch.randn(1, 4, 6, 6, generator=generator), torch.randn(2, 4, 3, 3, generator=generator)
    cotangent = torch.randn(1, 2, 4, 4, generator=generator)
    bench.check(layers, x, trained)
    bench.check(tools.gradients(layers, x, trained), x, trained, cotangent)
    for function, values in ((layers, (x, trained)), (tools.gradients(layers, x, trained), (x, trained, cotangent))):
        graph = canonicalise(bench.trace(function, *values))
        scaled = [shape_of(n) for n in graph.operators if n.target is aten.mul.Tensor and n.args[1].op == "get_attr"]  # type: ignore[union-attr]
        assert set(scaled) == {(1, 2, 6, 6)}, "frozen kernels took their share of the scale, on the way back, too"
    parts = [n.target for n in canonicalise(bench.trace(layers, x, trained)).operators]
    assert parts.count(aten.relu.default) == (2 if rectify is torch.relu else 0)
