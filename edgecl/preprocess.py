"""Preprocessing that becomes part of the trunk, so that the device feeds raw bytes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgecl_device.errors import InputError


class ImageU8(nn.Module):
    """A uint8 image as the normalised float image that a backbone takes: ``(x / 255 - mean) / std``.

    One multiplication and one addition: ``x * 1 / (255 std) - mean / std``.

    Args:
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the same scale.
        layout: Axes of one image: ``HWC``, ``CHW``, or ``HW`` for one grey channel.

    Raises:
        InputError: on another layout, lengths that differ, a standard deviation that is not positive.

    Shapes:
        x: uint8 [N, H, W, C], [N, C, H, W] or [N, H, W]; the result is float32 [N, C, H, W].

    >>> ImageU8(mean=[0.5], std=[0.5], layout="HW")(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    tensor([[[[-1.,  1.]]]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], layout: str = "HWC") -> None:
        super().__init__()
        if layout not in {"HWC", "CHW", "HW"}:
            raise InputError(f"layout: must be 'HWC', 'CHW' or 'HW', got {layout!r}")
        try:
            mean, std = [float(value) for value in mean], [float(value) for value in std]
        except (TypeError, ValueError) as error:
            raise InputError(f"mean, std: must be lists of numbers, one for each channel, got {mean!r} and {std!r}; pass [0.5]") from error
        if len(mean) != len(std) or not mean or (layout == "HW" and len(mean) != 1):
            raise InputError(f"mean, std: must have one value for each channel, got {len(mean)} and {len(std)} for layout {layout}")
        if not all(math.isfinite(value) for value in [*mean, *std]) or min(std) <= 0:
            raise InputError(f"mean, std: must be finite, std positive, got {list(mean)} and {list(std)}; give them on the scale 0 to 1")
        self.layout = layout
        exact_mean, exact_std = torch.tensor([mean, std], dtype=torch.float64).reshape(2, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * exact_std)).float())
        self.register_buffer("shift", (-exact_mean / exact_std).float())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        if self.layout == "HWC":
            x = x.permute(0, 3, 1, 2)
        elif self.layout == "HW":
            x = x.unsqueeze(1)
        return x.to(torch.float32) * self.scale + self.shift
