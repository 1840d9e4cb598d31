"""Replay codecs: how a latent is stored in a replay row, encoded and decoded inside the step graphs.

Learning and prediction both see the decoded value, so that a stored sample and a fresh one are the same to the model
(REMIND, Hayes et al. 2020, does so in training and inference).
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from edgecl_device.errors import EdgeclError, InputError


class CodecError(EdgeclError):
    """A codec cannot be used yet."""


class Codec(ABC):
    """Encodes one latent tensor for storage.

    Attributes:
        dtype: NumPy's name of the stored type.
    """

    dtype: str

    @abstractmethod
    def fit(self, latents: Tensor) -> None:
        """Calibrate once, on the host, on latents [N, ...]; frozen afterwards."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """float32 [N, ...] as codes of the same shape."""

    @abstractmethod
    def decode(self, code: Tensor) -> Tensor:
        """Codes as float32."""


class Float32Codec(Codec):
    """The latent as it is: 4 bytes a value."""

    dtype = "float32"

    def fit(self, latents: Tensor) -> None:
        """Nothing to calibrate."""

    def encode(self, z: Tensor) -> Tensor:
        """The value itself."""
        return z

    def decode(self, code: Tensor) -> Tensor:
        """The value itself."""
        return code


class Uint8Codec(Codec):
    """Affine quantisation to 8 bits with one range for the whole tensor: 1 byte a value.

    ``code = round((z - low) / scale)``, clipped to 0..255; ``scale = (high - low) / 255``. Values within the range come
    back within half a scale, values outside it are clipped. The range is calibrated on the host and frozen.

    Source: Ravaglia et al. 2021, "A TinyML Platform for On-Device Continual Learning with Quantized Latent Replays",
    with a lower end that need not be zero.

    >>> codec = Uint8Codec()
    >>> codec.fit(torch.tensor([[0.0, 2.55]]))
    >>> codec.decode(codec.encode(torch.tensor([[0.014, 9.0]])))
    tensor([[0.0100, 2.5500]])
    """

    dtype = "uint8"

    def __init__(self) -> None:
        self._low: float | None = None
        self._scale = 0.0

    def fit(self, latents: Tensor) -> None:
        """Take the range of ``latents``.

        Raises:
            InputError: when they are not finite or all equal.
        """
        low, high = float(latents.min()), float(latents.max())
        if not low < high or not torch.isfinite(latents).all():
            raise InputError(f"latents: must be finite and not all equal, got a range of {low} to {high}; calibrate on real samples")
        self._low, self._scale = low, (high - low) / 255

    def encode(self, z: Tensor) -> Tensor:
        """float32 [N, ...] as uint8."""
        low = self._range()
        return ((z - low) * (1 / self._scale)).round().clamp(0, 255).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        """uint8 [N, ...] as float32."""
        low = self._range()
        value = code.to(torch.float32) * self._scale
        return value if low == 0 else value + low

    def _range(self) -> float:
        if self._low is None:
            raise CodecError("uint8 codec: has no range yet; call fit() with base samples before learning or export")
        return self._low


CODECS: dict[str, type[Codec]] = {"float32": Float32Codec, "uint8": Uint8Codec}
"""Codecs by name."""
