"""Product quantisation, as REMIND stores feature maps."""

from math import prod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from edgecl.codecs.base import Codec, CodecError
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import TensorSpec

MOST_CENTROIDS = 256
"""What one byte a code can name."""


class ProductCodec(Codec):
    """Product quantisation of the channels at each position: ``positions * subquantizers`` bytes a row.

    A map [C, H, W] is H * W vectors of C channels, a sequence [C, L] is L of them, a vector [C] is one. Each is cut into
    ``subquantizers`` parts of C / m channels, and each part stored as the index of the nearest of ``centroids`` codewords:
    of ``argmin_k |v - c_k|^2`` the square of v drops out, which leaves ``argmax_k v.c_k - |c_k|^2 / 2``, one product; of equally near
    codewords the lowest index. Decoding looks the codewords up. MACs of encoding: positions * C * centroids.

    Source: Jegou, Douze, Schmid 2011, "Product quantization for nearest neighbor search"; Hayes et al. 2020 (REMIND: m = 32 and 256
    centroids on 512 x 7 x 7 maps, 64 times fewer bytes than float32). Codebooks are fitted by faiss, as REMIND's are.

    Args:
        subquantizers: Parts of a vector (m); must divide the channels.
        centroids: Codewords a part, a power of two up to 256.
    """

    def __init__(self, subquantizers: int = 8, centroids: int = 64) -> None:
        if subquantizers < 1:
            raise InputError(f"subquantizers: must be at least 1, got {subquantizers}; 8 is a good start")
        if not 2 <= centroids <= MOST_CENTROIDS or centroids & (centroids - 1):
            raise InputError(f"centroids: must be a power of two from 2 to {MOST_CENTROIDS}, got {centroids}; 64 is a good start")
        self.subquantizers = subquantizers
        self.centroids = centroids
        self._shape: tuple[int, ...] = ()
        self._codebooks: Tensor | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """With ``config.subquantizers`` and ``config.centroids``."""
        return cls(config.subquantizers, config.centroids)

    def row_spec(self, latent: TensorSpec) -> TensorSpec:
        """uint8 [positions * subquantizers], position after position.

        Raises:
            InputError: when the latent has no channels, or ``subquantizers`` does not divide them.
        """
        shape = latent.shape[1:]
        if not shape or shape[0] % self.subquantizers:
            raise InputError(
                f"subquantizers: must divide the channels of {latent.name}, {list(shape)}, got {self.subquantizers}; "
                "take a divisor, or cut the model elsewhere"
            )
        return TensorSpec(latent.name, (prod(shape[1:]) * self.subquantizers,), "uint8")

    def fit(self, latents: Tensor) -> None:
        """Fit the codebooks by k-means on every position of latents [N, C, ...].

        Raises:
            InputError: when they are not finite, or fewer positions than centroids.
            EdgeclError: when faiss is not installed.
        """
        if not torch.isfinite(latents).all():
            raise InputError("latents: must be finite, got NaN or infinity; calibrate on real samples")
        self.row_spec(TensorSpec("latents", (1, *latents.shape[1:]), "float32"))
        vectors = latents.flatten(2) if latents.dim() > 2 else latents.unsqueeze(2)
        vectors = vectors.transpose(1, 2).reshape(-1, latents.shape[1]).contiguous()
        if len(vectors) < self.centroids:
            raise InputError(
                f"latents: must hold at least {self.centroids} positions to fit that many centroids, got {len(vectors)}; "
                "calibrate on more samples, or take fewer centroids"
            )
        self._codebooks = torch.from_numpy(_codebooks(vectors.detach().numpy(), self.subquantizers, self.centroids))
        self._shape = tuple(latents.shape[1:])

    def encode(self, z: Tensor) -> Tensor:
        """float32 [N, C, ...] as uint8 [N, positions * subquantizers]."""
        codebooks, rows, m = self._fitted(), z.shape[0], self.subquantizers
        channels, positions = z.shape[1], prod(z.shape[2:])
        parts = z.reshape(rows, m, channels // m, positions).permute(1, 2, 0, 3).reshape(m, channels // m, rows * positions)
        nearness = torch.bmm(codebooks, parts) - _half_squares(codebooks)
        code = nearness.argmax(1).reshape(m, rows, positions)
        return code.permute(1, 2, 0).reshape(rows, positions * m).to(torch.uint8)

    def decode(self, code: Tensor) -> Tensor:
        """uint8 [N, positions * subquantizers] as float32 [N, C, ...]."""
        codebooks, rows, m = self._fitted(), code.shape[0], self.subquantizers
        channels, positions = self._shape[0], prod(self._shape[1:])
        # A code beyond the last codeword would read outside of the table, which runtimes check in their own ways or not at all.
        index = code.to(torch.int64).reshape(rows * positions, m)
        index = index if self.centroids == MOST_CENTROIDS else index.clamp(0, self.centroids - 1)
        index = index + torch.arange(m) * self.centroids
        words = codebooks.reshape(m * self.centroids, -1).index_select(0, index.reshape(-1))
        return words.reshape(rows, positions, channels).transpose(1, 2).reshape(rows, *self._shape)

    def constants(self) -> tuple[Tensor, ...]:
        """Codewords float32 [m, k, C / m], and half their squared lengths [m, k, 1]."""
        codebooks = self._fitted()
        return codebooks, _half_squares(codebooks)

    def _fitted(self) -> Tensor:
        if self._codebooks is None:
            raise CodecError("pq codec: has no codebooks yet; call fit() with base samples before learning or export")
        return self._codebooks


def _half_squares(codebooks: Tensor) -> Tensor:
    return (codebooks * codebooks).sum(2, keepdim=True) * 0.5


def _codebooks(vectors: np.ndarray[Any, Any], subquantizers: int, centroids: int) -> np.ndarray[Any, Any]:
    """Codewords float32 [m, k, C / m] of vectors float32 [n, C]; k-means has a fixed seed."""
    try:
        import faiss
    except ImportError as error:
        raise EdgeclError("faiss is not installed; install it with: pip install 'edgecl[pq]'") from error
    quantizer = faiss.ProductQuantizer(vectors.shape[1], subquantizers, centroids.bit_length() - 1)
    quantizer.cp.min_points_per_centroid = 1  # fewer than 39 are enough here, and not worth a line on the screen
    quantizer.train(vectors)
    found = faiss.vector_to_array(quantizer.centroids).reshape(subquantizers, centroids, -1)
    return np.ascontiguousarray(found, np.float32)
