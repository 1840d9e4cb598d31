"""ResNet-18 for ImageNet-sized images in torchvision's key names."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl.backbones.initialise import initialise


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut is a strided 1x1 convolution (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet of basic blocks; keys are torchvision's: ``conv1``, ``bn1``, ``layer1.0.conv1``, ``layer2.0.downsample.0``, ..., ``fc``.

    Cut at ``pool`` for the vector of features, 512 values at width 1.

    Args:
        blocks: Residual blocks in each of the four stages; (2, 2, 2, 2) is ResNet-18.
        classes: Outputs of the classifier ``fc``.
        width: Factor of all channels, for tests and small devices; 1 is the paper's.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, 3, H, W] with H and W of 32 or more, normalised with ImageNet's mean and standard deviation for the
            published weights; the result is float32 [N, classes].

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, table 1.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], classes: int = 1000, *, width: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        channels = [max(1, int(c * width)) for c in (64, 64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, channels[0], 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = self._stage(channels[0], channels[1], 1, blocks[0])
        self.layer2 = self._stage(channels[1], channels[2], 2, blocks[1])
        self.layer3 = self._stage(channels[2], channels[3], 2, blocks[2])
        self.layer4 = self._stage(channels[3], channels[4], 2, blocks[3])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels[4], classes)
        initialise(self, generator)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(_BasicBlock(inputs, outputs, stride), *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        scores: Tensor = self.fc(self.pool(self.layer4(self.layer3(self.layer2(self.layer1(x))))))
        return scores


resnet18 = functools.partial(ResNet, (2, 2, 2, 2))
