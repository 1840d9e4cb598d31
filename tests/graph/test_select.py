"""Channels of a weight gradient that are chosen are the only ones that are computed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgecl.graph import cost
from edgecl.graph.capture import trace
from edgecl.graph.lowering import canonicalise
from edgecl.graph.passes import SelectChannels
from edgecl.graph.phases import value_and_gradient
from edgecl_device.manifest import TensorSpec

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.front(x).relu())
        return y


def traced(axis: int, count: int, twice: bool = False) -> Any:
    """A step that gives the gradient of some channels of the second convolution, and the other gradients."""
    net = Net().requires_grad_(False)
    names = [name for name, _ in net.named_parameters()]

    def run(state: dict[str, Tensor], data: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            y = torch.func.functional_call(net, parameters, (data["x"],))
            return (y * y).sum(), {}

        _, _, gradient = value_and_gradient(loss, {name: state[name] for name in names}, torch.ones(()))
        part = gradient["conv.weight"].index_select(axis, data["i"])
        outputs = {"part": part, "front": gradient["front.weight"], "bias": gradient["conv.bias"]}
        return ({**outputs, "whole": gradient["conv.weight"] * 1.0} if twice else outputs), {}

    inputs = {"x": TensorSpec("x", (2, 3, 5, 5), "float32"), "i": TensorSpec("i", (count,), "int64")}
    return trace("learn", run, dict(net.named_parameters()), inputs, [net])


@pytest.mark.parametrize(("axis", "index"), [(0, [5, 2]), (1, [0, 4, 3])])
def test_chosen_channels_are_computed_and_no_others(axis: int, index: list[int]) -> None:
    whole, generator = traced(axis, len(index)), torch.Generator().manual_seed(0)
    given = [torch.tensor(index) if p.name == "i" else torch.randn(p.spec.shape, generator=generator) for p in whole.inputs]
    before = cost.count(whole.copy()).macs
    wanted = whole.run(*given)
    small = SelectChannels()(canonicalise(whole))
    for name, found, reference in zip([p.name for p in small.outputs], small.run(*given), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5, msg=name)
    after = cost.count(small).macs
    assert {k: v for k, v in after.items() if k != "weight_gradient"} == {k: v for k, v in before.items() if k != "weight_gradient"}
    conv = 2 * 8 * 9 * 6 * 9  # samples, channels, positions, channels, taps
    assert before["weight_gradient"] - after["weight_gradient"] == conv - conv * len(index) // (8, 6)[axis]


def test_a_gradient_that_is_read_as_a_whole_is_computed_once() -> None:
    whole = traced(0, 2, twice=True)
    before = cost.count(whole.copy()).macs
    assert cost.count(SelectChannels()(canonicalise(whole))).macs == before
