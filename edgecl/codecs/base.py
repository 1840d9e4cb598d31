"""What every codec is: a calibrated pair of functions between a latent and what a replay row stores of it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from torch import Tensor

from edgecl_device.errors import EdgeclError
from edgecl_device.manifest import TensorSpec


class CodecError(EdgeclError):
    """A codec cannot be used yet."""


class Codec(ABC):
    """Encodes one latent tensor for storage. Both directions run inside the step graphs.

    Attributes:
        lossless: Whether :meth:`decode` gives back the latent itself.
    """

    lossless: ClassVar[bool] = False

    @classmethod
    def of(cls, config: Any) -> Self:
        """A codec of this kind with what it needs of a method's hyperparameters."""
        return cls()

    @abstractmethod
    def row_spec(self, latent: TensorSpec) -> TensorSpec:
        """What a row stores of a latent.

        Args:
            latent: float32 [1, ...], batch dimension included.

        Returns:
            Name, shape and type of the codes of one sample, without a batch dimension.

        Raises:
            InputError: when this codec cannot encode such a latent.
        """

    @abstractmethod
    def fit(self, latents: Tensor) -> None:
        """Calibrate once, on the host, on latents [N, ...]; frozen afterwards.

        Raises:
            InputError: when the latents do not suffice.
        """

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """float32 [N, ...] as codes [N, *row].

        Raises:
            CodecError: before :meth:`fit`, for codecs that need it.
        """

    @abstractmethod
    def decode(self, code: Tensor) -> Tensor:
        """Codes [N, *row] as float32 [N, ...].

        Raises:
            CodecError: before :meth:`fit`, for codecs that need it.
        """

    def constants(self) -> tuple[Tensor, ...]:
        """The frozen tables that the codec adds to the graphs, each once: its codebooks."""
        return ()
