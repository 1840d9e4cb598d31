"""A small CNN for 28x28 grey images: the network of the demo."""

import torch
from torch import Tensor, nn

from edgecl.backbones.initialise import initialise


def _block(inputs: int, outputs: int, *tail: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), *tail)


class SmallCnn(nn.Module):
    """Four 3x3 convolution blocks and a linear classifier: 59,874 parameters at 10 classes, 2.24 M MACs an image.

    Two places to cut at: :data:`MAP`, the 64 x 3 x 3 = 576 values before the last convolution block, and
    :data:`FEATURE`, the 62 values before the classifier.

    Args:
        classes: Outputs of the classifier ``fc``.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, 1, 28, 28]; the result is float32 [N, classes].
    """

    MAP = "block3"
    FEATURE = "pool"

    def __init__(self, classes: int = 10, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.block1 = _block(1, 16, nn.MaxPool2d(2))
        self.block2 = _block(16, 32, nn.MaxPool2d(2))
        self.block3 = _block(32, 64, nn.MaxPool2d(2))
        self.block4 = _block(64, 62)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(62, classes)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        x = self.block4(self.block3(self.block2(self.block1(x))))
        scores: Tensor = self.fc(self.pool(x))
        return scores
