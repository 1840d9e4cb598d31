"""The memory planned for an update against what the runtimes plan and use, and what the forward pass leaves for the backward pass."""

import json
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgecl import METHODS, prepare
from edgecl.graph.lowering import BuiltStep, build
from edgecl.graph.memory import ALIGNMENT, kept_for_backward, least_bytes
from edgecl.ledger import MASKS
from edgecl_device.engines.onnx import EQUAL_OPERATORS_STAY, STATE_IN
from edgecl_export.targets.executorch import program_of
from edgecl_export.targets.onnx import OnnxTarget
from edgecl_export.targets.planning import by_lifetimes, planner

torch.set_num_threads(1)

CHANNELS, SIZE, CLASSES = (3, 8, 16, 8), 16, 4


def network() -> nn.Module:
    """Three convolutions with norms, a depthwise one among them, and a classifier."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False, groups=b if a == b else 1), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in pairwise(CHANNELS)
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], CLASSES))
    return nn.Sequential(OrderedDict(input=nn.Identity(), body=nn.Sequential(*blocks), head=head)).eval()


UPDATES = {
    "head": ("head.2.",),
    "biases": (".bias",),
    "scales and shifts": (".1.weight", ".1.bias", "head.2."),
    "everything": ("",),
}


def learn(update: str, engine: str) -> BuiltStep:
    model = network()
    trained = tuple(n for n, _ in model.named_parameters() if any(n.startswith(p) or n.endswith(p) for p in UPDATES[update]))
    config = METHODS["finetune"].Config(lr=0.01, trainable=trained)
    x = np.zeros((1, CHANNELS[0], SIZE, SIZE), np.float32)
    return build(prepare(model, at="input", example=x, method="finetune", classes=CLASSES, config=config), engine)["learn"]


@pytest.mark.parametrize("update", UPDATES)
def test_executorch_plans_the_same_arena(update: str) -> None:
    step = learn(update, "executorch")
    program = program_of({"learn": step}, delegate=False, planning=planner(ports=False))
    [plan] = program.executorch_program.execution_plan
    assert plan.non_const_buffer_sizes[0] == 0
    assert abs(step.plan.arena_bytes - plan.non_const_buffer_sizes[1]) <= 0.05 * plan.non_const_buffer_sizes[1]
    assert "executorch_call_delegate" not in str(program.exported_program("learn").graph)


def test_executorch_s_own_verifier_accepts_the_places() -> None:
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite, Verifier
    from executorch.exir.passes import MemoryPlanningPass

    planning = MemoryPlanningPass(MemoryPlanningAlgorithmSuite([by_lifetimes]))
    program = program_of({"learn": learn("everything", "executorch")}, delegate=False, planning=planning)
    found = program.exported_program("learn")
    pairs = Verifier(found.graph_module, True, True, True, found.graph_signature).verify_storage_reuse()
    assert pairs > 100, "tensors share memory"


@pytest.mark.parametrize("update", UPDATES)
def test_onnx_runtime_uses_no_less(update: str, tmp_path: Path) -> None:
    step = learn(update, "onnx")
    least = least_bytes(step.graph)
    assert 0 < least <= step.plan.peak_bytes
    assert least <= in_use(step, tmp_path)


def in_use(step: BuiltStep, folder: Path) -> int:
    """Most bytes that ONNX Runtime's profile shows in use after an operator, beyond those before the first; outputs are bound."""
    OnnxTarget().write({"learn": step}, folder)
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False  # it reserves everything at once
    options.add_session_config_entry(*EQUAL_OPERATORS_STAY)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(folder / "learn.onnx", options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for port in step.graph.inputs:
        name = STATE_IN + port.name if port.kind == "state" else port.name
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(port.spec.shape, port.spec.dtype)))
    for port, given in zip(step.graph.outputs, session.get_outputs(), strict=True):
        kind = np.dtype(port.spec.dtype).type
        binding.bind_ortvalue_output(given.name, onnxruntime.OrtValue.ortvalue_from_shape_and_type(given.shape, kind))
    for _ in range(2):
        session.run_with_iobinding(binding)
    events = json.loads(Path(session.end_profiling()).read_text())
    use = [int(event["args"]["mem_bytes_in_use"]) for event in events if "mem_bytes_in_use" in event.get("args", {})]
    second = use[len(use) // 2 :]
    return max(second) - min(second)


MAPS = [channels * SIZE * SIZE for channels in CHANNELS[1:]]
"""Values of the map behind each convolution, and so of each norm's input and each mask."""


def aligned(sizes: list[int]) -> int:
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def masks(kept: dict[str, int]) -> int:
    return sum(kept.get(kind, 0) for kind in MASKS)


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_biases_keep_masks_and_scales_their_inputs(engine: str) -> None:
    biases = kept_for_backward(learn("biases", engine).graph)
    assert biases.keys() <= {*MASKS, "float32"}
    assert aligned(MAPS) <= masks(biases) <= aligned(MAPS) + ALIGNMENT, "the classes that are known are a mask, too"
    assert biases["float32"] < min(MAPS), "no map among them: vectors of scores and biases"
    scales = kept_for_backward(learn("scales and shifts", engine).graph)
    assert aligned(MAPS) <= masks(scales) <= aligned(MAPS) + ALIGNMENT
    maps = aligned([4 * size for size in MAPS])
    assert maps <= scales["float32"] < maps + min(MAPS), "the gradient of a scale needs what it scales"


def test_steps_without_a_backward_pass_keep_nothing(toy: Any) -> None:
    assert all(kept_for_backward(step.graph) == {} for step in build(toy.prepared("ncm")).values())


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_the_ledger_shows_it(engine: str, toy: Any) -> None:
    exported, ready = toy.bundle("finetune", engine)
    kept = kept_for_backward(build(ready, engine)["learn"].graph)
    ledger = exported.manifest.ledger
    assert (ledger["kept_for_backward"], ledger["kept_masks"]) == (sum(kept.values()), masks(kept))
    assert 0 < ledger["kept_masks"] < ledger["kept_for_backward"] <= ledger["activations_peak"]


def test_the_ledger_has_the_program_s_own_plan(toy: Any) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    exported, _ = toy.bundle("finetune", "executorch")
    program = deserialize_pte_binary((exported.path / "steps.pte").read_bytes()).program
    assert exported.manifest.ledger["runtime_plan"] == sum(sum(plan.non_const_buffer_sizes) for plan in program.execution_plan) > 0
    assert "runtime_plan" not in toy.bundle("finetune")[0].manifest.ledger
