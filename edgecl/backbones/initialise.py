"""Initial weights from an explicit generator."""

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


def initialise(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Set every convolution (He normal, fan out), linear layer (normal, 0.01), norm (identity) and GRU (PyTorch's own) of ``model``.

    Args:
        model: Changed in place.
        generator: Source of the random numbers; by default one seeded with 0.

    Source: He et al., Delving Deep into Rectifiers, 2015, equation 14.
    """
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        elif isinstance(module, NORMS):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.GRU):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        if isinstance(module, (*CONVOLUTIONS, nn.Linear, *NORMS)) and module.bias is not None:
            nn.init.zeros_(module.bias)
