"""ResNets for 32x32 colour images, with the parameter-free shortcuts of the original CIFAR-10 experiments."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl.backbones.initialise import initialise


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: every second pixel, new channels zero)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, self.new_channels // 2, self.new_channels // 2))
        return F.relu(out + x)


class ResNetCifar(nn.Module):
    """ResNet of ``6 blocks + 2`` layers: three stages of 16, 32 and 64 channels and a linear classifier.

    Keys are those of the weights that Yerlan Idelbayev published (github.com/akamaster/pytorch_resnet_cifar10) after
    their prefix ``module.`` is gone: ``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``linear``. Cut at ``pool`` for the 64 features.

    Args:
        blocks: Residual blocks in each stage; 3 is ResNet-20.
        classes: Outputs of the classifier ``linear``.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, 3, 32, 32], normalised with ImageNet's mean and standard deviation for the published weights;
            the result is float32 [N, classes].

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2.
    """

    def __init__(self, blocks: int, classes: int = 10, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(64, classes)
        initialise(self, generator)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(_Block(inputs, outputs, stride), *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        scores: Tensor = self.linear(self.pool(x))
        return scores


resnet20 = functools.partial(ResNetCifar, 3)
resnet32 = functools.partial(ResNetCifar, 5)
resnet44 = functools.partial(ResNetCifar, 7)
resnet56 = functools.partial(ResNetCifar, 9)
