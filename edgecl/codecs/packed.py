"""Affine quantisation to b bits, several codes packed into a byte."""

from math import gcd, prod
from typing import Any, Self

import torch
from torch import Tensor

from edgecl.codecs.affine import AffineCodec
from edgecl.codecs.base import CodecError
from edgecl_device.errors import InputError
from edgecl_device.manifest import TensorSpec


class PackedCodec(AffineCodec):
    """Affine quantisation to ``bits`` bits: a row of ceil(bits * n / 8) bytes for n values.

    Code i takes the bits ``i * bits`` and up of a row, lowest first, byte after byte. ``8 / gcd(8, bits)`` codes fill whole bytes: this
    pattern repeats, so that three small tables describe all of it. Packing is written in float32, as runtimes have few kernels
    for integers: a code moved to its place within two bytes is below 2**16, and all of it is exact.

    Source: Ravaglia et al. 2021 (QLR-CL; the paper goes down to 6 bits), with a lower end that need not be zero. The order of bits is
    this project's own.

    >>> codec = PackedCodec(bits=3)
    >>> codec.fit(torch.tensor([[0.0, 7.0]]))
    >>> codec.encode(torch.tensor([[1.0, 2.0, 3.0]])).tolist()  # 1 + 2 * 8 + 3 * 64 = 209
    [[209, 0]]
    >>> codec.fit(torch.tensor([[0.0, 7.0, 1.0]]))
    >>> codec.decode(codec.encode(torch.tensor([[1.0, 2.0, 3.0]])))
    tensor([[1., 2., 3.]])
    """

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise InputError(f"bits: must be in [1, 8], got {bits}; 4 is a good start")
        self.bits = bits
        self._shape: tuple[int, ...] | None = None
        self._codes = 8 // gcd(8, bits)  # of one repeat of the pattern
        self._bytes = self._codes * bits // 8

    @classmethod
    def of(cls, config: Any) -> Self:
        """With ``config.bits``."""
        return cls(config.bits)

    @property
    def levels(self) -> int:
        """``2 ** bits``."""
        return 1 << self.bits

    def row_spec(self, latent: TensorSpec) -> TensorSpec:
        """uint8 [ceil(bits * n / 8)]."""
        return TensorSpec(latent.name, (-(-self.bits * prod(latent.shape[1:]) // 8),), "uint8")

    def fit(self, latents: Tensor) -> None:
        """Take the range and the shape of ``latents`` [N, ...]; see :class:`AffineCodec`."""
        super().fit(latents)
        self._shape = tuple(latents.shape[1:])

    def encode(self, z: Tensor) -> Tensor:
        """float32 [N, ...] as uint8 [N, ceil(bits * n / 8)]."""
        number, rows = self.quantised(z).flatten(1), z.shape[0]
        repeats = -(-number.shape[1] // self._codes)
        number = _pad(number, repeats * self._codes).reshape(rows * repeats, self._codes)
        word = number * torch.tensor([2.0**o for o in self._offsets()])
        high = (word * 2.0**-8).floor()
        parts = torch.cat([word - high * 2.0**8, high], 1)
        packed = torch.mm(parts, self._places()).reshape(rows, repeats * self._bytes)
        return packed[:, : -(-self.bits * prod(z.shape[1:]) // 8)].to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        """uint8 [N, ceil(bits * n / 8)] as float32 [N, ...]."""
        if self._shape is None:
            raise CodecError("packed codec: has no range yet; call fit() with base samples before learning or export")
        n, rows = prod(self._shape), code.shape[0]
        repeats = -(-n // self._codes)
        groups = _pad(code.to(torch.float32), repeats * self._bytes).reshape(rows * repeats, self._bytes)
        first = torch.tensor([i * self.bits // 8 for i in range(self._codes)])
        word = groups.index_select(1, first) + _pad(groups, self._bytes + 1).index_select(1, first + 1) * 2.0**8
        low, high = (torch.tensor([2.0 ** -(o + up) for o in self._offsets()]) for up in (0, self.bits))
        number = (word * low).floor() - (word * high).floor() * float(self.levels)
        return self.restored(number.reshape(rows, repeats * self._codes)[:, :n].reshape(rows, *self._shape))

    def _offsets(self) -> list[int]:
        """Of each code of the pattern, its lowest bit within its first byte."""
        return [i * self.bits % 8 for i in range(self._codes)]

    def _places(self) -> Tensor:
        """float32 [2 codes, bytes]: a one where the low (first half) or the high part of a code is added to a byte."""
        places = torch.zeros(2 * self._codes, self._bytes)
        for i in range(self._codes):
            byte = i * self.bits // 8
            places[i, byte] = 1.0
            if byte + 1 < self._bytes:  # else the high part is zero
                places[self._codes + i, byte + 1] = 1.0
        return places


def _pad(x: Tensor, length: int) -> Tensor:
    """``x`` [N, n] with zeros behind, up to a length."""
    return x if x.shape[1] == length else torch.constant_pad_nd(x, [0, length - x.shape[1]])
