"""The eager engine on another device. ``meta`` stands in for one: most operators refuse to mix it with the CPU."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from edgecl import METHODS, EagerEngine, prepare
from edgecl import engine as engine_module
from edgecl.engine import copies_on
from edgecl.learner import call_encode, call_step
from edgecl_device.errors import InputError
from edgecl_device.manifest import TensorSpec


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("sparcl", {"granularity": "structured", "distill": 0.1, "skip_above": 0.9}),
        ("sparcl", {"granularity": "unstructured", "distill": 0.1, "skip_above": 0.9}),
        ("latent_replay", {"codec": "pq"}),
        ("ridge", {}),
        ("bn_stats", {"statistics": "rows"}),
        ("eata", {}),
        ("affine_warmup", {}),
        ("cotta", {"views": 2}),
        ("ecotta", {"parts": ("4",)}),
        ("ecotta", {"parts": ("4",), "detached": False, "pull": "outputs"}),
    ],
)
def test_nothing_stays_behind(method: str, config: dict[str, Any]) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 4),
    ).eval()  # fmt: skip
    x = np.random.default_rng(0).random((80, 1, 8, 8)).astype(np.float32)
    config = METHODS[method].Config(**config)
    prepared = prepare(net, at="1", example=x[:1], method=method, classes=4, config=config).fit(x, np.arange(80) % 4)
    _, twin = copies_on("cpu", (prepared.trunk, prepared.learner))
    for step in prepared.learner.steps:
        generator = torch.Generator().manual_seed(0)

        def drawn(spec: TensorSpec, generator: torch.Generator = generator) -> torch.Tensor:
            return (torch.rand(spec.shape, generator=generator) * 3).to(getattr(torch, spec.dtype))

        inputs = tree_map(drawn, prepared.learner.inputs_of(step), is_leaf=lambda part: isinstance(part, TensorSpec))
        with torch.no_grad():
            for mine, other in zip(
                call_step(prepared.learner, step, prepared.state, inputs), call_step(twin, step, prepared.state, inputs), strict=True
            ):
                assert mine.keys() == other.keys()
                assert all(torch.equal(mine[name], other[name]) for name in mine), step

    trunk, learner = copies_on("meta", (prepared.trunk, prepared.learner))
    state = {name: tensor.to("meta") for name, tensor in prepared.state.items()}

    def made(spec: TensorSpec) -> torch.Tensor:
        return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))

    with torch.no_grad(), torch.device("meta"):
        z, _ = call_encode(trunk, torch.zeros(1, 1, 8, 8), {})
        assert {tensor.device.type for tensor in z.values()} == {"meta"}
        for step in learner.steps:
            inputs = tree_map(made, learner.inputs_of(step), is_leaf=lambda part: isinstance(part, TensorSpec))
            outputs, new = call_step(learner, step, state, inputs)
            assert {tensor.device.type for tensor in (*outputs.values(), *new.values())} == {"meta"}, step


def test_a_device_that_is_not_there_is_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    prepared = prepare(net, at="0", example=np.zeros((1, 4), np.float32), method="ncm", classes=2)
    odd: Any
    for odd in ("nowhere", "", "meta", "cuda:99", "hpu", "xla", "cpu\0", "x" * 10_000, 0, None, ["cpu"], b"cpu", torch.device("cpu")):
        with pytest.raises(InputError, match=r"^device: must be a device that PyTorch has here, as 'cpu' or 'cuda', got ") as told:
            EagerEngine(prepared.trunk, prepared.learner, odd)
        assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_arrays_go_there_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """``cpu:0`` goes the way of another device, with copies."""
    monkeypatch.setattr(engine_module, "parts_on", lambda device, parts: copies_on(device, parts) if ":" in device else parts)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    x = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    prepared = prepare(net, at="0", example=x[:1], method="ridge", classes=2).fit(x, np.arange(6) % 2)
    found = []
    for device in ("cpu", "cpu:0"):
        engine = EagerEngine(prepared.trunk, prepared.learner, device)
        engine.load({name: tensor.numpy() for name, tensor in prepared.state.items()})
        z = engine.run("encode", {"x": x[:1]})
        engine.run("learn", {**z, "target": np.array([1]), "weight": np.ones(1, np.float32)})
        engine.commit()
        found.append(engine.state())
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def normed() -> torch.nn.Module:
    """Of one norm, the same each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    ).eval()


def test_a_warm_up_on_copies_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).random((20, 1, 8, 8)).astype(np.float32), np.arange(20) % 2
    here, there = (prepare(normed(), at="0", example=x[:1], method="affine_warmup", classes=2) for _ in range(2))
    here.fit(x, y)
    own = there.learner
    monkeypatch.setattr(sys.modules["edgecl.prepare"], "parts_on", copies_on)
    there.fit(x, y)
    assert there.learner is own and not torch.equal(here.state["param.1.weight"], torch.ones(4))
    assert all(torch.equal(value, there.state[name]) for name, value in here.state.items())


def test_a_warm_up_on_no_device_changes_nothing() -> None:
    x = np.random.default_rng(0).random((20, 1, 8, 8)).astype(np.float32)
    prepared = prepare(normed(), at="0", example=x[:1], method="affine_warmup", classes=2)
    before = prepared.state
    with pytest.raises(InputError, match=r"^device: must be a device that PyTorch has here"):
        prepared.fit(x, np.arange(20) % 2, device="nowhere")
    assert prepared.state is before and not prepared.examples


def test_what_pickle_does_not_find_is_told() -> None:
    class Local(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(
        InputError, match=r"^device: the model .* such that pickle saves them, for a copy on 'cuda' .*Local.*; define classes"
    ):
        copies_on("cuda", Local())
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"^device: the model .* for a copy on 'cuda' .*parametrized.*; .* remove parametrizations"):
        copies_on("cuda", layer)
