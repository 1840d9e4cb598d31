"""The two forms of a step: canonical, on which its mathematics is counted, and lowered, which ships."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgecl.graph import cost, memory
from edgecl.graph.capture import capture, capture_encode
from edgecl.graph.cost import Cost
from edgecl.graph.memory import Plan
from edgecl.graph.passes import (
    AddProducts,
    ApplyRules,
    Clean,
    FoldConstants,
    FoldConvolutionAffine,
    HoldRows,
    JoinSums,
    JoinVectors,
    MergeEqual,
    NarrowEarly,
    PackMasks,
    Pass,
    ProveFinite,
    Recompute,
    ScaleKernels,
    ScaleMaps,
    SelectChannels,
    SinkExpand,
    SinkIntoParts,
    UpdateEarly,
    WidenLate,
    WriteIntegers,
)
from edgecl.graph.rules import RULES
from edgecl.graph.step import StepGraph
from edgecl_device.checks import entry

if TYPE_CHECKING:
    from edgecl.prepare import Prepared

_OWN: dict[str, tuple[tuple[Pass, ...], tuple[Pass, ...]]] = {
    "onnx": ((HoldRows(),), (AddProducts(), ScaleMaps(), WriteIntegers())),
    "executorch": ((), (PackMasks(),)),
}
"""Passes that pay on one runtime only, by engine: before its rules are applied, and behind them."""


@dataclass(frozen=True)
class BuiltStep:
    """A step ready to be emitted.

    Attributes:
        graph: The lowered graph.
        canonical: Cost of the mathematics.
        layers: Its multiply-accumulates by module path and phase.
        executed: Cost of the lowered graph.
        plan: Places of its intermediate tensors, verified.
    """

    graph: StepGraph
    canonical: Cost
    layers: dict[str, dict[str, int]]
    executed: Cost
    plan: Plan


def canonicalise(graph: StepGraph) -> StepGraph:
    """Remove what is dead, fold what is frozen. The argument must not be used afterwards."""
    for step in (Clean(), FoldConstants(), SinkIntoParts(), FoldConvolutionAffine(), Clean()):
        graph = step(graph)
    return graph


def lower(graph: StepGraph, engine: str = "onnx") -> StepGraph:
    """Rewrite a canonical graph for a runtime; the argument stays usable."""
    graph = graph.copy()
    first = (
        SinkExpand(),
        MergeEqual(),
        ScaleKernels(),
        SelectChannels(),
        Clean(),
        FoldConstants(),
        Clean(),
        JoinSums(),
        Clean(),
        ProveFinite(),
    )
    joined = (MergeEqual(), Clean(), JoinVectors(), MergeEqual(), Clean())
    before, after = _OWN.get(engine, ((), ()))
    tidy = (Clean(), FoldConstants(), Clean())
    rules = (*before, *tidy, ApplyRules(RULES[engine]), Clean(), FoldConstants(), *after)
    for step in (*first, *tidy, *rules, *joined, UpdateEarly(), WidenLate(), NarrowEarly()):
        graph = step(graph)
    return graph


def build_step(captured: StepGraph, engine: str = "onnx") -> BuiltStep:
    """Lower a captured step, count it and plan its memory."""
    canonical = canonicalise(captured)
    chosen = SelectChannels()(canonical.copy())  # gradients that nobody reads are no mathematics; scales are moved before they go
    mathematics, layers = cost.count(chosen), cost.count_by_module(chosen)
    lowered = lower(canonical, engine)
    plan = memory.plan(lowered)
    memory.verify(lowered, plan)
    return BuiltStep(lowered, mathematics, layers, cost.count(lowered), plan)


def within(step: BuiltStep, limit_bytes: int) -> BuiltStep:
    """A step whose arena fits into a limit, or comes as near as it can: tensors are computed again instead of kept."""
    if step.plan.arena_bytes <= limit_bytes:
        return step
    graph = Recompute(limit_bytes)(step.graph.copy())
    plan = memory.plan(graph)
    memory.verify(graph, plan)
    return replace(step, graph=graph, executed=cost.count(graph), plan=plan)


def build(prepared: "Prepared", engine: str = "onnx") -> dict[str, BuiltStep]:
    """Every step of a prepared learner, ``encode`` first.

    Raises:
        InputError: when there are no rules for such an engine.
        GraphError: when a step cannot be captured or lowered, with its place in the model.
    """
    entry("engine", engine, RULES)
    captured = [capture_encode(prepared.trunk, prepared.x, prepared.trunk.model, prepared.trunk.initial_state())]
    captured += [capture(prepared.learner, name) for name in prepared.learner.steps]
    return {graph.name: build_step(graph, engine) for graph in captured}
