"""Replay codecs: how a latent is stored in a replay row, encoded and decoded inside the step graphs.

Learning and prediction both see the decoded value, so that a stored sample and a fresh one are the same to the model
(REMIND, Hayes et al. 2020, does so in training and inference).
"""

from edgecl.codecs.base import Codec, CodecError
from edgecl.codecs.float32 import Float32Codec
from edgecl.codecs.packed import PackedCodec
from edgecl.codecs.product import ProductCodec
from edgecl.codecs.uint8 import Uint8Codec

CODECS: dict[str, type[Codec]] = {"float32": Float32Codec, "uint8": Uint8Codec, "packed": PackedCodec, "pq": ProductCodec}
"""Codecs by name."""

__all__ = ["CODECS", "Codec", "CodecError", "Float32Codec", "PackedCodec", "ProductCodec", "Uint8Codec"]
