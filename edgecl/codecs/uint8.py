"""Affine quantisation to one byte a value."""

import torch
from torch import Tensor

from edgecl.codecs.affine import AffineCodec
from edgecl_device.manifest import TensorSpec


class Uint8Codec(AffineCodec):
    """Affine quantisation to 8 bits with one range for the whole tensor: 1 byte a value, a row of the latent's own shape.

    Source: Ravaglia et al. 2021, "A TinyML Platform for On-Device Continual Learning with Quantized Latent Replays",
    with a lower end that need not be zero.

    >>> codec = Uint8Codec()
    >>> codec.fit(torch.tensor([[0.0, 2.55]]))
    >>> codec.decode(codec.encode(torch.tensor([[0.014, 9.0]])))
    tensor([[0.0100, 2.5500]])
    """

    @property
    def levels(self) -> int:
        """256."""
        return 256

    def row_spec(self, latent: TensorSpec) -> TensorSpec:
        """The latent's shape in uint8."""
        return TensorSpec(latent.name, latent.shape[1:], "uint8")

    def encode(self, z: Tensor) -> Tensor:
        """float32 [N, ...] as uint8 of the same shape."""
        return self.quantised(z).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        """uint8 [N, ...] as float32."""
        return self.restored(code.to(torch.float32))
