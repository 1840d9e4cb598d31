"""Preprocessing that becomes part of the trunk, so that the device feeds raw bytes."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecl_device.checks import as_int
from edgecl_device.errors import InputError

MOST_SIDE = 4096
"""Longest side that an image is resized to."""

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and standard deviation of ImageNet's channels, by which most published networks were trained."""


class ImageU8(nn.Module):
    """A uint8 image as the normalised float image that a backbone takes: ``(x / 255 - mean) / std``.

    One multiplication and one addition: ``x * 1 / (255 std) - mean / std``. With ``size`` the image is resized first, as
    ``torch.nn.functional.interpolate(x, size, mode="bilinear")`` does it: half-pixel centres, no smoothing when it shrinks.

    Args:
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the same scale.
        layout: Axes of one image: ``HWC``, ``CHW``, or ``HW`` for a grey one, which becomes as many equal channels as there are means.
        size: Height and width to resize to; None leaves it as it is.

    Raises:
        InputError: on another layout, lengths that differ, a standard deviation that is not positive, another size than two
            positive integers.

    Shapes:
        x: uint8 [N, H, W, C], [N, C, H, W] or [N, H, W]; the result is float32 [N, C, H, W], or [N, C, *size].

    >>> ImageU8(mean=[0.5], std=[0.5], layout="HW")(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    tensor([[[[-1.,  1.]]]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], layout: str = "HWC", size: Sequence[int] | None = None) -> None:
        super().__init__()
        if layout not in {"HWC", "CHW", "HW"}:
            raise InputError(f"layout: must be 'HWC', 'CHW' or 'HW', got {layout!r}")
        try:
            mean, std = [float(value) for value in mean], [float(value) for value in std]
        except (TypeError, ValueError) as error:
            raise InputError(f"mean, std: must be lists of numbers, one for each channel, got {mean!r} and {std!r}; pass [0.5]") from error
        if len(mean) != len(std) or not mean:
            raise InputError(f"mean, std: must have one value for each channel, got {len(mean)} and {len(std)}; give both the same length")
        if not all(math.isfinite(value) for value in [*mean, *std]) or min(std) <= 0:
            raise InputError(f"mean, std: must be finite, std positive, got {list(mean)} and {list(std)}; give them on the scale 0 to 1")
        self.layout = layout
        self.size = None if size is None else _height_width(size)
        exact_mean, exact_std = torch.tensor([mean, std], dtype=torch.float64).reshape(2, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * exact_std)).float())
        self.register_buffer("shift", (-exact_mean / exact_std).float())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        if self.layout == "HWC":
            x = x.permute(0, 3, 1, 2)
        elif self.layout == "HW":
            x = x.unsqueeze(1)
        if self.layout != "HW" and x.shape[1] != len(self.scale):
            channels = f"{x.shape[1]} channels, got {len(self.scale)}"
            raise InputError(f"mean, std: must have one value for each of the image's {channels}; check them and the layout")
        x = x.to(torch.float32)
        if self.size is not None:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)
        return x * self.scale + self.shift


def _height_width(size: Sequence[int]) -> tuple[int, int]:
    sides = size if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2 or not all(1 <= as_int("size", side) <= MOST_SIDE for side in sides):
        raise InputError(f"size: must be a height and a width of 1 to {MOST_SIDE} pixels, got {size!r}; pass (96, 96)")
    return as_int("size", size[0]), as_int("size", size[1])


class LogMel(nn.Module):
    """PCM audio as log-mel energies: windows, their DFT as two matrices, the power, a mel filter bank, the logarithm.

    ``log(M |DFT(w x)|^2 + eps)`` with a periodic Hann window w and triangular filters M of peak 1, whose corners are equidistant in
    mel, ``mel(f) = 2595 log10(1 + f / 700)``. Windows start every ``hop`` samples; none is padded, so that frames of a stream
    overlap only by what the caller hands in twice.

    Source: Davis, Mermelstein, "Comparison of parametric representations for monosyllabic word recognition in continuously spoken
    sentences", 1980 (the filter bank); O'Shaughnessy, "Speech communication: human and machine", 1987 (the mel formula).

    Args:
        rate_hz: Samples a second.
        window: Samples of a window, the length of the DFT.
        hop: Samples from one window to the next.
        mels: Filters.
        low_hz: Lower corner of the first filter.
        high_hz: Upper corner of the last; None is half of the rate.
        eps: Added to each energy, which is that of samples in [-1, 1].

    Raises:
        InputError: when a number does not fit.

    Shapes:
        x: int16 (divided by 32,768) or float32 [N, S]; the result is float32 [N, mels, 1 + (S - window) // hop].

    >>> LogMel(8000, window=64, hop=32, mels=4)(torch.zeros(1, 128)).shape
    torch.Size([1, 4, 3])
    """

    dft: Tensor
    bank: Tensor

    def __init__(
        self, rate_hz: int, window: int, hop: int, mels: int, low_hz: float = 0.0, high_hz: float | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        high = rate_hz / 2 if high_hz is None else high_hz
        if min(rate_hz, window - 1, hop, mels) < 1:
            raise InputError(f"rate_hz, window, hop, mels: must be at least 1, window 2, got {rate_hz}, {window}, {hop}, {mels}")
        if not 0 <= low_hz < high <= rate_hz / 2:
            raise InputError(f"low_hz, high_hz: must rise within 0 to {rate_hz / 2:g}, got {low_hz:g} and {high:g}; give them in hertz")
        if not 0 < eps < math.inf:
            raise InputError(f"eps: must be finite and above 0, got {eps}; 1e-6 is usual")
        self.hop = hop
        self.eps = eps
        bins = window // 2 + 1
        time = torch.arange(window, dtype=torch.float64)
        angle = 2 * math.pi / window * torch.arange(bins, dtype=torch.float64).unsqueeze(1) * time
        hann = 0.5 - 0.5 * torch.cos(2 * math.pi / window * time)
        self.register_buffer("dft", (torch.cat([angle.cos(), angle.sin()]) * hann).float().unsqueeze(1))
        low, top = (2595 * math.log10(1 + f / 700) for f in (low_hz, high))
        corners = 700 * (10 ** (torch.linspace(low, top, mels + 2, dtype=torch.float64) / 2595) - 1)
        hertz = torch.arange(bins, dtype=torch.float64) * rate_hz / window
        rising = (hertz - corners[:-2].unsqueeze(1)) / (corners[1:-1] - corners[:-2]).unsqueeze(1)
        falling = (corners[2:].unsqueeze(1) - hertz) / (corners[2:] - corners[1:-1]).unsqueeze(1)
        bank = torch.minimum(rising, falling).clamp_min(0)
        if not bool((bank.sum(1) > 0).all()):
            empty = int((bank.sum(1) == 0).sum())
            raise InputError(f"mels: must leave a DFT bin to each filter, {empty} of {mels} have none; take fewer, or a longer window")
        self.register_buffer("bank", bank.float().unsqueeze(2))

    def forward(self, x: Tensor) -> Tensor:
        """Log-mel energies of ``x``."""
        wave = x.to(torch.float32) * (1 / 32768) if x.dtype == torch.int16 else x
        parts = F.conv1d(wave.unsqueeze(1), self.dft, stride=self.hop)
        bins = self.bank.shape[1]
        power = parts[:, :bins] * parts[:, :bins] + parts[:, bins:] * parts[:, bins:]
        return torch.log(F.conv1d(power, self.bank) + self.eps)
