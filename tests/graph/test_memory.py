"""The planner against its verifier, brute force, and a run in PyTorch that frees every value when it is dead."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from edgecl.graph.capture import capture
from edgecl.graph.lowering import canonicalise, lower
from edgecl.graph.memory import ALIGNMENT, VIEWS, Buffer, Plan, least_bytes, lifetimes, peak_bytes, plan, verify
from edgecl.graph.step import GraphError, StepGraph
from edgecl.methods import METHODS

aten = torch.ops.aten
LEARNING = [name for name, kind in METHODS.items() if hasattr(kind, "learn")]


@pytest.fixture(scope="module")
def graphs(tools: Any) -> dict[str, StepGraph]:
    """Learn of every method, lowered."""
    return {name: lower(canonicalise(capture(tools.make_learner(name), "learn"))) for name in LEARNING}


def clash(a: Buffer, b: Buffer) -> bool:
    """Whether two buffers are alive at one time and share a byte."""
    in_time = a.first <= b.last and b.first <= a.last
    return in_time and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


@pytest.mark.parametrize("method", LEARNING)
def test_plan(method: str, graphs: dict[str, StepGraph]) -> None:
    graph = graphs[method]
    found = plan(graph)
    verify(graph, found)
    assert len(found.buffers) > 5
    for i, a in enumerate(found.buffers):
        assert a.offset % ALIGNMENT == 0
        assert not any(clash(a, b) for b in found.buffers[i + 1 :])
    assert found.peak_bytes == peak_bytes(graph) == brute_force_peak(graph)
    assert found.peak_bytes <= found.arena_bytes == max(b.offset + b.nbytes for b in found.buffers)


def shares_bytes(node: fx.Node) -> bool:
    if node.target is aten.t.default:
        return all(user.target in (aten.mm.default, aten.addmm.default) for user in node.users)
    return node.target in VIEWS or node.name.startswith("getitem")


def brute_force_peak(graph: StepGraph) -> int:
    """At each operator: every value that was computed and that it or a later operator needs, directly or through a view."""
    nodes = graph.nodes
    results = set(graph.results)

    def needs(node: fx.Node, value: fx.Node) -> bool:
        return any(source is value or (shares_bytes(source) and needs(source, value)) for source in node.all_input_nodes)

    peak = 0
    for i in range(len(nodes)):
        alive = 0
        for j, value in enumerate(nodes[: i + 1]):
            if value.op != "call_function" or shares_bytes(value) or value in results:
                continue
            if any(shares_bytes(r) and needs(r, value) for r in results):
                continue  # lies in an output's buffer
            if j == i or any(needs(later, value) for later in nodes[i:]):
                found = value.meta["val"]
                values = [found[i] for i in {u.args[1] for u in value.users}] if isinstance(found, (tuple, list)) else [found]
                alive += sum(-(-v.numel() * v.element_size() // ALIGNMENT) * ALIGNMENT for v in values)
        peak = max(peak, alive)
    return peak


def freeing_run(graph: StepGraph, values: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """Results, and the largest sum of live storages that no input, constant or result lies in.

    An operator that is no view gets memory of its own; a value goes as soon as nobody needs it.
    """
    nodes, results = graph.nodes, graph.results
    last = {source: node for node in nodes for source in node.all_input_nodes}
    live: dict[fx.Node, Any] = {n: values[p.name] for n, p in zip(graph.placeholders, graph.inputs, strict=True)}
    live |= {n: graph.constant(n) for n in nodes if n.op == "get_attr"}
    owners: dict[fx.Node, list[object]] = {node: [None] for node in live}  # whose storage a value's tensors lie in; None is frozen
    moments = []
    for node in (n for n in nodes if n.op == "call_function"):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), live.__getitem__)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if not shares_bytes(node):
            value = tree_map(lambda t: t.clone(memory_format=torch.contiguous_format), value)
        known = {t.untyped_storage().data_ptr(): o for n, v in live.items() for t, o in zip(listed(v), owners[n], strict=True)}
        owners[node] = [known.get(t.untyped_storage().data_ptr(), (node, i)) for i, t in enumerate(listed(value))]
        live[node] = value
        moments.append({o: t.untyped_storage().nbytes() for n, v in live.items() for t, o in zip(listed(v), owners[n], strict=True)})
        for done in [n for n in live if last.get(n, node) is node and n not in results]:
            del live[done]
    kept = {None, *(o for r in results for o in owners[r])}
    peak = max(sum(-(-size // ALIGNMENT) * ALIGNMENT for owner, size in moment.items() if owner not in kept) for moment in moments)
    return [live[r] for r in results], peak


def listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("method", LEARNING)
def test_a_run_that_frees_dead_values_needs_the_planned_peak(
    method: str, graphs: dict[str, StepGraph], tools: Any, generator: torch.Generator
) -> None:
    graph = graphs[method]
    learner = tools.make_learner(method)
    values = {**tools.random_state(learner, generator), **tools.random_inputs(graph, generator)}
    results, peak = freeing_run(graph, values)
    for got, want in zip(results, graph.run(*(values[p.name] for p in graph.inputs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if any(isinstance(n.meta.get("val"), (tuple, list)) for n in graph.operators):
        # a pooling's maxima and positions are one buffer in the plan, and two tensors of different lives in PyTorch
        assert 0.9 * peak_bytes(graph) <= peak <= peak_bytes(graph)
    else:
        assert peak == peak_bytes(graph)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_the_verifier_accepts_a_moved_buffer_exactly_when_no_two_clash(data: st.DataObject, graphs: dict[str, StepGraph]) -> None:
    graph = graphs[data.draw(st.sampled_from(LEARNING))]
    found = plan(graph)
    index = data.draw(st.integers(0, len(found.buffers) - 1))
    moved = replace(found.buffers[index], offset=ALIGNMENT * data.draw(st.integers(0, found.arena_bytes // ALIGNMENT)))
    others = [b for i, b in enumerate(found.buffers) if i != index]
    fits = moved.offset + moved.nbytes <= found.arena_bytes
    good = fits and not any(clash(moved, b) for b in others)
    assert accepts(graph, replace(found, buffers=(*others, moved))) == good


def accepts(graph: StepGraph, found: Plan) -> bool:
    try:
        verify(graph, found)
    except GraphError:
        return False
    return True


CORRUPTIONS: dict[str, tuple[Any, str]] = {
    "missing": (lambda p, i: replace(p, buffers=p.buffers[:i] + p.buffers[i + 1 :]), "has no place"),
    "too small": (lambda p, i: swap(p, i, nbytes=p.buffers[i].nbytes - ALIGNMENT), "needs .* bytes"),
    "below zero": (lambda p, i: swap(p, i, offset=-ALIGNMENT), "must start at a multiple of 64"),
    "beyond the end": (lambda p, i: swap(p, i, offset=p.arena_bytes - p.buffers[i].nbytes + ALIGNMENT), "end within"),
    "not aligned": (lambda p, i: swap(p, i, offset=p.buffers[i].offset + 1), "must start at a multiple of 64"),
    "arena too small": (lambda p, i: replace(p, arena_bytes=p.arena_bytes - 1), "end within"),
}


def swap(found: Plan, index: int, **changes: int) -> Plan:
    buffers = list(found.buffers)
    buffers[index] = replace(buffers[index], **changes)  # type: ignore[arg-type]
    return replace(found, buffers=tuple(buffers))


@pytest.mark.parametrize("kind", CORRUPTIONS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_verifier_refuses_corrupted_plans(kind: str, data: st.DataObject, graphs: dict[str, StepGraph]) -> None:
    graph = graphs[data.draw(st.sampled_from(LEARNING))]
    found = plan(graph)
    corrupt, message = CORRUPTIONS[kind]
    with pytest.raises(GraphError, match=message):
        verify(graph, corrupt(found, data.draw(st.integers(0, len(found.buffers) - 1))))


def test_an_operator_must_not_write_over_what_it_reads(bench: Any) -> None:
    graph = bench.lowered(lambda x: (x * 2.0).exp() + 1.0, torch.ones(64))
    found = plan(graph)
    first, second = sorted(found.buffers, key=lambda b: b.first)
    assert first.offset != second.offset
    with pytest.raises(GraphError, match="after it was overwritten"):
        verify(graph, replace(found, buffers=(first, replace(second, offset=first.offset))))


def test_a_view_keeps_its_buffer_alive_and_a_result_has_no_buffer(bench: Any) -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = x * 2.0
        view = y.reshape(-1)
        z = x.exp().sum(0)
        return [(view + 1.0).reshape(4, 16).sum(1), z]

    graph = bench.lowered(function, torch.ones(8, 8))
    (first, *_) = lifetimes(graph)
    names = [n.name for n in graph.nodes]
    assert first.name == "mul"
    assert names[first.last] == "add"
    assert not {b.name for b in lifetimes(graph)} & {n.name for n in graph.results}


def test_maxima_whose_positions_nobody_uses_take_no_room_for_them(bench: Any) -> None:
    x = torch.randn(1, 2, 8, 8)
    values = 2 * 4 * 4 * 4
    graph = bench.lowered(lambda t: F.max_pool2d(t, 2).exp() + 1.0, x)
    assert [b.nbytes for b in lifetimes(graph)] == [values, values]
    assert plan(graph).arena_bytes == peak_bytes(graph) == brute_force_peak(graph) == 2 * values
    both = bench.lowered(lambda t: torch.func.vjp(lambda u: F.max_pool2d(u, 2), t)[1](torch.ones(1, 2, 4, 4))[0] * 2.0, x)
    assert 2 * values in [b.nbytes for b in lifetimes(both)], "positions alone, int64"


def test_a_step_without_intermediate_tensors(bench: Any) -> None:
    graph = bench.lowered(lambda x: x + 1.0, torch.ones(3))
    assert plan(graph) == Plan(0, 0, ())
    verify(graph, plan(graph))


def test_an_elementwise_result_may_take_its_operand_s_place(bench: Any) -> None:
    graph = bench.lowered(lambda x: [((x.exp() + 1.0) * 2.0).sum(0)], torch.ones(8, 8))
    assert peak_bytes(graph) == 2 * 256
    assert least_bytes(graph) == 256
