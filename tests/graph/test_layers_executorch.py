"""The same layers on ExecuTorch: output, and gradients of input and parameters, of every form that claims it, against PyTorch's autograd.

Lowering takes seconds a graph, so many layers are one graph of one program.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgecl.graph.capture import trace
from edgecl.graph.lowering import canonicalise, lower
from edgecl.graph.step import StepGraph
from edgecl_device.engines.executorch import _executorch, registered
from edgecl_device.manifest import TensorSpec
from edgecl_export.targets.executorch import PROGRAM_FILE, ExecutorchFiles, ExecutorchTarget

torch.set_num_threads(1)

_spec = importlib.util.spec_from_file_location("edgecl_layer_table", Path(__file__).with_name("layers.py"))  # test files import no other
assert _spec is not None and _spec.loader is not None
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)
COTANGENT = torch.randn(4096, generator=torch.Generator().manual_seed(2))
FORMS = [(name, i) for name, (executorch, made) in table.LAYERS.items() if executorch == table.YES for i in range(len(made))]
AT_ONCE = 60
"""Layers of one program."""


def layers(forms: Sequence[tuple[str, int]]) -> dict[str, nn.Module]:
    """These layers, with weights of their own."""
    generator, made = torch.Generator().manual_seed(0), {}
    for number, (name, i) in enumerate(forms):
        made[f"layer{number}"] = table.LAYERS[name][1][i]().eval()
        table.fill(made[f"layer{number}"], generator)
    return made


def run(made: dict[str, nn.Module], state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output of each layer, and its gradients for one cotangent, which a norm does not take out again."""
    found = {}
    for key, layer in made.items():

        def output(x: Tensor, parameters: dict[str, Tensor], layer: nn.Module = layer) -> Tensor:
            y: Tensor = torch.func.functional_call(layer, parameters, (x,)) if parameters else layer(x.clone())
            return y

        own = {name: state[f"{key}.{name}"] for name, _ in layer.named_parameters()}
        y, pullback = torch.func.vjp(output, x, own)
        to_input, to_parameters = pullback(COTANGENT[: y.numel()].reshape(y.shape))
        found.update({f"{key}.y": y, f"{key}.dx": to_input, **{f"{key}.d_{name}": g for name, g in to_parameters.items()}})
    return found


@pytest.fixture(scope="module", params=range(0, len(FORMS), AT_ONCE))
def everything(request: Any, tmp_path_factory: Any) -> tuple[Any, StepGraph, dict[str, Tensor], dict[str, Tensor], list[tuple[str, int]]]:
    """The program's file read back, its graph, its inputs, what autograd gives, and the forms."""
    forms = FORMS[request.param : request.param + AT_ONCE]
    made = layers(forms)
    state = {f"{key}.{name}": value.detach().clone() for key, layer in made.items() for name, value in layer.named_parameters()}
    x = torch.randn(table.SHAPE, generator=torch.Generator().manual_seed(1))
    captured = trace(
        "all", lambda s, data: (run(made, s, data["x"]), {}), state, {"x": TensorSpec("x", table.SHAPE, "float32")}, list(made.values())
    )
    graph = lower(canonicalise(captured), "executorch")
    folder = tmp_path_factory.mktemp("layers")
    ExecutorchTarget().write({"all": SimpleNamespace(graph=graph)}, folder)  # type: ignore[dict-item]
    files = ExecutorchFiles(folder, SimpleNamespace(steps={}))  # type: ignore[arg-type]
    return files, graph, {**state, "x": x}, run(made, state, x), forms


def test_every_kernel_is_there(everything: Any) -> None:
    assert everything[0].operators("all") <= registered()


def test_outputs_and_gradients_equal_autograds(everything: Any) -> None:
    files, graph, values, wanted, forms = everything
    program = _executorch()[1].load_program((files.folder / PROGRAM_FILE).read_bytes())
    found = program.load_method("all").execute([values[port.name].contiguous() for port in graph.inputs])
    assert len(found) == len(wanted) >= 2 * len(forms)
    wrong = []
    for port, got in zip(graph.outputs, found, strict=True):
        want = wanted[port.name].detach()
        worst = (got - want).abs().max().item()
        if got.shape != want.shape or not worst <= 1e-4 * max(want.abs().max().item(), 1e-3):
            wrong.append((forms[int(port.name.split(".")[0][5:])], port.name, worst))
    assert wrong == []
