"""Capture: names, distinct tensors, refusals, and equality with the eager function for every method."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecl.graph.capture import capture, capture_encode, trace
from edgecl.graph.lowering import build_step, canonicalise, lower
from edgecl.graph.step import GraphError, StepGraph, UnsupportedOperatorError
from edgecl.learner import Learner, Problem, all_finite, call_step
from edgecl.methods import METHODS, Finetune
from edgecl.splitting import split
from edgecl.trees import flatten_tree, unflatten_like
from edgecl_device.manifest import TensorSpec

Step = Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Tensor]]]
LEARNING = [name for name, kind in METHODS.items() if hasattr(kind, "learn")]
FLOATS = TensorSpec("x", (2, 3), "float32")


def simple(run: Step, state: dict[str, Tensor] | None = None, **inputs: Any) -> StepGraph:
    return trace("learn", run, state or {}, inputs or {"x": FLOATS}, [])


def test_names_come_from_the_nesting_of_the_arguments() -> None:
    def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = data["replay"]
        return {"row.z.left": rows["z"]["left"] * 2.0, "scores": data["lr"] + 1.0}, {
            "param.0.weight": state["param.0.weight"] + rows["weight"]
        }

    replay = {"z": {"left": FLOATS, "right": FLOATS}, "weight": TensorSpec("weight", (3,), "float32")}
    graph = simple(run, {"param.0.weight": torch.zeros(3), "count": torch.zeros(2)}, replay=replay, lr=TensorSpec("lr", (), "float32"))
    assert [(p.name, p.kind) for p in graph.inputs] == [
        ("param.0.weight", "state"),
        ("count", "state"),
        ("replay.z.left", "data"),
        ("replay.z.right", "data"),
        ("replay.weight", "data"),
        ("lr", "data"),
    ]
    assert [(p.name, p.kind, p.spec.shape) for p in graph.outputs] == [
        ("row.z.left", "data", (2, 3)),
        ("scores", "data", ()),
        ("param.0.weight", "state", (3,)),
    ]
    assert [p.name for p in canonicalise(graph).inputs] == ["param.0.weight", "replay.z.left", "replay.weight", "lr"]


def test_equal_tensors_stay_distinct_inputs() -> None:
    same = torch.ones(2, 3)

    def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"y": data["a"] * 2.0 + data["b"]}, {"p": state["p"] + 1.0, "q": state["q"] * 3.0}

    graph = simple(run, {"p": same, "q": same}, a=FLOATS, b=FLOATS)
    values = [torch.full((2, 3), v) for v in (1.0, 10.0, 100.0, 1000.0)]
    found = graph.run(*values)
    assert [t[0, 0].item() for t in found] == [1200.0, 2.0, 30.0]


def test_examples_do_not_enter_the_graph() -> None:
    graph = simple(lambda s, d: ({"y": d["x"] * d["x"].sum()}, {}))
    assert graph.constants() == {}
    assert graph.run(torch.full((2, 3), 2.0))[0][0, 0].item() == 24.0


REFUSED: dict[str, tuple[Step, str]] = {
    "random": (lambda s, d: ({"y": torch.rand_like(d["x"]) + d["x"]}, {}), "draws random numbers in the graph"),
    "dropout": (lambda s, d: ({"y": F.dropout(d["x"], 0.5, training=True)}, {}), "draws random numbers in the graph"),
    "branch": (
        lambda s, d: ({"y": d["x"] if d["x"].sum() > 0 else -d["x"]}, {}),
        "operator aten._local_scalar_dense.default in .* makes a number",
    ),
    "item": (lambda s, d: ({"y": d["x"] * d["x"].sum().item()}, {}), "makes a number or a shape of a tensor's values"),
    "shape": (lambda s, d: ({}, {"p": s["p"].reshape(6)}), r"state 'p' must stay float32 \[2, 3\], the step returns float32 \[6\]"),
    "dtype": (lambda s, d: ({}, {"p": s["p"].double()}), r"state 'p' must stay float32 \[2, 3\], the step returns float64 \[2, 3\]"),
    "unknown": (lambda s, d: ({}, {"r": s["p"] + 1.0}), r"returns unknown state 'r'; init\(\) makes \['p'\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_step_and_the_cause(name: str) -> None:
    run, message = REFUSED[name]
    with pytest.raises(GraphError, match=f"step 'learn': .*{message}"):
        simple(run, {"p": torch.zeros(2, 3)})


def test_an_error_in_a_split_model_is_one_line() -> None:
    """Its graph is run node by node by an interpreter that would append what it was executing."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(32, 3))
    with pytest.raises(GraphError, match=r"^step 'encode': cannot be captured: RuntimeError: mat1 and mat2 [^\n]*$"):
        capture_encode(split(nn.Sequential(model, nn.ReLU()), "0").trunk, TensorSpec("x", (1, 2, 4, 5), "float32"))


def test_a_failed_capture_leaves_no_mark_behind() -> None:
    """The next capture would carry the phase and the module path of the failed one."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4)))
    for failing in (model, split(nn.Sequential(*model, nn.ReLU()), "0").trunk):
        with pytest.raises(GraphError, match="cannot be captured"):
            capture_encode(failing, FLOATS)
        graph = simple(lambda s, d: ({"y": d["x"] * 2.0}, {}))
        assert [n.meta.get("custom") for n in graph.operators] in ([None], [{}])


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.half() * 2).float()


KINDS: dict[str, tuple[nn.Module, str]] = {
    "half": (Halves(), r"in 1 works in float16, which is not supported, convert the model with float\(\)"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_layer_does_wrong_is_said_with_its_path(name: str) -> None:
    layer, message = KINDS[name]
    model = nn.Sequential(nn.Conv2d(2, 2, 1), layer, nn.Conv2d(2, 2, 1))
    with pytest.raises(UnsupportedOperatorError, match=rf"^step 'encode': operator [^\n]*{message}[^\n]*$"):
        build_step(capture_encode(model, TensorSpec("x", (1, 2, 4, 4), "float32")))


def test_batch_norm_in_training_mode_needs_its_statistics_as_state() -> None:
    """They would change unseen; where they are state, the step returns them."""
    norm = nn.BatchNorm2d(3, momentum=0.2)
    with pytest.raises(GraphError, match=r"step 'encode': .*norm in 1 is in training mode .* no state of this step; call model\.eval"):
        capture_encode(nn.Sequential(nn.Conv2d(2, 3, 1), norm).train(), TensorSpec("x", (2, 2, 4, 4), "float32"))
    state = {name: value.detach().clone() for name, value in norm.state_dict().items()}

    def run(state: Any, data: Any) -> Any:
        new = {name: value.clone() for name, value in state.items()}
        return {"y": torch.func.functional_call(norm.train(), new, (data["x"],))}, new

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    graph = trace("learn", run, state, {"x": TensorSpec("x", (2, 3, 4, 4), "float32")}, [norm])
    y, *found = graph.run(*({**state, "x": x}[p.name] for p in graph.inputs))
    norm.load_state_dict(state)
    torch.testing.assert_close(y, norm.train()(x), rtol=1e-5, atol=1e-6)
    for port, got in zip(graph.outputs[1:], found, strict=True):
        torch.testing.assert_close(got, norm.state_dict()[port.name], rtol=1e-5, atol=1e-6)


def test_a_forward_operator_at_the_top_level_is_not_laid_to_another_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).cumprod(1)  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedOperatorError, match=r"aten\.cumprod\.default in the model's top level is not supported"):
        build_step(capture_encode(Model(), FLOATS))


def test_a_size_that_depends_on_values_is_refused() -> None:
    with pytest.raises(GraphError, match=r"^step 'learn': operator aten\.index\.Tensor in the model's top level makes a number or a shape"):
        simple(lambda s, d: ({"y": d["x"][d["x"] > 0].sum()}, {}))


def test_dropout_of_a_trunk_in_train_mode_is_refused() -> None:
    with pytest.raises(GraphError, match=r"step 'encode': draws random numbers.*eval mode"):
        capture_encode(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train(), FLOATS)
    capture_encode(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(), FLOATS)


def test_a_trunk_may_return_several_tensors() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"left": x * 2.0, "right": x.sum(1)}

    graph = capture_encode(Two(), FLOATS)
    assert [(p.name, p.spec.shape) for p in graph.outputs] == [("z.left", (2, 3)), ("z.right", (2,))]


@pytest.mark.parametrize("method", METHODS)
def test_graphs_equal_the_eager_function(method: str, tools: Any, bench: Any, generator: torch.Generator) -> None:
    """Captured, canonical and lowered graph in PyTorch, and the lowered one on ONNX Runtime, on random states and inputs."""
    learner = tools.make_learner(method)
    for step in learner.steps:
        captured = capture(learner, step)
        values = {**tools.random_state(learner, generator), **tools.random_inputs(captured, generator)}
        state = {name: values[name] for name in learner.init()}
        before = {name: value.clone() for name, value in values.items()}
        outputs, new = call_step(learner, step, state, unflatten_like(learner.inputs_of(step), values))
        want = [*flatten_tree(outputs).values(), *new.values()]
        assert [p.name for p in captured.outputs] == [*flatten_tree(outputs), *new]
        for got, reference, port in zip(captured.run(*(values[p.name] for p in captured.inputs)), want, captured.outputs, strict=True):
            # PyTorch has batch norm in training as one kernel; a graph has it written out, with other roundings. A square has twice
            # their share.
            square = 2 if port.name.startswith("adam_v.") else 1
            tools.assert_close(got, reference, square * 1e-5 if step == "adapt" else 1e-6)
        graph = canonicalise(captured)
        lowered = lower(graph)
        for form in (graph, lowered):
            for got, reference in zip(form.run(*(values[p.name] for p in form.inputs)), want, strict=True):
                tools.assert_close(got, reference, 1e-4 if step == "adapt" else 1e-5)
        prefixed = {("state." if p.kind == "state" else "") + p.name: values[p.name] for p in lowered.inputs}
        for got, reference, port in zip(bench.onnx(lowered, prefixed), want, lowered.outputs, strict=True):
            if port.spec.dtype == "uint8":
                assert (got.int() - reference.int()).abs().max() <= 1  # a code may fall on either side of a rounding
            else:
                tools.assert_close(got, reference, 1e-4, f"{step} {port.name}")
        for name, value in values.items():
            assert torch.equal(value, before[name])


INF, NAN = float("inf"), float("nan")
POISON = {"nan": [NAN], "inf": [INF], "-inf": [-INF], "pair": [INF, -INF]}


@pytest.mark.parametrize("poison", POISON)
def test_all_finite_sees_every_tensor(poison: str, bench: Any) -> None:
    """Also a pair of opposite infinities within one tensor or across two, whose sum a runtime could take for a number."""

    def run(*tensors: Tensor) -> Tensor:
        return all_finite({str(i): t for i, t in enumerate(tensors)})

    clean = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.ones(3, dtype=torch.float64), torch.ones(()), torch.arange(3)]
    session = bench.session(bench.lowered(run, *clean))

    def verdict(tensors: list[Tensor]) -> bool:
        (found,) = session.run(None, {i.name: tensors[int(i.name[1:])].numpy() for i in session.get_inputs()})
        assert bool(found) == bool(run(*tensors))
        return bool(found)

    assert verdict(clean)
    for index, tensor in enumerate(clean[:3]):
        bad = [t.clone() for t in clean]
        for place, value in zip((0, -1), POISON[poison], strict=False):
            bad[index].view(-1)[place if tensor.dim() else 0] = value
        assert not verdict(bad)
    across = [t.clone() for t in clean]
    across[0][1, 1], across[1][2] = POISON[poison][0], POISON[poison][-1]
    assert not verdict(across)


def poisoned(learner: Learner, state: dict[str, Tensor], name: str, values: list[float]) -> dict[str, Tensor]:
    """The state with bad values at the end of one tensor: in class 2 or later, which the sample's class 0 leaves alone."""
    tensor = state[name].clone()
    flat = tensor.view(-1)
    for place, value in zip((-1, -2), values, strict=False):
        flat[max(place, -flat.numel())] = value
    return {**state, name: tensor}


@pytest.mark.parametrize("method", LEARNING)
def test_an_update_from_a_state_that_is_not_finite_is_reported(method: str, tools: Any, bench: Any, generator: torch.Generator) -> None:
    config = {"optimizer": "adam"} if method == "finetune" else {}
    learner = tools.make_learner(method, **config)
    graph = lower(canonicalise(capture(learner, "learn")))
    session = bench.session(graph)
    finite = [p.name for p in graph.outputs].index("finite")
    inputs = {**tools.random_inputs(graph, generator), "target": torch.tensor([0])}
    clean = {**tools.random_state(learner, generator), **inputs}

    def verdicts(values: dict[str, Tensor]) -> tuple[bool, bool, bool]:
        eager = graph.run(*(values[p.name] for p in graph.inputs))
        states = [t for t, p in zip(eager, graph.outputs, strict=True) if p.kind == "state"]
        (found,) = session.run(["finite"], {("state." if p.kind == "state" else "") + p.name: values[p.name].numpy() for p in graph.inputs})
        return bool(found), bool(eager[finite]), all(bool(torch.isfinite(t).all()) for t in states)

    assert verdicts(clean) == (True, True, True)
    for name in (name for name, tensor in learner.init().items() if tensor.is_floating_point()):
        for kind, values in POISON.items():
            found = verdicts(poisoned(learner, clean, name, values))
            if (name, kind) == ("min_s", "inf"):
                assert found == (True, True, True)  # the smallest of infinity and s is s
            else:
                assert found == (False, False, False), (name, kind)


def test_a_suffix_with_dropout_is_captured_in_eval_mode() -> None:
    suffix = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    learner = Finetune(Problem(TensorSpec("z", (1, 6), "float32"), 3), suffix=suffix)
    assert "dropout" not in {str(n.target) for n in capture(learner, "learn").operators}


class Shared(nn.Module):
    """What users' models do: in-place activations and additions, one layer used twice, ``same`` padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding="same")
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.act(self.first(x)))
        y += x
        y = self.act(y)
        return self.head(y.amax((2, 3)))  # type: ignore[no-any-return]


class Signal(nn.Module):
    """A net for [N, 4, 49] samples of a signal, seen as 1-D."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 6, 5, stride=2, padding=2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(3, 2, 1),
            nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.Tanh(), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("net", [Shared, Signal])
def test_idioms_of_user_models(net: type[nn.Module], tools: Any, bench: Any, generator: torch.Generator) -> None:
    suffix = net().eval()
    for value in suffix.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.3
    learner = Finetune(Problem(TensorSpec("z", (1, 4, 7, 7), "float32"), 5), suffix=suffix)
    graphs = {step: build_step(capture(learner, step)).graph for step in learner.steps}
    graphs["encode"] = build_step(capture_encode(suffix, TensorSpec("x", (1, 4, 7, 7), "float32"))).graph
    values = {**tools.random_state(learner, generator), **tools.random_inputs(graphs["learn"], generator)}
    values["x"] = values["z"].clone()
    state = {name: values[name] for name in learner.init()}
    for step, graph in graphs.items():
        if step == "encode":
            want = [suffix(values["x"])]
        else:
            outputs, new = call_step(learner, step, state, unflatten_like(learner.inputs_of(step), values))
            want = [*outputs.values(), *new.values()]
        named = {("state." if p.kind == "state" else "") + p.name: values[p.name] for p in graph.inputs}
        for got, reference, port in zip(bench.onnx(graph, named), want, graph.outputs, strict=True):
            tools.assert_close(got, reference.detach(), 1e-4, f"{step} {port.name}")
    assert torch.equal(values["x"], values["z"])


def test_a_state_and_an_input_of_one_name_are_refused() -> None:
    with pytest.raises(GraphError, match=r"step 'learn': \['x'\] name both a state tensor and an input; rename one"):
        simple(lambda s, d: ({"y": d["x"] + s["x"]}, {}), {"x": torch.zeros(2, 3)})
