"""Replay codecs against their definition."""

import sys

import numpy as np
import pytest
import torch

from edgecl.codecs import CODECS, CodecError, Float32Codec, PackedCodec, ProductCodec, Uint8Codec
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import ReplaySpec, TensorSpec
from edgecl_device.memory import ReplayMemory


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
    for codec in (Uint8Codec(), PackedCodec(), ProductCodec()):
        for use in (codec.encode, codec.decode):
            with pytest.raises(CodecError, match=r"call fit\(\) with base samples"):
                use(torch.zeros(1, 8))
    assert issubclass(CodecError, EdgeclError)


def test_float32_is_the_value_itself():
    codec, z = Float32Codec(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    codec.fit(z)
    assert torch.equal(codec.decode(codec.encode(z)), z)


SHAPES = [(16,), (8, 5), (16, 3, 3)]
MAP = TensorSpec("z", (1, 16, 2, 2), "float32")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_codes_have_the_declared_shape_and_type_and_the_latent_is_untouched(name, shape):
    codec, z = CODECS[name](), torch.randn(80, *shape, generator=torch.Generator().manual_seed(0))
    kept = z.clone()
    row = codec.row_spec(TensorSpec("z", (1, *shape), "float32"))
    codec.fit(z)
    code = codec.encode(z[:3])
    assert (str(code.dtype), tuple(code.shape)) == (f"torch.{row.dtype}", (3, *row.shape))
    decoded = codec.decode(code)
    assert (decoded.dtype, decoded.shape) == (torch.float32, z[:3].shape)
    assert torch.equal(z, kept)
    assert codec.lossless == torch.equal(decoded, z[:3])
    assert torch.equal(codec.decode(codec.encode(z[1:2])), decoded[1:2]), "a row does not depend on the others"


@pytest.mark.parametrize("n", [1, 7, 8, 21])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bits_against_numpy(bits, n):
    """Codes by float64, ties among them, then NumPy's own bit packing; back the same way."""
    codec, top = PackedCodec(bits), 2**bits - 1
    rng = np.random.default_rng(bits)
    z = rng.uniform(-0.3 * top, 1.3 * top, (5, n)).astype(np.float32)
    z[0] = rng.integers(0, top, n) + 0.5  # ties
    codec.fit(torch.tensor([[0.0] * (n - 1) + [float(top)], [float(top)] * (n - 1) + [0.0]]))
    numbers = np.clip(np.rint(z), 0, top).astype(np.uint8)
    stream = np.unpackbits(numbers, axis=1, bitorder="little").reshape(5, n, 8)[:, :, :bits].reshape(5, -1)
    packed = np.packbits(stream, axis=1, bitorder="little")
    code = codec.encode(torch.from_numpy(z))
    assert np.array_equal(code.numpy(), packed)
    assert codec.row_spec(TensorSpec("z", (1, n), "float32")).shape == packed.shape[1:]
    assert np.array_equal(codec.decode(code).numpy(), numbers.astype(np.float32))


def nearest(vectors, codebooks):
    """Codes [n, m] and squared distances [n, m, k] by brute force in float64."""
    m, _, width = codebooks.shape
    parts = vectors.reshape(len(vectors), m, 1, width).astype(np.float64)
    distances = ((parts - codebooks[None]) ** 2).sum(3)
    return distances.argmin(2), distances


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 2), (4, 16), (8, 64)])
def test_product_codes_are_the_nearest_codewords(shape, m, k):
    codec, z = ProductCodec(m, k), torch.randn(100, *shape, generator=torch.Generator().manual_seed(1))
    codec.fit(z)
    codebooks = codec.constants()[0].numpy()
    vectors = np.moveaxis(z.numpy().reshape(100, shape[0], -1), 1, 2).reshape(-1, shape[0])
    best, distances = nearest(vectors, codebooks)
    codes = codec.encode(z).numpy().reshape(-1, m)
    chosen = np.take_along_axis(distances, codes[:, :, None].astype(int), 2)[:, :, 0]
    assert np.all(chosen <= distances.min(2) * (1 + 1e-5) + 1e-6), "another codeword only where both are equally near"
    assert np.mean(codes == best) > 0.999
    decoded = np.moveaxis(codec.decode(codec.encode(z)).numpy().reshape(100, shape[0], -1), 1, 2).reshape(-1, m, shape[0] // m)
    assert np.array_equal(decoded, codebooks[np.arange(m), codes])


def test_product_codes_equal_those_of_faiss():
    """The same training, then faiss' own encoder and decoder, as REMIND uses them on positions of a map."""
    import faiss

    z = torch.randn(40, 16, 3, 3, generator=torch.Generator().manual_seed(2)).relu()
    codec = ProductCodec(4, 16)
    codec.fit(z)
    positions = np.ascontiguousarray(z.permute(0, 2, 3, 1).reshape(-1, 16).numpy())
    other = faiss.ProductQuantizer(16, 4, 4)
    other.train(positions)
    assert np.array_equal(faiss.vector_to_array(other.centroids).reshape(4, 16, 4), codec.constants()[0].numpy())
    packed = other.compute_codes(positions)  # two codes of four bits a byte
    codes = np.stack([packed & 15, packed >> 4], 2).reshape(len(positions), 4)
    assert np.array_equal(codec.encode(z).numpy().reshape(-1, 4), codes)
    assert np.array_equal(codec.decode(codec.encode(z)).permute(0, 2, 3, 1).reshape(-1, 16).numpy(), other.decode(packed))


def test_a_tie_goes_to_the_lowest_codeword():
    codec = ProductCodec(1, 2)
    codec.fit(torch.tensor([[-1.0], [1.0]]))
    first = codec.constants()[0].reshape(2)[0]
    assert codec.decode(codec.encode(torch.zeros(1, 1))).item() == first.item()


def test_a_code_beyond_the_codebook_is_the_last_codeword():
    codec = ProductCodec(2, 4)
    codec.fit(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)))
    wild, last = torch.tensor([[250, 4]], dtype=torch.uint8), torch.tensor([[3, 3]], dtype=torch.uint8)
    assert torch.equal(codec.decode(wild), codec.decode(last))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PackedCodec(0), "^bits: must be in .1, 8., got 0; "),
        (lambda: PackedCodec(9), "^bits: "),
        (lambda: ProductCodec(0), "^subquantizers: must be at least 1"),
        (lambda: ProductCodec(8, 48), "^centroids: must be a power of two from 2 to 256, got 48; "),
        (lambda: ProductCodec(8, 512), "^centroids: "),
        (
            lambda: ProductCodec(5).row_spec(TensorSpec("z", (1, 16, 2, 2), "float32")),
            r"^subquantizers: must divide .* z, \[16, 2, 2\], got 5; ",
        ),
        (lambda: ProductCodec(3).fit(torch.zeros(99, 16)), "^subquantizers: must divide"),
        (lambda: ProductCodec(2, 64).fit(torch.zeros(7, 16, 3, 3)), "^latents: must hold at least 64 positions .*, got 63; "),
        (lambda: ProductCodec(2, 4).fit(torch.full((9, 16), torch.nan)), "^latents: must be finite"),
    ],
)
def test_what_a_codec_cannot_do_is_refused_by_name(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(EdgeclError, match=r"^faiss is not installed; install it with: pip install 'edgecl\[pq\]'$"):
        ProductCodec(2, 4).fit(torch.randn(9, 16))


def test_the_settings_of_remind_store_64_times_fewer_bytes():
    """512x7x7 maps, 32 sub-quantisers of 256 codewords: on the arrays of two real memories of the same number of rows."""
    latent = TensorSpec("z", (1, 512, 7, 7), "float32")
    fields = {name: codec.row_spec(latent) for name, codec in (("pq", ProductCodec(32, 256)), ("float32", Float32Codec()))}
    stored = {}
    for name, field in fields.items():
        memory = ReplayMemory(ReplaySpec((field,), 1, 8 * (field.nbytes + 12) + field.nbytes + 28, "reservoir", 0), 2)
        for i in range(20):
            memory.offer({"z": np.zeros(field.shape, field.dtype)}, i % 2, i)
        rows = memory.rows_by_name()["replay.z"]
        assert len(rows) == 8
        stored[name] = rows.nbytes // len(rows)
    assert stored == {"pq": 1_568, "float32": 100_352}
    assert stored["float32"] == 64 * stored["pq"]
    assert ReplaySpec((fields["pq"],), 1, 1, "reservoir", 0).fields[0].nbytes * 959_665 == 1_504_754_720, "REMIND's 959,665 rows: 1.5 GB"


def test_the_settings_of_remind_on_a_map_that_they_were_not_fitted_on():
    z = torch.randn(9, 512, 7, 7, generator=torch.Generator().manual_seed(0)).relu()
    codec = ProductCodec(32, 256)
    codec.fit(z[:8])
    codes = codec.encode(z[8:]).numpy().reshape(49, 32)
    _, distances = nearest(np.moveaxis(z[8].numpy().reshape(512, 49), 0, 1), codec.constants()[0].numpy())
    chosen = np.take_along_axis(distances, codes[:, :, None].astype(int), 2)[:, :, 0]
    assert np.all(chosen <= distances.min(2) * (1 + 1e-5))
    assert float(((codec.decode(codec.encode(z[8:])) - z[8:]) ** 2).sum()) == pytest.approx(chosen.sum(), rel=1e-4)
    assert sum(t.numel() * 4 for t in codec.constants()) == 4 * 256 * 512 + 4 * 256 * 32
