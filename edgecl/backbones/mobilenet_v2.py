"""MobileNetV2 in torchvision's key names."""

import torch
from torch import Tensor, nn

from edgecl.backbones.initialise import initialise

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, blocks, stride of the first block (table 2 of the paper)."""


def _round_to_eight(channels: float) -> int:
    """Nearest multiple of 8, at least 8, never more than 10 % below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_conv(inputs, hidden, 1)] if expansion != 1 else []
        depthwise = _conv(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.shortcut else out


class MobileNetV2(nn.Module):
    """MobileNetV2; keys are torchvision's: ``features.0.0``, ``features.1.conv.0.0``, ..., ``classifier.1``.

    Cut at ``pool`` for the vector of features, 1,280 values at width 1.

    Args:
        classes: Outputs of the classifier ``classifier.1``.
        width: Width multiplier; channels are rounded to multiples of 8.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, 3, H, W] with H and W of 32 or more, normalised with ImageNet's mean and standard deviation for the
            published weights; the result is float32 [N, classes].

    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018, table 2.
    """

    def __init__(self, classes: int = 1000, *, width: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        channels = _round_to_eight(32 * width)
        features: list[nn.Module] = [_conv(3, channels, 3, stride=2)]
        for expansion, outputs, blocks, stride in _STAGES:
            for block in range(blocks):
                wide = _round_to_eight(outputs * width)
                features.append(_InvertedResidual(channels, wide, stride if block == 0 else 1, expansion))
                channels = wide
        last = _round_to_eight(1280 * max(1.0, width))
        self.features = nn.Sequential(*features, _conv(channels, last, 1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        scores: Tensor = self.classifier(self.pool(self.features(x)))
        return scores
