"""Codecs inside a graph, on both runtimes: codes equal those of eager PyTorch, and what they stand for, too."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgecl.codecs import PackedCodec, ProductCodec, Uint8Codec
from edgecl.graph.capture import capture_encode
from edgecl.graph.lowering import build_step
from edgecl_device.engines import executorch
from edgecl_device.manifest import TensorSpec
from edgecl_export.targets import target_of

torch.set_num_threads(1)
SHAPE = (16, 3, 3)
CODECS = {
    "uint8": Uint8Codec(),
    "1 bit": PackedCodec(1),
    "3 bits": PackedCodec(3),
    "7 bits": PackedCodec(7),
    "pq": ProductCodec(4, 16),
    "pq of one part": ProductCodec(1, 8),
}


class RoundTrips(nn.Module):
    """Every codec's codes and decoded values of one latent."""

    def forward(self, z):
        found = {}
        for name, codec in CODECS.items():
            code = codec.encode(z)
            found |= {f"code {name}": code, f"value {name}": codec.decode(code)}
        return found


def on_onnx(folder, step):
    target_of("onnx").write({"encode": step}, folder)
    session = onnxruntime.InferenceSession(str(folder / "encode.onnx"), providers=["CPUExecutionProvider"])
    return lambda z: session.run(None, {"x": z})


def on_executorch(folder, step):
    target_of("executorch").write({"encode": step}, folder)
    torch_, runtime, _ = executorch._executorch()
    program = runtime.load_program((folder / "steps.pte").read_bytes())
    method = program.load_method("encode")
    return lambda z, kept=program: [t.numpy().copy() for t in method.execute([torch_.from_numpy(z)])]


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_codes_are_those_of_eager(tmp_path, engine):
    """Also of values on the edge between two codes, and outside of the range."""
    generator = torch.Generator().manual_seed(0)
    for codec in CODECS.values():
        codec.fit(torch.rand(40, *SHAPE, generator=generator) * 2.55)
    step = build_step(capture_encode(RoundTrips(), TensorSpec("x", (1, *SHAPE), "float32")), engine)
    run = {"onnx": on_onnx, "executorch": on_executorch}[engine](tmp_path, step)
    names = [p.name.removeprefix("z.") for p in step.graph.outputs]
    samples = [torch.rand(1, *SHAPE, generator=generator) * 4 - 1 for _ in range(20)]
    scale = CODECS["uint8"]._scale
    samples.append((torch.arange(144).reshape(1, *SHAPE) + 0.5) * scale)
    for z in samples:
        wanted = RoundTrips()(z)
        for name, got in zip(names, run(z.numpy()), strict=True):
            want = wanted[name].numpy()
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            if name.startswith("code"):
                assert np.array_equal(got, want), name
            else:
                assert np.abs(got - want).max() <= 1e-6, name
