"""Codecs and augmentation inside a graph, on both runtimes: codes equal those of eager PyTorch, and what they stand for, too."""

import numpy as np
import onnxruntime
import pytest
import torch

from edgecl.codecs import PackedCodec, ProductCodec, Uint8Codec
from edgecl.graph.capture import trace
from edgecl.graph.lowering import build_step
from edgecl.methods._augment import ENTRIES, PLACES, beta_quantiles, crop, crop_sizes, mix
from edgecl_device.engines import executorch
from edgecl_device.manifest import TensorSpec
from edgecl_export.targets import target_of

torch.set_num_threads(1)
SHAPE = (16, 3, 3)
CODECS = {"uint8": Uint8Codec(), "bits3": PackedCodec(3), "pq": ProductCodec(4, 16)}
INPUTS = {
    "x": TensorSpec("x", (1, *SHAPE), "float32"),
    "size": TensorSpec("size", (2,), "int64"),
    "place": TensorSpec("place", (2, 2), "int64"),
    "share": TensorSpec("share", (1,), "int64"),
}
SIZES, SHARES = crop_sizes(*SHAPE[1:]), beta_quantiles(0.4)


def everything(state, data):
    """Every codec's codes and decoded values of one latent; two crops of it, and their mixture."""
    z, found = data["x"], {}
    for name, codec in CODECS.items():
        code = codec.encode(z)
        found |= {f"code.{name}": code, f"value.{name}": codec.decode(code)}
    boxes = crop(torch.cat([z, z]), data["size"], data["place"], SIZES)
    return {**found, "value.crop": boxes, "value.mix": mix(boxes, SHARES.index_select(0, data["share"]), 1)}, {}


def on_onnx(folder, step):
    target_of("onnx").write({"encode": step}, folder)
    session = onnxruntime.InferenceSession(str(folder / "encode.onnx"), providers=["CPUExecutionProvider"])
    return lambda data: session.run(None, {name: tensor.numpy() for name, tensor in data.items()})


def on_executorch(folder, step):
    target_of("executorch").write({"encode": step}, folder)
    _, runtime, _ = executorch._executorch()
    program = runtime.load_program((folder / "steps.pte").read_bytes())
    method = program.load_method("encode")
    return lambda data, kept=program: [tensor.numpy().copy() for tensor in method.execute(list(data.values()))]


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_codes_and_augmented_maps_are_those_of_eager(tmp_path, engine):
    """Also of values on the edge between two codes, and outside of the range."""
    generator = torch.Generator().manual_seed(0)
    for codec in CODECS.values():
        codec.fit(torch.rand(40, *SHAPE, generator=generator) * 2.55)
    step = build_step(trace("encode", everything, {}, INPUTS, []), engine)
    run = {"onnx": on_onnx, "executorch": on_executorch}[engine](tmp_path, step)
    samples = [torch.rand(1, *SHAPE, generator=generator) * 4 - 1 for _ in range(20)]
    samples.append((torch.arange(144).reshape(1, *SHAPE) + 0.5) * CODECS["uint8"]._scale)
    for z in samples:
        size, place, share = (
            torch.randint(0, below, INPUTS[name].shape, generator=generator)
            for name, below in (("size", ENTRIES), ("place", PLACES), ("share", ENTRIES))
        )
        data = {"x": z, "size": size, "place": place, "share": share}
        wanted, _ = everything({}, data)
        for port, got in zip(step.graph.outputs, run(data), strict=True):
            want = wanted[port.name].numpy()
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            if port.name.startswith("code"):
                assert np.array_equal(got, want), port.name
            else:
                assert np.abs(got - want).max() <= 2e-6, port.name
