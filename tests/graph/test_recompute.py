"""Recomputation: the same numbers, a lower peak, and every operation counted; on ONNX Runtime and ExecuTorch, too."""

from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from edgecl.graph import cost
from edgecl.graph.capture import capture
from edgecl.graph.cost import Cost
from edgecl.graph.lowering import BuiltStep, build_step, within
from edgecl.graph.memory import peak_bytes, plan, verify
from edgecl.graph.passes import Clean, MergeEqual, Recompute
from edgecl.graph.step import StepGraph
from edgecl_export.targets.executorch import program_of
from edgecl_export.targets.planning import planner

aten = torch.ops.aten
SIZE = 64
MAP = 4 * SIZE * SIZE


def chain(x: Tensor, w: Tensor) -> Tensor:
    """Two small maps, each needed again behind a stretch of larger ones."""
    early = x * 2.0
    product = torch.mm(x, w)
    wide = torch.cat([early.exp(), product.exp(), x.exp()], 1)
    narrow = (wide + 1.0).sum(1, keepdim=True)
    return narrow + early + product


@pytest.fixture
def given(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(SIZE, SIZE, generator=generator), torch.randn(SIZE, SIZE, generator=generator)


def same(a: StepGraph, b: StepGraph, *values: Tensor) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.run(*values), b.run(*values), strict=True))


def test_the_cheapest_tensor_goes_first_and_no_more_than_needed(bench: Any, given: tuple[Tensor, Tensor]) -> None:
    plain = bench.raw(chain, *given)
    before, work = peak_bytes(plain), cost.count(plain)
    assert before == 8 * MAP, "at the sum with one: two maps and twice three"
    once = Recompute(7 * MAP)(bench.raw(chain, *given))
    assert peak_bytes(once) == plan(once).arena_bytes == 7 * MAP
    assert cost.count(once).total_macs == work.total_macs == SIZE**3
    assert cost.count(once).elementwise == work.elementwise + SIZE**2, "early = x * 2 again"
    assert [n.target for n in once.operators].count(aten.mul.Tensor) == 2
    twice = Recompute(6 * MAP)(bench.raw(chain, *given))
    assert peak_bytes(twice) == 6 * MAP
    assert cost.count(twice).total_macs == 2 * SIZE**3, "the product again as well"
    assert cost.count(twice).elementwise == work.elementwise + SIZE**2
    for graph in (once, twice):
        verify(graph, plan(graph))
        assert same(graph, plain, *given)
        assert peak_bytes(Clean()(MergeEqual()(graph))) == before, "which is why it comes behind that pass"


def test_what_fits_stays_as_it_is_and_what_cannot_goes_as_far_as_it_can(bench: Any, given: tuple[Tensor, Tensor]) -> None:
    plain = bench.raw(chain, *given)
    names = [node.name for node in plain.nodes]
    fits = Recompute(8 * MAP)(plain)
    assert [node.name for node in fits.nodes] == names
    assert peak_bytes(Recompute(0)(fits)) == 6 * MAP


def test_operands_that_are_gone_are_computed_again_as_well(bench: Any, generator: torch.Generator) -> None:
    def run(x: Tensor) -> Tensor:
        y = x * 2.0  # needed for z alone
        z = y.reshape(-1).exp().reshape(SIZE, SIZE)
        wide = torch.cat([z + 1.0, x, x], 1)
        return (wide + 1.0).sum(1, keepdim=True) + z

    x = torch.randn(SIZE, SIZE, generator=generator)
    plain = bench.raw(run, x)
    before, work = peak_bytes(plain), cost.count(plain)
    again = Recompute(before - MAP)(bench.raw(run, x))
    assert (before, peak_bytes(again)) == (7 * MAP, 6 * MAP)
    assert cost.count(again).elementwise == work.elementwise + 2 * SIZE**2
    assert [n.target for n in again.operators].count(aten.reshape.default) == 4, "with its views"
    assert same(again, plain, x)


@pytest.mark.parametrize(("method", "engine"), [("latent_replay", "onnx"), ("latent_replay", "executorch"), ("finetune", "executorch")])
def test_a_learning_step(method: str, engine: str, tools: Any, generator: torch.Generator) -> None:
    learner = tools.make_learner(method)
    step = build_step(capture(learner, "learn"), engine)
    small = within(step, 0)
    assert small.plan.arena_bytes < step.plan.arena_bytes
    assert within(step, small.plan.arena_bytes).plan.arena_bytes <= small.plan.arena_bytes
    assert small.canonical == step.canonical
    assert small.executed.total_macs >= step.executed.total_macs
    assert small.executed.total_macs + small.executed.elementwise >= step.executed.total_macs + step.executed.elementwise
    assert len(small.graph.nodes) > len(step.graph.nodes)
    assert within(step, step.plan.arena_bytes) is step
    values = {**tools.random_state(learner, generator), **tools.random_inputs(step.graph, generator)}
    assert same(small.graph, step.graph, *(values[port.name] for port in step.graph.inputs))


def test_onnx_runtime_keeps_both_without_its_own_merging(bench: Any, given: tuple[Tensor, Tensor], tmp_path: Any) -> None:
    path = bench.emit(Recompute(6 * MAP)(bench.raw(chain, *given)))
    products = {}
    for off in ("", "CommonSubexpressionElimination"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("optimization.disable_specified_optimizers", off)
        options.optimized_model_filepath = str(tmp_path / f"{off}.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        nodes = [node.op_type for node in ir.load(options.optimized_model_filepath).graph]
        products[off] = sum(nodes.count(kind) for kind in ("Gemm", "MatMul", "FusedMatMul"))
    assert products == {"": 1, "CommonSubexpressionElimination": 2}


def test_executorch_keeps_both(bench: Any, given: tuple[Tensor, Tensor]) -> None:
    sizes = []
    for limit in (8 * MAP, 6 * MAP):
        graph = Recompute(limit)(bench.raw(chain, *given))
        step = BuiltStep(graph, Cost({}, 0), {}, cost.count(graph), plan(graph))
        program = program_of({"bench": step}, delegate=False, planning=planner(ports=False))
        sizes.append(program.executorch_program.execution_plan[0].non_const_buffer_sizes[1])
    assert sizes == [8 * MAP, 6 * MAP]
