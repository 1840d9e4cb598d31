"""Initial weights from an explicit generator."""

import torch
from torch import nn


def initialise(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Set every convolution (He normal, fan out), linear layer (normal, 0.01) and batch norm (identity) of ``model``.

    Args:
        model: Changed in place.
        generator: Source of the random numbers; by default one seeded with 0.

    Source: He et al., Delving Deep into Rectifiers, 2015, equation 14.
    """
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
