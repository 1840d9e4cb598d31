"""What ExecuTorch's delegate gets of a graph: few parts that can each run in one call, and a step's program without a trace."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.export import ExportedProgram

from edgecl import METHODS, prepare
from edgecl.backbones import GruClassifier
from edgecl.graph.lowering import build
from edgecl_export.targets.executorch import ExecutorchFiles, ExecutorchTarget
from edgecl_export.targets.exported import exported
from edgecl_export.targets.partition import parts_of

torch.set_num_threads(1)


def graph_of(inputs: Sequence[Sequence[int]]) -> list[fx.Node]:
    """A graph whose node ``i`` reads those of the given indices; 0 is its input."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for sources in inputs:
        nodes.append(graph.call_function(torch.add, tuple(nodes[i] for i in sources)))
    for node in nodes:
        node.meta["val"] = torch.zeros(2)
    return nodes


def runs(nodes: list[fx.Node], parts: list[list[fx.Node]]) -> bool:
    """Whether every part can run in one call: the graph of parts and other nodes has an order."""
    place: dict[fx.Node, Any] = {node: number for number, part in enumerate(parts) for node in part}
    done: set[Any] = set()
    left = {place.get(node, node) for node in nodes}
    while left:
        ready = [
            key
            for key in left
            if all(place.get(s, s) in done or place.get(s, s) == key for n in nodes if place.get(n, n) == key for s in n.all_input_nodes)
        ]
        if not ready:
            return False
        done.update(ready)
        left.difference_update(ready)
    return True


def least(nodes: list[fx.Node], taken: set[fx.Node]) -> int:
    """The largest number of parts on any way through a graph, of which no two can be one: by trying every way."""

    def ways(node: fx.Node, count: int, inside: bool) -> int:
        now = count + (node in taken and not inside)
        return max([now, *(ways(user, now, node in taken) for user in node.users)])

    return max(ways(node, 0, False) for node in nodes)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_parts_can_run_and_are_as_few_as_can_be(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    nodes = graph_of([data.draw(st.lists(st.integers(0, i), min_size=1, max_size=2)) for i in range(size)])
    taken = {node for node in nodes[1:] if data.draw(st.booleans())}
    parts = parts_of(nodes, [[node] for node in nodes if node in taken])
    assert sorted(node.name for part in parts for node in part) == sorted(node.name for node in taken)
    assert runs(nodes, parts)
    assert len(parts) == (least(nodes, taken) if taken else 0)


def test_what_only_a_later_part_reads_is_in_that_part() -> None:
    """Node 3 needs no other, but only 4 reads it, which waits for 2."""
    nodes = graph_of([[0], [1], [0], [2, 3]])
    parts = parts_of(nodes, [[nodes[i]] for i in (1, 3, 4)])
    assert parts == [[nodes[1]], [nodes[3], nodes[4]]]


def test_weights_are_in_the_first_part_that_reads_them() -> None:
    nodes = graph_of([[0], [1], [2]])
    weight = nodes[0].graph.placeholder("weight")
    assert parts_of([*nodes, weight], [[nodes[1]], [nodes[3], weight]]) == [[nodes[1]], [nodes[3], weight]]


def recurrent(steps: int) -> Any:
    """Latent replay behind the first of two recurrent layers."""
    x = np.random.default_rng(0).standard_normal((6, steps, 9)).astype(np.float32)
    config = METHODS["latent_replay"].Config(rows_per_step=2, capacity_bytes=1 << 17)
    ready = prepare(GruClassifier(4, hidden=64), at="gru1", example=x[:1], method="latent_replay", classes=4, config=config)
    return ready.fit(x, np.arange(6) % 3)


def test_the_parts_of_a_recurrent_layer_do_not_grow_with_its_steps(tmp_path: Path) -> None:
    """Nor do the operators of the portable kernels, among which there are no products."""
    for steps in (6, 12):
        built = build(recurrent(steps), "executorch")["learn"]
        folder = tmp_path / str(steps)
        folder.mkdir()
        ExecutorchTarget().write({"learn": built}, folder)
        files = ExecutorchFiles(folder, SimpleNamespace(steps={}))  # type: ignore[arg-type]
        [plan] = files.program.execution_plan
        kernels = [plan.operators[i.instr_args.op_index].name for i in plan.chains[0].instructions if hasattr(i.instr_args, "op_index")]
        assert not {"aten::bmm", "aten::mm", "aten::select_copy", "aten::unsqueeze_copy", "aten::squeeze_copy"} & set(kernels)
        assert len(plan.delegates) < 8
        assert len(kernels) < 75


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's own, in what is left out
@pytest.mark.parametrize(("method", "step"), [*product(["latent_replay"], ["encode", "learn", "predict"]), ("ridge", "learn")])
def test_a_steps_program_is_what_pytorch_would_write_out(method: str, step: str, toy: Any) -> None:
    """It has the values of the step, and PyTorch's own decomposition, which is left out, finds nothing to do but to copy it."""
    graph = build(toy.prepared(method), "executorch")[step].graph
    program = exported(graph)
    values = [
        torch.from_numpy(np.random.default_rng(i).uniform(0, 2, p.spec.shape)).to(getattr(torch, p.spec.dtype))
        for i, p in enumerate(graph.inputs)
    ]
    wanted = graph.run(*values)
    for got, want in zip(program.module()(*values), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert program.run_decompositions({}) is program
    written = ExportedProgram.run_decompositions(program, {})
    assert targets(written) == targets(program)


def targets(program: ExportedProgram) -> list[str]:
    return sorted(str(node.target) for node in program.graph.nodes if node.op == "call_function" and "clone" not in str(node.target))
