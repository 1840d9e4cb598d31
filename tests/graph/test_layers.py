"""Layers of users' models: each in the frozen trunk and in a trained suffix, on ONNX Runtime against PyTorch.

The table in docs/contract.md is checked against the one here.
"""

import importlib.util
import re
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

_spec = importlib.util.spec_from_file_location("edgecl_layer_table", Path(__file__).with_name("layers.py"))  # test files import no other
assert _spec is not None and _spec.loader is not None
table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(table)
LAYERS, SHAPE, Do, Lookup, Whole, fill = table.LAYERS, table.SHAPE, table.Do, table.Lookup, table.Whole, table.fill


CASES = [(name, i) for name, (_, layers) in LAYERS.items() for i in range(len(layers))]


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
    whole = Whole(LAYERS[name][1][i]().eval(), generator)
    whole.layer = nn.Sequential(net[0], whole.layer)
    if getattr(layer, "inplace", False):  # directly behind the permutation: PyTorch's gradient of that sets strides
        with pytest.raises(UnsupportedOperatorError, match=r"step 'bench': operator aten\.copy\.default"):
            check_gradients(whole, 2, bench, generator)
        whole.layer = nn.Sequential(net[0], nn.Conv2d(4, 4, 1, bias=False), whole.layer[1])
    check_gradients(whole, 2, bench, generator)


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
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


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
        lambda: Do(lambda x: x.cumprod(2)),
        lambda: Lookup(nn.Embedding(4, 5, scale_grad_by_freq=True)),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_name(layer: Any, generator: torch.Generator) -> None:
    net = Whole(layer().eval(), generator)
    with pytest.raises(UnsupportedOperatorError, match=r"^step 'learn': operator aten\S+ in layer\S* is .*; replace it in the model, or"):
        build_step(capture(learner_of(net), "learn"))


def test_the_docs_list_exactly_these_layers() -> None:
    section = DOC.read_text(encoding="utf-8").partition("## Layers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!layer|---)(.+?) \| (yes|-) \| (yes|-) \|$", section, re.MULTILINE)
    assert rows == [(name, "yes", executorch) for name, (executorch, _) in LAYERS.items()]


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
