"""Layers of users' models: each in the frozen trunk and, where it is claimed, in a trained suffix, on ONNX Runtime against PyTorch.

The table in docs/contract.md is checked against the one here.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecl.graph.capture import capture, capture_encode
from edgecl.graph.lowering import BuiltStep, build_step
from edgecl.graph.step import UnsupportedOperatorError, shape_of
from edgecl.learner import Problem
from edgecl.methods import Finetune
from edgecl_device.manifest import TensorSpec

DOC = Path(__file__).parents[2] / "docs" / "contract.md"


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Along(nn.Module):
    """A layer on the channels as last dimension, as in ConvNeXt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Signal(nn.Module):
    """A layer for [N, C, L]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(2))
        return y


BOTH, TRUNK = "yes", "-"
LAYERS: dict[str, tuple[str, list[Callable[[], nn.Module]]]] = {
    "Linear": (BOTH, [lambda: Along(nn.Linear(4, 3)), lambda: nn.Linear(6, 5, bias=False)]),
    "Conv1d, Conv2d": (
        BOTH,
        [lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), lambda: nn.Conv2d(4, 4, 3, dilation=2), lambda: Signal(nn.Conv1d(4, 4, 5))],
    ),
    "ConvTranspose1d, ConvTranspose2d": (
        TRUNK,
        [lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, 1), lambda: Signal(nn.ConvTranspose1d(4, 2, 3))],
    ),
    "BatchNorm1d, BatchNorm2d (stored statistics)": (BOTH, [lambda: nn.BatchNorm2d(4), lambda: Signal(nn.BatchNorm1d(4))]),
    "LayerNorm": (
        BOTH,
        [lambda: Along(nn.LayerNorm(4)), lambda: nn.LayerNorm((8, 6)), lambda: nn.LayerNorm(6, elementwise_affine=False)],
    ),
    "GroupNorm": (BOTH, [lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(1, 4), lambda: nn.GroupNorm(4, 4, affine=False)]),
    "ReLU, ReLU6, Hardtanh": (BOTH, [lambda: nn.ReLU(inplace=True), nn.ReLU6, lambda: nn.Hardtanh(-0.3, 0.4)]),
    "LeakyReLU, PReLU, RReLU (not in training)": (
        BOTH,
        [lambda: nn.LeakyReLU(0.1, inplace=True), nn.PReLU, lambda: nn.PReLU(4), nn.RReLU, lambda: nn.RReLU(0.2, 0.7, inplace=True)],
    ),
    "ELU, CELU, SELU": (BOTH, [lambda: nn.ELU(0.7), lambda: nn.CELU(1.3), nn.SELU]),
    "Sigmoid, Tanh": (BOTH, [nn.Sigmoid, nn.Tanh]),
    "Hardsigmoid, Hardswish": (BOTH, [nn.Hardsigmoid, lambda: nn.Hardswish(inplace=True)]),
    "SiLU": (BOTH, [nn.SiLU]),
    "GELU": (BOTH, [nn.GELU, lambda: nn.GELU("tanh")]),
    "Softplus": (BOTH, [nn.Softplus, lambda: nn.Softplus(2.0, 1.0)]),
    "Mish": (TRUNK, [nn.Mish]),
    "GLU": (BOTH, [lambda: nn.GLU(1)]),
    "Softmax, LogSoftmax": (BOTH, [lambda: nn.Softmax(1), lambda: nn.LogSoftmax(-1)]),
    "MaxPool1d, MaxPool2d": (BOTH, [lambda: nn.MaxPool2d(3, 2, 1), lambda: Signal(nn.MaxPool1d(3, 2, 1))]),
    "AvgPool1d, AvgPool2d": (BOTH, [lambda: nn.AvgPool2d(3, 2, 1), lambda: Signal(nn.AvgPool1d(2))]),
    "AdaptiveAvgPool1d, AdaptiveAvgPool2d": (
        BOTH,
        [
            lambda: nn.AdaptiveAvgPool2d(1),
            lambda: nn.AdaptiveAvgPool2d((4, 3)),
            lambda: nn.AdaptiveAvgPool2d((3, 4)),
            lambda: nn.AdaptiveAvgPool2d((5, None)),
            lambda: nn.AdaptiveAvgPool2d(9),
            lambda: Signal(nn.AdaptiveAvgPool1d(7)),
        ],
    ),
    "AdaptiveMaxPool1d, AdaptiveMaxPool2d (to sizes that divide the input's)": (
        BOTH,
        [lambda: nn.AdaptiveMaxPool2d(1), lambda: nn.AdaptiveMaxPool2d((4, 3)), lambda: Signal(nn.AdaptiveMaxPool1d(1))],
    ),
    "mean, amax over dimensions": (BOTH, [lambda: Do(lambda x: x.mean((2, 3), keepdim=True)), lambda: Do(lambda x: x.amax((2, 3)))]),
    "Upsample, interpolate: nearest, by whole factors": (
        BOTH,
        [lambda: nn.Upsample(scale_factor=2), lambda: nn.Upsample(size=(8, 18)), lambda: Signal(nn.Upsample(scale_factor=3))],
    ),
    "the same to other sizes": (TRUNK, [lambda: nn.Upsample(size=(11, 5)), lambda: nn.Upsample(scale_factor=1.3)]),
    "ZeroPad1d, ZeroPad2d": (BOTH, [lambda: nn.ZeroPad2d((1, 2, 0, 1)), lambda: Signal(nn.ZeroPad1d(2))]),
    "ReflectionPad1d, ReflectionPad2d": (TRUNK, [lambda: nn.ReflectionPad2d((1, 2, 3, 0)), lambda: Signal(nn.ReflectionPad1d((4, 2)))]),
    "ReplicationPad1d, ReplicationPad2d": (TRUNK, [lambda: nn.ReplicationPad2d((1, 2, 3, 0)), lambda: Signal(nn.ReplicationPad1d(3))]),
    "PixelShuffle, PixelUnshuffle, ChannelShuffle": (
        BOTH,
        [lambda: nn.PixelShuffle(2), lambda: nn.PixelUnshuffle(2), lambda: nn.ChannelShuffle(2)],
    ),
    "split, chunk, unbind": (
        BOTH,
        [
            lambda: Do(lambda x: torch.cat([x.split(3, 1)[1], x.split([1, 3], 1)[1] * 2.0], 1)),
            lambda: Do(lambda x: torch.cat(x.chunk(3, 2)[::-1], 2)),
            lambda: Do(lambda x: torch.stack(x.unbind(1)[1:], 1)),
        ],
    ),
    "slices, indices": (
        BOTH,
        [
            lambda: Do(lambda x: x[:, 1:, -3:]),
            lambda: Do(lambda x: x[..., ::2] + x[..., 1::2] * x[:, -1:, :, ::2]),
            lambda: Do(lambda x: x[:, :, 1::3]),
            lambda: Do(lambda x: x[:, -1]),
        ],
    ),
    "cat, stack, flatten, reshape, permute": (
        BOTH,
        [
            lambda: Do(lambda x: torch.cat([x, x.relu()], 1).permute(0, 2, 1, 3)),
            lambda: Do(lambda x: torch.stack([x, x * x]).reshape(-1, 24)),
        ],
    ),
    "+, -, *, /, matmul": (BOTH, [lambda: Do(lambda x: x * x / (1.0 + x * x) - x), lambda: Do(lambda x: x @ x.transpose(2, 3))]),
    "functional.normalize": (BOTH, [lambda: Do(lambda x: F.normalize(x, dim=1))]),
    "Identity, Flatten, Dropout (not in training)": (BOTH, [lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Flatten())]),
}
CASES = [(name, i) for name, (_, layers) in LAYERS.items() for i in range(len(layers))]
SHAPE = (1, 4, 8, 6)


class Whole(nn.Module):
    """A trained convolution in front, so that the layer passes a gradient on, and a head behind."""

    def __init__(self, layer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1, bias=False)  # a norm would take a bias out again: no gradient to compare
        self.layer = layer
        with torch.no_grad():
            self.head = nn.Linear(layer(torch.zeros(SHAPE)).numel(), 3)  # scores [N, 3]
        fill(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(self.first(x)).reshape(len(x), -1))
        return y


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Weights and statistics that are not the usual zeros and ones."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            wide = value.dim() > 1
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3 if wide else torch.rand(value.shape, generator=generator) + 0.3)


def learner_of(net: nn.Module) -> Finetune:
    spec = TensorSpec("z", SHAPE, "float32")
    return Finetune(Problem(spec, 3), Finetune.Config(trainable=("*",)), suffix=net)


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_in_the_trunk(name: str, i: int, bench: Any, tools: Any, generator: torch.Generator) -> None:
    layer = LAYERS[name][1][i]().eval()
    fill(layer, generator)
    graph = build_step(capture_encode(layer, TensorSpec("x", SHAPE, "float32"))).graph
    x = torch.randn(SHAPE, generator=generator) * 3
    (got,) = bench.onnx(graph, {"x": x.clone()})
    tools.assert_close(got, layer(x).detach(), 1e-5)


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_on_channels_last(name: str, i: int, bench: Any, tools: Any, generator: torch.Generator) -> None:
    """As an image of shape HWC comes out of preprocessing: PyTorch then takes other kernels, and other operators."""
    layer = LAYERS[name][1][i]().eval()
    fill(layer, generator)
    net = nn.Sequential(Do(lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), layer)
    graph = build_step(capture_encode(net, TensorSpec("x", SHAPE, "float32"))).graph
    x = torch.randn(SHAPE, generator=generator) * 3
    (got,) = bench.onnx(graph, {"x": x.clone()})
    tools.assert_close(got, layer(x).detach(), 1e-5)
    if LAYERS[name][0] == BOTH:
        whole = Whole(LAYERS[name][1][i]().eval(), generator)
        whole.layer = nn.Sequential(net[0], whole.layer)
        if getattr(layer, "inplace", False):  # directly behind the permutation: PyTorch's gradient of that sets strides
            with pytest.raises(UnsupportedOperatorError, match=r"step 'bench': operator aten\.copy\.default"):
                check_gradients(whole, 2, bench, generator)
            whole.layer = nn.Sequential(net[0], nn.Conv2d(4, 4, 1, bias=False), whole.layer[1])
        check_gradients(whole, 2, bench, generator)


@pytest.mark.parametrize(("name", "i"), [c for c in CASES if LAYERS[c[0]][0] == BOTH], ids=str)
def test_in_a_trained_suffix(name: str, i: int, bench: Any, generator: torch.Generator) -> None:
    """Output and gradient of every parameter, of a layer in front, too, with the new sample and a stored row."""
    check_gradients(Whole(LAYERS[name][1][i]().eval(), generator), 2, bench, generator)


def check_gradients(net: nn.Module, rows: int, bench: Any, generator: torch.Generator) -> None:
    """ONNX Runtime against PyTorch's autograd."""
    weights = {name: value.detach() for name, value in net.named_parameters()}
    x, cotangent = torch.randn(rows, *SHAPE[1:], generator=generator), torch.randn(rows, 3, generator=generator)

    def run(z: Tensor, g: Tensor, *values: Tensor) -> list[Tensor]:
        def scores(*tensors: Tensor) -> Tensor:
            return torch.func.functional_call(net, dict(zip(weights, tensors, strict=True)), (z,))  # type: ignore[no-any-return]

        y, pullback = torch.func.vjp(scores, *values)
        return [y, *pullback(g)]

    bench.check(run, x, cotangent, *weights.values(), bar=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in run(x, cotangent, *weights.values()))


@pytest.mark.parametrize("name", [name for name, (where, _) in LAYERS.items() if where == TRUNK])
def test_what_only_the_trunk_takes_is_refused_in_a_suffix(name: str, generator: torch.Generator) -> None:
    for make in LAYERS[name][1]:
        net = Whole(make().eval(), generator)
        with pytest.raises(
            UnsupportedOperatorError, match=r"^step 'learn': operator \S+ in layer(\.layer)? is .*; replace it in the model, or"
        ):
            build_step(capture(learner_of(net), "learn"))
        build_step(capture(learner_of(net), "predict"))


def test_the_docs_list_exactly_these_layers() -> None:
    section = DOC.read_text(encoding="utf-8").partition("## Layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!layer|---)(.+?) \| (yes|-) \| (yes|-) \|$", section, re.MULTILINE)
    assert rows == [(name, "yes", where) for name, (where, _) in LAYERS.items()]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, 2, 1)
        self.fc2 = nn.Conv2d(2, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gate(self.fc2(F.relu(self.fc1(self.pool(x)))))
        return y * x


class MobileNetV3Block(nn.Module):
    """Howard et al. 2019, "Searching for MobileNetV3": expand, depthwise, squeeze and excite, project; hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True),
            nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True),
            SqueezeExcite(8), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022, "A ConvNet for the 2020s": depthwise 7x7, layer norm, two linear layers with GELU, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.body = nn.Sequential(nn.LayerNorm(4, eps=1e-6), nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.body(self.depthwise(x).permute(0, 2, 3, 1))
        return x + y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("block", [MobileNetV3Block, ConvNeXtBlock])
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_of_known_networks(block: type[nn.Module], rows: int, bench: Any, tools: Any, generator: torch.Generator) -> None:
    """In the trunk, and a learning step on ``rows`` samples: ONNX Runtime against eager."""
    net = Whole(block().eval(), generator)
    encode: BuiltStep = build_step(capture_encode(net, TensorSpec("x", SHAPE, "float32")))
    x = torch.randn(SHAPE, generator=generator)
    tools.assert_close(bench.onnx(encode.graph, {"x": x})[0], net(x).detach(), 1e-5)
    check_gradients(net, rows, bench, generator)


def test_a_fill_becomes_a_number(bench: Any) -> None:
    """Autograd subtracts from a tensor of ones in SiLU's gradient: as a constant, the bundle would hold it in full size."""
    graph = bench.lowered(lambda x, g: torch.func.vjp(F.silu, x)[1](g)[0], torch.randn(3, 40), torch.randn(3, 40))
    assert all(t.numel() <= 1 for t in graph.constants().values())
    assert all(shape_of(n) == (3, 40) for n in graph.operators)
