"""Classifiers of sensor windows: a convolutional and a recurrent one, for instance for human activity."""

import torch
from torch import Tensor, nn

from edgecl.backbones.initialise import initialise


def _block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    same = nn.ZeroPad1d(((kernel - 1) // 2, kernel // 2))  # "same" padding; of an even kernel, the odd element lies behind
    return nn.Sequential(same, nn.Conv1d(inputs, outputs, kernel), nn.BatchNorm1d(outputs), nn.ReLU())


class Cnn1d(nn.Module):
    """The fully convolutional network for time series: three convolutions, the mean over time, a linear classifier.

    273,670 parameters at 9 channels and 6 classes. Cut at ``pool`` for the vector of features, 128 values at width 1.

    Args:
        classes: Outputs of the classifier ``fc``.
        channels: Sensor channels; 9 are acceleration, acceleration without gravity, and rotation rate, on three axes each.
        width: Factor of the convolutions' channels; 1 is the paper's.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, channels, T], any length T; the result is float32 [N, classes].

    Source: Wang, Yan, Oates, Time Series Classification from Scratch with Deep Neural Networks, 2016, section II.B.
    """

    def __init__(self, classes: int = 6, *, channels: int = 9, width: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        first, second, third = (max(1, int(n * width)) for n in (128, 256, 128))
        self.block1 = _block(channels, first, 8)
        self.block2 = _block(first, second, 5)
        self.block3 = _block(second, third, 3)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.fc = nn.Linear(third, classes)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        scores: Tensor = self.fc(self.pool(self.block3(self.block2(self.block1(x)))))
        return scores


class GruClassifier(nn.Module):
    """Two GRU layers and a linear classifier on the last step: 39,750 parameters at 9 channels and 6 classes.

    The layers are modules of their own, so that a cut fits between: ``gru1`` to train the second, ``gru2`` for the features of all steps.

    Args:
        classes: Outputs of the classifier ``fc``.
        channels: Sensor channels.
        hidden: Values of each layer's state.
        generator: Source of the initial weights; by default one seeded with 0.

    Shapes:
        x: float32 [N, T, channels]; the result is float32 [N, classes].

    Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014, in PyTorch's form.
    """

    def __init__(self, classes: int = 6, *, channels: int = 9, hidden: int = 64, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.gru1 = nn.GRU(channels, hidden, batch_first=True)
        self.gru2 = nn.GRU(hidden, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, classes)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of ``x``."""
        steps, _ = self.gru1(x)
        steps, _ = self.gru2(steps)
        scores: Tensor = self.fc(steps[:, -1])
        return scores
