"""DS-CNN: keyword spotting on 49 frames of 10 MFCCs."""

import torch
from torch import Tensor, nn

from edgecl.backbones.initialise import initialise


class _Separable(nn.Module):
    """A 3x3 filter on each channel, then a 1x1 convolution; batch norm and ReLU behind both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels), nn.ReLU())
        self.pointwise = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class DsCnn(nn.Module):
    """The small DS-CNN, as in MLPerf Tiny: a 10x4 convolution with stride 2, four separable blocks, a linear classifier.

    23,756 parameters at 12 classes, 2.66 M MACs a second of speech. Cut at ``pool`` for the vector of features, 64 values at
    width 1. Deviations from MLPerf Tiny's network: no dropout, and the average goes over all 25 frames, not over the first 24.

    Args:
        classes: Outputs of the classifier ``fc``; 12 are ten words, silence and unknown.
        channels: Of every convolution; 64 is the small network of the paper.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, 1, 49, 10], frames by MFCCs (40 ms windows, 20 ms apart, of one second); the result is float32 [N, classes].

    Source: Zhang et al., Hello Edge: Keyword Spotting on Microcontrollers, 2017, section 4.4; Banbury et al., MLPerf Tiny Benchmark, 2021.
    """

    def __init__(self, classes: int = 12, *, channels: int = 64, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # "same" padding with a stride puts the odd row behind, which a convolution's own padding cannot
        self.stem = nn.Sequential(nn.ZeroPad2d((1, 1, 4, 5)), nn.Conv2d(1, channels, (10, 4), 2), nn.BatchNorm2d(channels), nn.ReLU())
        self.block1 = _Separable(channels)
        self.block2 = _Separable(channels)
        self.block3 = _Separable(channels)
        self.block4 = _Separable(channels)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels, classes)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        x = self.block4(self.block3(self.block2(self.block1(self.stem(x)))))
        scores: Tensor = self.fc(self.pool(x))
        return scores
