"""A small bench for step graphs: trace a function of tensors, lower it, and run it on ONNX Runtime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edgecl.graph.capture import trace
from edgecl.graph.lowering import canonicalise, lower
from edgecl.graph.passes import Clean, FoldConstants
from edgecl.graph.step import StepGraph
from edgecl.learner import Learner, Problem, dtype_name
from edgecl.methods import METHODS
from edgecl.methods._adapt import AdaptiveLearner
from edgecl.methods._suffix import SuffixLearner
from edgecl.trees import flatten_tree, unflatten_like
from edgecl_device.engines.onnx import STATE_OUT
from edgecl_device.manifest import TensorSpec
from edgecl_export.onnx import Emitter, WeightFile

torch.set_num_threads(1)

Function = Callable[..., Any]


class Residual(nn.Module):
    """Depthwise and pointwise convolutions with frozen norms around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU6()
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(self.act(self.norm(self.depthwise(x))))


def small_net(classes: int = 5) -> nn.Sequential:
    """Residual, strided, depthwise and linear layers on [N, 4, 7, 7]; norms with statistics of their own."""
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(
        Residual(4), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(24, classes)
    ).eval()
    for module in net.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator) * 0.4
                value.data = noise.abs() + 0.5 if name in ("running_var", "weight") and value.dim() == 1 else noise
    return net


class Bench:
    """Traces, lowers, emits and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def trace(self, function: Function, *tensors: Tensor, modules: Sequence[nn.Module] = ()) -> StepGraph:
        """``function`` of these tensors as a step ``(a0, a1, ...) -> (o0, o1, ...)``."""
        names = [f"a{i}" for i in range(len(tensors))]
        specs = {n: TensorSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in zip(names, tensors, strict=True)}

        def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            return {f"o{i}": t for i, t in enumerate(results(function(*(data[n] for n in names))))}, {}

        return trace("bench", run, {}, specs, modules)

    def emit(self, graph: StepGraph) -> Path:
        """The ONNX file of a graph."""
        self.count += 1
        weights = WeightFile(self.folder / f"{self.count}.bin")
        model = Emitter(graph, weights).emit()
        weights.close()
        path = self.folder / f"{self.count}.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        return path

    def session(self, graph: StepGraph) -> Any:
        """A session with the graph's model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(str(self.emit(graph)), options, providers=["CPUExecutionProvider"])

    def onnx(self, graph: StepGraph, values: dict[str, Tensor]) -> list[Tensor]:
        """Results of ONNX Runtime, in the order of the graph's outputs."""
        session = self.session(graph)
        ports = [(STATE_OUT if p.kind == "state" else "") + p.name for p in graph.outputs]
        assert [output.name for output in session.get_outputs()] == ports
        feeds = {i.name: values[i.name].detach().numpy() for i in session.get_inputs()}
        found = [torch.from_numpy(np.asarray(r)) for r in session.run(None, feeds)]
        # state may come in the shape in which it is computed, and is the same bytes
        return [r.reshape(p.spec.shape) if p.kind == "state" else r for p, r in zip(graph.outputs, found, strict=True)]

    def raw(self, function: Function, *tensors: Tensor) -> StepGraph:
        """The graph as captured, constants folded."""
        return Clean()(FoldConstants()(Clean()(self.trace(function, *tensors))))

    def lowered(self, function: Function, *tensors: Tensor) -> StepGraph:
        """The graph that would ship."""
        return lower(canonicalise(self.trace(function, *tensors)))

    def check(self, function: Function, *tensors: Tensor, bar: float = 1e-5, raw: bool = False) -> StepGraph:
        """ONNX Runtime gives what ``function`` gives: shape, dtype and values; ``raw`` applies no rule."""
        graph = self.raw(function, *tensors) if raw else self.lowered(function, *tensors)
        found = self.onnx(graph, {f"a{i}": t for i, t in enumerate(tensors)})
        for i, (want, got) in enumerate(zip(results(function(*tensors)), found, strict=True)):
            assert_close(got, want.detach(), bar, f"output {i}")
        return graph


def results(value: Any) -> list[Tensor]:
    """A tensor or a sequence of tensors, as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def assert_close(got: Tensor, want: Tensor, bar: float, label: str = "") -> None:
    """Equal shape and dtype; floats within ``bar`` of the largest value, the rest equal."""
    assert got.shape == want.shape, (label, got.shape, want.shape)
    assert got.dtype == want.dtype, (label, got.dtype, want.dtype)
    if not want.is_floating_point():
        assert torch.equal(got, want), label
        return
    special = ~torch.isfinite(want)
    assert torch.equal(got[special].isnan(), want[special].isnan()), label
    assert torch.equal(torch.nan_to_num(got[special]), torch.nan_to_num(want[special])), label
    size = want[~special].abs().max().item() if (~special).any() else 0.0
    worst = (got[~special].double() - want[~special].double()).abs().max().item() if (~special).any() else 0.0
    assert worst <= bar * size, f"{label}: off by {worst:.3g}, largest value {size:.3g}"


def gradients(function: Function, *tensors: Tensor) -> Function:
    """``(*tensors, cotangent) -> gradients of every tensor``, by ``torch.func``."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        _, pullback = torch.func.vjp(function, *arguments[:-1])
        return tuple(pullback(arguments[-1]))

    return run


def make_learner(name: str, **config: Any) -> Learner:
    """A method on small features, or, where it has a suffix, on the small net."""
    kind = METHODS[name]
    if not issubclass(kind, SuffixLearner):
        return kind(Problem(TensorSpec("z", (1, 6), "float32"), 4), kind.Config(**config))
    few = {"rows_per_step": 3} if issubclass(kind, AdaptiveLearner) else {}
    learner = kind(Problem(TensorSpec("z", (1, 4, 7, 7), "float32"), 5), kind.Config(**{**few, **config}), suffix=small_net())
    learner.calibrate(torch.linspace(-3.0, 3.0, 2 * 4 * 49).reshape(2, 4, 7, 7))
    return learner


def random_state(learner: Learner, generator: torch.Generator) -> dict[str, Tensor]:
    """A state that occurs: after twelve steps on random samples, three of each of four classes."""
    state = learner.init()
    step = "learn" if "learn" in learner.steps else "prime"
    tree = learner.inputs_of("learn") if step == "learn" else {name: learner.step_inputs()[name] for name in ("z", "target")}
    specs = flatten_tree(tree)
    for i in range(12):
        values = {**random_values(specs, generator), "target": torch.tensor([i % 4]), "lr": torch.tensor(0.01)}
        with torch.no_grad():
            _, new = {"prime": learner.prime, **learner.steps}[step](state, **unflatten_like(tree, values))
        state = {**state, **new}
    if "adapt" in learner.steps:  # which has not run: somewhere else than at the source, where a teacher and its student agree
        state |= {n: t + torch.randn(t.shape, generator=generator) * 0.1 for n, t in state.items() if n.startswith("param.")}
    return state


def random_inputs(graph: StepGraph, generator: torch.Generator) -> dict[str, Tensor]:
    """Values for a step's data inputs."""
    return random_values({port.name: port.spec for port in graph.inputs if port.kind == "data"}, generator)


def random_values(specs: Mapping[str, TensorSpec], generator: torch.Generator, classes: int = 4) -> dict[str, Tensor]:
    """Values that fit specs."""
    values = {}
    for name, spec in specs.items():
        if spec.dtype == "int64":
            values[name] = torch.randint(0, classes, spec.shape, generator=generator)
        elif spec.dtype == "uint8":
            values[name] = torch.randint(0, 256, spec.shape, generator=generator, dtype=torch.uint8)
        elif name.endswith(("weight", "lr")):
            values[name] = torch.rand(spec.shape, generator=generator) * 0.5 + 0.1
        else:
            values[name] = torch.randn(spec.shape, generator=generator)
    return values


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("onnx"))


class Tools:
    """The helpers above, for test files, which cannot import a conftest."""

    Residual = Residual
    assert_close = staticmethod(assert_close)
    gradients = staticmethod(gradients)
    make_learner = staticmethod(make_learner)
    random_inputs = staticmethod(random_inputs)
    random_state = staticmethod(random_state)
    results = staticmethod(results)
    small_net = staticmethod(small_net)


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
