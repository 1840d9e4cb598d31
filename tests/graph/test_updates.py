"""Passes around an update: sums of copies, products that are added, checks that need not read a weight, masks that wait as bits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecl.graph.capture import trace
from edgecl.graph.lowering import canonicalise, lower
from edgecl.graph.memory import lifetimes, peak_bytes
from edgecl.graph.passes import AddProducts, Clean, NarrowEarly, ProveFinite, SinkExpand, WidenLate
from edgecl.graph.step import StepGraph, shape_of, value_of
from edgecl_device.manifest import TensorSpec

aten = torch.ops.aten


def targets(graph: StepGraph) -> list[Any]:
    return [node.target for node in graph.operators]


def learned(change: Any, shape: tuple[int, ...], *inputs: tuple[int, ...]) -> StepGraph:
    """A step whose new weight is the old one less ``change(*inputs)``, and which checks its sum."""

    def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        new = change(state["w"], *(data[f"a{i}"] for i in range(len(inputs))))
        total = new.sum()
        return {"finite": total - total == 0}, {"w": new}

    specs = {f"a{i}": TensorSpec(f"a{i}", s, "float32") for i, s in enumerate(inputs)}
    return canonicalise(trace("bench", run, {"w": torch.zeros(shape)}, specs, ()))


def outcome(graph: StepGraph, values: dict[str, Tensor]) -> dict[str, Tensor]:
    found = graph.run(*(values[port.name] for port in graph.inputs))
    return {port.name: value for port, value in zip(graph.outputs, found, strict=True)}


CHANGES: dict[str, tuple[Any, tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "product": (lambda w, a, b: w - a.t() @ b, (40, 30), ((2, 40), (2, 30))),
    "convolution": (
        lambda w, g, x: w - torch.func.vjp(lambda w: F.conv2d(x, w), w)[1](g)[0], (20, 30, 3, 3), ((1, 20, 2, 2), (1, 30, 4, 4)),
    ),
    "in rows": (
        lambda w, g, x: w - torch.func.vjp(lambda w: F.conv2d(x, w), w)[1](g)[0], (40, 30, 1, 1), ((1, 40, 2, 1), (1, 30, 2, 1)),
    ),
    "scaled kernel": (
        lambda w, g, x: w - torch.func.vjp(lambda w: F.conv2d(x, w) * 2.0, w)[1](g)[0], (20, 30, 3, 3), ((1, 20, 1, 1), (1, 30, 3, 3)),
    ),
    "added": (lambda w, a, b: torch.addmm(w, a.t(), b, alpha=-1), (40, 30), ((2, 40), (2, 30))),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_check_that_does_not_read_the_weight_lets_no_other_value_pass(name: str, engine: str, generator: torch.Generator) -> None:
    """Factors of every size, infinities and NaN among them: what the check lets pass is finite, and what is of a usual size passes."""
    change, shape, inputs = CHANGES[name]
    graph = lower(learned(change, shape, *inputs), engine)
    whole = [n for n in graph.operators if n.target is aten.sum.default and value_of(n.args[0]).numel() >= math.prod(shape)]
    assert not whole, "the new weight is read by no check"
    passed = 0
    for largest in (1e-30, 1.0, 1e10, 1e15, 3e18, 2e19, 3e38):
        for spoil in (None, math.inf, -math.inf, math.nan):
            values = {f"a{i}": torch.randn(s, generator=generator) * largest for i, s in enumerate(inputs)}
            values["w"] = torch.randn(shape, generator=generator).sign() * (3.4e38 if largest > 1e10 else 1.0)
            if spoil is not None:
                values["a1"].view(-1)[7] = spoil
            found = outcome(graph, values)
            assert not found["finite"] or bool(found["w"].isfinite().all()), (largest, spoil)
            assert bool(found["finite"]) if spoil is None and largest <= 1e10 else True
            passed += bool(found["finite"])
    assert passed >= 3


def test_weights_that_are_not_much_larger_than_their_factors_are_summed() -> None:
    small = learned(lambda w, a, b: w - a.t() @ b, (4, 3), (2, 4), (2, 3))
    assert targets(ProveFinite()(small)) == targets(small)


@pytest.mark.parametrize(
    "change",
    [lambda w, a, b: w * 0.9 - a.t() @ b, lambda w, a, b: w - (a.t() @ b).exp(), lambda w, a, b: torch.addmm(w, a.t(), b, alpha=3.0)],
    ids=["decayed", "another function", "a larger factor"],
)
def test_changes_that_the_bound_does_not_hold_for_are_summed(change: Any) -> None:
    graph = learned(change, (40, 30), (2, 40), (2, 30))
    assert targets(ProveFinite()(graph)) == targets(graph)


def test_a_product_is_subtracted_within_it(bench: Any, generator: torch.Generator) -> None:
    def run(w: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        return [w - (a @ b).reshape(w.shape), (a @ b).sum(), w.sum()]

    w, a, b = (torch.randn(s, generator=generator) for s in ((5, 4, 1, 1), (5, 3), (3, 4)))
    shared = bench.check(run, w, a, b)
    assert aten.addmm.default not in targets(shared), "another reader needs the product"
    alone = bench.check(lambda w, a, b: w - (a @ b).reshape(w.shape), w, a, b)
    assert targets(alone).count(aten.addmm.default) == 1 and aten.mm.default not in targets(alone)
    wider = bench.raw(lambda w, a, b: w - a @ b, torch.randn(2, 5, 4, generator=generator), a, b)
    assert aten.addmm.default not in targets(Clean()(AddProducts()(wider))), "the product is broadcast"


def test_new_state_has_the_shape_in_which_it_is_computed(bench: Any, generator: torch.Generator) -> None:
    """A reshape behind it would copy all of it; only state, and only where nothing else is the same tensor."""
    shape = (40, 30, 1, 1)
    graph = lower(learned(lambda w, a, b: w - (a.t() @ b).reshape(w.shape), shape, (2, 40), (2, 30)))
    session = bench.session(graph)
    values = {"w": torch.randn(shape, generator=generator), "a0": torch.ones(2, 40), "a1": torch.randn(2, 30, generator=generator)}
    feeds = {("state." if n == "w" else "") + n: v.numpy() for n, v in values.items()}
    found = dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))
    assert {o.name: o.shape for o in session.get_outputs()}["next.w"] == [40, 30]
    torch.testing.assert_close(torch.from_numpy(found["next.w"]).reshape(shape), outcome(graph, values)["w"])
    assert next(n for n in graph.nodes if n.op == "output") is not None and shape_of(graph.results[-1]) == shape


def test_work_on_what_is_expanded_is_done_before(bench: Any, generator: torch.Generator) -> None:
    def run(v: Tensor, x: Tensor, g: Tensor) -> list[Tensor]:
        wide = (v.reshape(1, -1, 1, 1).expand(x.shape) / 12.0) * 3.0
        return [aten.threshold_backward(wide, x, 0.0), wide * x, wide.expand(2, *wide.shape[1:])]

    v, x, g = (torch.randn(s, generator=generator) for s in ((5,), (1, 5, 3, 4), (1, 5, 3, 4)))
    graph = bench.check(run, v, x, g)
    sizes = {shape_of(n) for n in graph.operators if n.target in (aten.div.Scalar, aten.div.Tensor, aten.mul.Scalar)}
    assert (1, 5, 3, 4) not in sizes
    kept = bench.raw(lambda v: v.expand(3, 5) * v.expand(3, 5), v)
    assert shape_of(Clean()(SinkExpand()(kept)).results[0]) == (3, 5)


def test_masks_wait_as_bits(bench: Any, generator: torch.Generator) -> None:
    def run(x: Tensor) -> Tensor:
        masks, y = [], x
        for _ in range(4):
            masks.append((y > 0).float())
            y = y * 1.5
        for mask in reversed(masks):
            y = y * mask
        return y

    x = torch.randn(1, 64, 8, 8, generator=generator)
    graph = bench.raw(run, x)
    late = WidenLate()(graph)
    floats = {buffer.name: buffer for buffer in lifetimes(late) if "to_copy" in buffer.name}
    assert len(floats) == 4 and all(buffer.last == buffer.first + 1 for buffer in floats.values()), "each is made where it is used"
    bench.check(run, x)


def test_masks_are_made_while_their_maps_are_there(bench: Any, generator: torch.Generator) -> None:
    def run(x: Tensor) -> Tensor:
        first = x * 2.0
        second = first.exp()
        third = second + 1.0
        for y in (third, second, first):  # the maps wait only for their masks
            third = third * torch.where(y == y.clamp(0.5, 1.5), 2.0, third)
        return third

    x = torch.randn(1, 64, 8, 8, generator=generator)
    graph = bench.raw(run, x)
    before, peak = outcome(graph, {"a0": x})["o0"], peak_bytes(graph)
    early = NarrowEarly()(graph)
    waiting = {buffer.name: buffer.last - buffer.first for buffer in lifetimes(early)}
    names = [node.name for node in early.nodes]
    assert max(waiting["mul"], waiting["exp"]) <= 5, "from a map to its mask: the next map, the clips and comparisons of two masks"
    assert names.index("eq_2") < names.index("add"), "the first map's mask is made before the last map"
    assert peak_bytes(early) < peak
    assert torch.equal(outcome(early, {"a0": x})["o0"], before)


def test_what_state_makes_is_made_where_it_is_used() -> None:
    def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kernels = [state[name].permute(1, 0, 2).contiguous() * 2.0 for name in ("v", "w")]
        y = data["a0"]
        for kernel in kernels:
            y = torch.bmm(y, kernel)
        return {"o0": y}, {}

    state = {name: torch.zeros(8, 1, 8) for name in ("v", "w")}
    graph = canonicalise(trace("bench", run, state, {"a0": TensorSpec("a0", (1, 4, 8), "float32")}, ()))
    late = WidenLate()(graph)
    order = [node.target for node in late.operators]
    assert order == [aten.permute.default, aten.mul.Tensor, aten.bmm.default] * 2
    assert peak_bytes(late) == 4 * (64 + 64 + 32), "one kernel, its copy, and the map"
