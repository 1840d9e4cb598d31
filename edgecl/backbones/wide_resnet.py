"""Wide ResNets for 32x32 colour images."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl.backbones.initialise import initialise


class _Block(nn.Module):
    """Norm and rectifier before each of two 3x3 convolutions; where widths differ, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        total: Tensor = out + shortcut
        return total


class _Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, blocks: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(_Block(inputs, outputs, stride), *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x


class WideResNet(nn.Module):
    """Wide ResNet of ``6 blocks + 4`` layers: three stages of 16, 32 and 64 times ``width`` channels.

    Keys are those of the usual PyTorch port: ``conv1``, ``block1.layer.0.bn1``, ..., ``bn1``, ``fc``. Cut at ``conv1`` to have every norm
    behind the cut, at ``pool`` for the features.

    Args:
        blocks: Residual blocks in each stage: 6 for 40 layers, 4 for 28.
        width: Factor of the channels.
        classes: Outputs of the classifier ``fc``.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, 3, 32, 32]; the result is float32 [N, classes].

    Source: Zagoruyko & Komodakis, Wide Residual Networks, 2016.
    """

    def __init__(self, blocks: int, width: int, classes: int = 10, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(16, 16 * width, 1, blocks)
        self.block2 = _Stage(16 * width, 32 * width, 2, blocks)
        self.block3 = _Stage(32 * width, 64 * width, 2, blocks)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64 * width, classes)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        scores: Tensor = self.fc(self.pool(x))
        return scores


wrn_40_2 = functools.partial(WideResNet, 6, 2)
wrn_28_10 = functools.partial(WideResNet, 4, 10)
