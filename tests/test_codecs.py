"""Replay codecs against their definition."""

import numpy as np
import pytest
import torch

from edgecl.codecs import CODECS, CodecError, Float32Codec, Uint8Codec
from edgecl_device.errors import EdgeclError, InputError


def fitted(low, high):
    codec = Uint8Codec()
    codec.fit(torch.tensor([[low, high]]))
    return codec


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.55), (-3.0, 5.0), (2.0, 2.5), (-9.0, -1.0), (0.0, 1e-6), (-1e6, 1e6)])
def test_uint8_by_its_formula_in_float64(low, high):
    codec = fitted(low, high)
    spread = high - low
    z = np.random.default_rng(0).uniform(low - spread, high + spread, 4000).astype(np.float32)
    low, high = float(np.float32(low)), float(np.float32(high))
    exact = (z.astype(np.float64) - low) / ((high - low) / 255)
    code = codec.encode(torch.from_numpy(z))
    assert code.dtype == torch.uint8
    nearest = np.clip(np.rint(exact), 0, 255)
    apart = np.abs(code.numpy() - nearest)
    on_edge = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-3
    assert np.all(apart[~on_edge] == 0)
    assert np.all(apart <= 1)
    decoded = codec.decode(code).double().numpy()
    scale = (high - low) / 255
    assert np.allclose(decoded, low + code.numpy() * scale, rtol=0, atol=1e-6 * max(abs(low), abs(high)))
    inside = (z >= low) & (z <= high)
    assert np.all(np.abs(decoded - z)[inside] <= 0.501 * scale + 1e-6 * max(abs(low), abs(high)))
    assert np.allclose(decoded[z < low], low, atol=1e-6 * abs(low))
    assert np.allclose(decoded[z > high], high, atol=2e-6 * max(abs(low), abs(high)))


def test_every_code_survives_decode_and_encode():
    codec, codes = fitted(-1.3, 7.9), torch.arange(256, dtype=torch.uint8)
    assert torch.equal(codec.encode(codec.decode(codes)), codes)


def test_the_range_is_of_all_latents_and_then_frozen():
    codec = Uint8Codec()
    codec.fit(torch.tensor([[[1.0, -2.0]], [[4.0, 0.0]]]))
    assert codec.encode(torch.tensor([-2.0, 4.0, 100.0])).tolist() == [0, 255, 255]
    assert codec.encode(torch.full((2, 3, 4), 1.0)).shape == (2, 3, 4)


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, float("nan")], [0.0, float("inf")], [-float("inf"), 0.0]])
def test_a_useless_range_is_refused_and_the_old_one_kept(values):
    codec = fitted(0.0, 2.55)
    with pytest.raises(InputError, match=r"^latents: must be finite and not all equal"):
        codec.fit(torch.tensor(values))
    assert codec.encode(torch.tensor([1.0])).item() == 100


def test_before_fit_it_says_what_to_call():
    for use in (Uint8Codec().encode, Uint8Codec().decode):
        with pytest.raises(CodecError, match=r"call fit\(\) with base samples"):
            use(torch.zeros(1))
    assert issubclass(CodecError, EdgeclError)


def test_float32_is_the_value_itself():
    codec, z = Float32Codec(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    codec.fit(z)
    assert torch.equal(codec.decode(codec.encode(z)), z)


@pytest.mark.parametrize("name", CODECS)
def test_codes_have_the_declared_type_and_the_latent_is_untouched(name):
    codec, z = CODECS[name](), torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    kept = z.clone()
    codec.fit(z)
    code = codec.encode(z)
    assert str(code.dtype) == f"torch.{codec.dtype}"
    assert code.shape == z.shape
    assert codec.decode(code).dtype == torch.float32
    assert torch.equal(z, kept)
