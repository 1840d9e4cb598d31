"""Layers of users' models, with what is claimed of each: in the frozen trunk, and in a trained suffix.

The tests of both runtimes go through this table, and the one in docs/contract.md is checked against it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Steps(nn.Module):
    """A layer for sequences [N, 3, C], of which the first result is taken; short, as recurrent layers are unrolled."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x[:, :, :3, 0].transpose(1, 2))
        return y[0] if isinstance(y, tuple) else y


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence [N, T, C] on itself; also with a mask, and with the weights."""

    def __init__(self, masked: bool, weights: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        self.weights = weights
        mask = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1) if masked else None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.layer(x, x, x, attn_mask=self.mask, need_weights=self.weights)
        return torch.cat([y, weights], 2) if self.weights else y


class Lookup(nn.Module):
    """A table, read where the input is largest."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x[..., 0].argmax(1)) * x.mean((1, 2))[:, None, :1]  # type: ignore[no-any-return]


YES, NOT = "yes", "-"
"""Whether ExecuTorch has the layer; ONNX Runtime has them all."""
LAYERS: dict[str, tuple[str, list[Callable[[], nn.Module]]]] = {
    "Linear": (YES, [lambda: Along(nn.Linear(4, 3)), lambda: nn.Linear(6, 5, bias=False)]),
    "Conv1d, Conv2d": (
        YES,
        [lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), lambda: nn.Conv2d(4, 4, 3, dilation=2), lambda: Signal(nn.Conv1d(4, 4, 5))],
    ),
    "ConvTranspose1d, ConvTranspose2d": (
        YES,
        [
            lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, 1),
            lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, dilation=2, bias=False),
            lambda: Signal(nn.ConvTranspose1d(4, 2, 4, 2)),
        ],
    ),
    "BatchNorm1d, BatchNorm2d (stored statistics)": (YES, [lambda: nn.BatchNorm2d(4), lambda: Signal(nn.BatchNorm1d(4))]),
    "BatchNorm1d, BatchNorm2d without stored statistics": (
        YES,
        [lambda: nn.BatchNorm2d(4, track_running_stats=False), lambda: Signal(nn.BatchNorm1d(4, track_running_stats=False, affine=False))],
    ),
    "LayerNorm": (
        YES,
        [lambda: Along(nn.LayerNorm(4)), lambda: nn.LayerNorm((8, 6)), lambda: nn.LayerNorm(6, elementwise_affine=False)],
    ),
    "GroupNorm": (YES, [lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(1, 4), lambda: nn.GroupNorm(4, 4, affine=False)]),
    "InstanceNorm1d, InstanceNorm2d": (
        YES,
        [
            lambda: nn.InstanceNorm2d(4, affine=True),
            lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            lambda: Signal(nn.InstanceNorm1d(4)),
        ],
    ),
    "RMSNorm": (YES, [lambda: Along(nn.RMSNorm(4, eps=1e-5)), lambda: nn.RMSNorm((8, 6))]),
    "ReLU, ReLU6, Hardtanh": (YES, [lambda: nn.ReLU(inplace=True), nn.ReLU6, lambda: nn.Hardtanh(-0.3, 0.4)]),
    "LeakyReLU, PReLU, RReLU (not in training)": (
        YES,
        [lambda: nn.LeakyReLU(0.1, inplace=True), nn.PReLU, lambda: nn.PReLU(4), nn.RReLU, lambda: nn.RReLU(0.2, 0.7, inplace=True)],
    ),
    "ELU, CELU, SELU": (YES, [lambda: nn.ELU(0.7), lambda: nn.CELU(1.3), nn.SELU]),
    "Sigmoid, Tanh": (YES, [nn.Sigmoid, nn.Tanh]),
    "Hardsigmoid, Hardswish": (YES, [nn.Hardsigmoid, lambda: nn.Hardswish(inplace=True)]),
    "SiLU": (YES, [nn.SiLU]),
    "GELU": (YES, [nn.GELU, lambda: nn.GELU("tanh")]),
    "Softplus": (YES, [nn.Softplus, lambda: nn.Softplus(2.0, 1.0)]),
    "Mish": (YES, [nn.Mish]),
    "GLU": (YES, [lambda: nn.GLU(1)]),
    "Softmax, LogSoftmax": (YES, [lambda: nn.Softmax(1), lambda: nn.LogSoftmax(-1)]),
    "MaxPool1d, MaxPool2d": (YES, [lambda: nn.MaxPool2d(3, 2, 1), lambda: nn.MaxPool2d(2), lambda: Signal(nn.MaxPool1d(3, 2, 1))]),
    "AvgPool1d, AvgPool2d": (
        YES,
        [lambda: nn.AvgPool2d(3, 2, 1), lambda: nn.AvgPool2d(3, 2, 0, True), lambda: Signal(nn.AvgPool1d(2))],
    ),
    "AdaptiveAvgPool1d, AdaptiveAvgPool2d": (
        YES,
        [
            lambda: nn.AdaptiveAvgPool2d(1),
            lambda: nn.AdaptiveAvgPool2d((4, 3)),
            lambda: nn.AdaptiveAvgPool2d((3, 4)),
            lambda: nn.AdaptiveAvgPool2d((5, None)),
            lambda: nn.AdaptiveAvgPool2d(9),
            lambda: Signal(nn.AdaptiveAvgPool1d(7)),
        ],
    ),
    "AdaptiveMaxPool1d, AdaptiveMaxPool2d": (
        YES,
        [
            lambda: nn.AdaptiveMaxPool2d(1),
            lambda: nn.AdaptiveMaxPool2d((4, 3)),
            lambda: nn.AdaptiveMaxPool2d((3, 4)),
            lambda: Signal(nn.AdaptiveMaxPool1d(7)),
        ],
    ),
    "mean, amax over dimensions": (YES, [lambda: Do(lambda x: x.mean((2, 3), keepdim=True)), lambda: Do(lambda x: x.amax((2, 3)))]),
    "Upsample, interpolate: nearest, nearest-exact": (
        YES,
        [
            lambda: nn.Upsample(scale_factor=2),
            lambda: nn.Upsample(size=(8, 18)),
            lambda: nn.Upsample(size=(11, 5)),
            lambda: nn.Upsample(scale_factor=1.3),
            lambda: nn.Upsample(size=(5, 13), mode="nearest-exact"),
            lambda: Signal(nn.Upsample(scale_factor=3)),
        ],
    ),
    "Upsample, interpolate: linear, bilinear": (
        YES,
        [
            lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
            lambda: nn.Upsample(size=(11, 5), mode="bilinear", align_corners=True),
            lambda: Signal(nn.Upsample(scale_factor=1.5, mode="linear")),
        ],
    ),
    "ZeroPad1d, ZeroPad2d": (YES, [lambda: nn.ZeroPad2d((1, 2, 0, 1)), lambda: Signal(nn.ZeroPad1d(2))]),
    "ReflectionPad1d, ReflectionPad2d": (YES, [lambda: nn.ReflectionPad2d((1, 2, 3, 0)), lambda: Signal(nn.ReflectionPad1d((4, 2)))]),
    "ReplicationPad1d, ReplicationPad2d": (YES, [lambda: nn.ReplicationPad2d((1, 2, 3, 0)), lambda: Signal(nn.ReplicationPad1d(3))]),
    "PixelShuffle, PixelUnshuffle, ChannelShuffle": (
        YES,
        [lambda: nn.PixelShuffle(2), lambda: nn.PixelUnshuffle(2), lambda: nn.ChannelShuffle(2)],
    ),
    "split, chunk, unbind": (
        YES,
        [
            lambda: Do(lambda x: torch.cat([x.split(3, 1)[1], x.split([1, 3], 1)[1] * 2.0], 1)),
            lambda: Do(lambda x: torch.cat(x.chunk(3, 2)[::-1], 2)),
            lambda: Do(lambda x: torch.stack(x.unbind(1)[1:], 1)),
        ],
    ),
    "slices, indices": (
        YES,
        [
            lambda: Do(lambda x: x[:, 1:, -3:]),
            lambda: Do(lambda x: x[..., ::2] + x[..., 1::2] * x[:, -1:, :, ::2]),
            lambda: Do(lambda x: x[:, :, 1::3]),
            lambda: Do(lambda x: x[:, -1]),
        ],
    ),
    "cat, stack, flatten, reshape, permute": (
        YES,
        [
            lambda: Do(lambda x: torch.cat([x, x.relu()], 1).permute(0, 2, 1, 3)),
            lambda: Do(lambda x: torch.stack([x, x * x]).reshape(-1, 24)),
        ],
    ),
    "+, -, *, /, matmul": (YES, [lambda: Do(lambda x: x * x / (1.0 + x * x) - x), lambda: Do(lambda x: x @ x.transpose(2, 3))]),
    "Embedding": (YES, [lambda: Lookup(nn.Embedding(4, 5)), lambda: Lookup(nn.Embedding(6, 3, padding_idx=2))]),
    "scaled_dot_product_attention": (
        YES,
        [
            lambda: Do(lambda x: F.scaled_dot_product_attention(x, x + 1.0, x * x)),
            lambda: Do(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3)),
        ],
    ),
    "MultiheadAttention": (YES, [lambda: Steps(SelfAttention(False, False)), lambda: Steps(SelfAttention(True, True))]),
    "TransformerEncoderLayer": (
        YES,
        [
            lambda: Steps(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)),
            lambda: Steps(nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True, norm_first=True)),
        ],
    ),
    "GRU, LSTM, RNN": (
        YES,
        [
            lambda: Steps(nn.GRU(4, 3, batch_first=True)),
            lambda: Steps(nn.LSTM(4, 3, 2, batch_first=True)),
            lambda: Steps(nn.GRU(4, 3, bidirectional=True, batch_first=True)),
            lambda: Steps(nn.RNN(4, 3, batch_first=True, bias=False)),
        ],
    ),
    "functional.normalize": (YES, [lambda: Do(lambda x: F.normalize(x, dim=1))]),
    "Identity, Flatten, Dropout (not in training)": (YES, [lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Flatten())]),
}
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
