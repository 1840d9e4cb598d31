"""Layers in two parts, one of which learns: what the whole layer computes, and state, gradients and costs of the part alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, SplitError, prepare, split_channels
from edgecl.graph.lowering import build
from edgecl_device import Learner
from edgecl_export import export

LAYERS = {
    "linear": (nn.Linear(6, 5), (2, 6)),
    "linear of sequences": (nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "1-D": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2-D": (nn.Conv2d(4, 8, 3, padding=1, bias=False), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("channels", [[0, 1], [1, 3], [4, 0, 2]], ids=str)
def test_both_parts_compute_what_the_layer_does(name, channels):
    layer, shape = LAYERS[name]
    net = nn.Sequential(layer, nn.ReLU())
    before = copy.deepcopy(net.state_dict())
    parts = split_channels(net, {"0": channels})
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts(x), net(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(parts.get_parameter("0.trained.weight"), layer.weight[sorted(channels)])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items()), "the model itself is not touched"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16).eval()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.fc = nn.Linear(16, 4)
        for tensor in (*self.parameters(), self.norm.running_var, self.norm.running_mean):
            tensor.data = torch.rand(tensor.shape, generator=generator) - 0.3 * (tensor.dim() > 1)

    def forward(self, x):
        y = F.relu6(self.norm(self.expand(F.relu(self.stem(x)))))
        return self.fc(F.relu(self.depthwise(y)).mean((2, 3)))


@pytest.fixture(scope="module")
def trained():
    """The net with a quarter of the channels of two layers to train, others than the first."""
    net = Net().eval()
    chosen = {"expand": [1, 5, 6, 15], "depthwise": [0, 1, 2, 3]}
    x = np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32)
    config = METHODS["finetune"].Config(lr=0.1, trainable=("*.trained.*",))
    ready = prepare(split_channels(net, chosen), at="stem", example=x[:1], method="finetune", classes=4, config=config)
    return net, chosen, x, ready.fit(x, np.arange(8) % 4)


def test_the_device_learns_those_channels_and_no_others(trained, tmp_path):
    """One update on ONNX Runtime is autograd's on the whole net, of which those rows are taken."""
    net, chosen, x, ready = trained
    net.zero_grad()
    F.cross_entropy(net(torch.tensor(x[:1])), torch.tensor([2])).backward()
    with Learner.load(export(ready, tmp_path / "b").path) as learner:
        before = learner.state()
        learner.learn(x[0], 2)
        after = learner.state()
    assert sorted(name for name in before if name.startswith("param.")) == ["param.depthwise.trained.weight", "param.expand.trained.weight"]
    for name, channels in chosen.items():
        layer = net.get_submodule(name)
        moved = after[f"param.{name}.trained.weight"] - before[f"param.{name}.trained.weight"]
        np.testing.assert_allclose(moved, -0.1 * layer.weight.grad[channels].numpy(), rtol=1e-4, atol=1e-7)


def test_the_cost_is_that_of_the_slices(trained):
    """Weight gradients of a quarter of the channels, by hand: positions x inputs a channel x trained channels x taps."""
    _, _, _, ready = trained
    found = build(ready)["learn"].layers
    weights = {path: phases["weight_gradient"] for path, phases in found.items() if "weight_gradient" in phases}
    assert weights == {"expand.trained": 64 * 6 * 4, "depthwise.trained": 64 * 9 * 4}


@pytest.mark.parametrize(
    ("model", "channels", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4)), {"1": [0]}, "must be of an nn.Linear, nn.Conv1d or nn.Conv2d, got '1'; choose some of: 0"),
        (nn.Sequential(nn.ReLU()), {"0": [0]}, r"got '0'; choose some of: \(none\)"),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), {"0": [0]}, "must have one group, or one a channel, got 2 groups"),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), {"0": [0]}, "must have one group, or one a channel, got 4 groups"),
        *[
            (nn.Sequential(nn.Linear(3, 4)), {"0": wrong}, r"of '0' must be different integers below 4, at least one and not all, got \[")
            for wrong in ([], [4], [-1], [0, 0], [0, 1, 2, 3], [1.0], [True])
        ],
    ],
)
def test_wrong_layers_and_channels_are_named(model, channels, message):
    with pytest.raises(SplitError, match=f"^channels: .*{message}"):
        split_channels(model, channels)
