"""No compression."""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from edgecl.codecs.base import Codec
from edgecl_device.manifest import TensorSpec


class Float32Codec(Codec):
    """The latent as it is: 4 bytes a value."""

    lossless: ClassVar[bool] = True

    def row_spec(self, latent: TensorSpec) -> TensorSpec:
        """The latent's own."""
        return replace(latent, shape=latent.shape[1:])

    def fit(self, latents: Tensor) -> None:
        """Nothing to calibrate."""

    def encode(self, z: Tensor) -> Tensor:
        """The value itself."""
        return z

    def decode(self, code: Tensor) -> Tensor:
        """The value itself."""
        return code
