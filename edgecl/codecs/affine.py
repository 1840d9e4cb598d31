"""Uniform quantisation with one range for a whole tensor: what the uint8 and the packed codec share."""

from abc import abstractmethod

import torch
from torch import Tensor

from edgecl.codecs.base import Codec, CodecError
from edgecl_device.errors import InputError


class AffineCodec(Codec):
    """``code = round((z - low) / scale)``, clipped to ``0 .. levels - 1``; ``scale = (high - low) / (levels - 1)``.

    Values within the range come back within half a scale, values outside it are clipped; ties go to the even code. The
    range is calibrated on the host and frozen.
    """

    def __init__(self) -> None:
        self._low: float | None = None
        self._scale = 0.0

    @property
    @abstractmethod
    def levels(self) -> int:
        """Codes that there are."""

    def fit(self, latents: Tensor) -> None:
        """Take the range of ``latents``.

        Raises:
            InputError: when they are not finite or all equal.
        """
        low, high = float(latents.min()), float(latents.max())
        if not low < high or not torch.isfinite(latents).all():
            raise InputError(f"latents: must be finite and not all equal, got a range of {low} to {high}; calibrate on real samples")
        self._low, self._scale = low, (high - low) / (self.levels - 1)

    def quantised(self, z: Tensor) -> Tensor:
        """float32 [N, ...] as whole numbers of the same shape, float32."""
        low = self._range()
        return ((z - low) * (1 / self._scale)).round().clamp(0, self.levels - 1)

    def restored(self, number: Tensor) -> Tensor:
        """Whole numbers, float32, as the values that they stand for."""
        low = self._range()
        value = number * self._scale
        return value if low == 0 else value + low

    def _range(self) -> float:
        if self._low is None:
            raise CodecError("codec: has no range yet; call fit() with base samples before learning or export")
        return self._low
