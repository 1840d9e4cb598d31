"""A trunk in int8: integer arithmetic by hand, the same on both runtimes, a quarter of the bytes, and refusals."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl import ImageU8, Prepared, prepare
from edgecl.cli import main
from edgecl.graph.lowering import build
from edgecl.graph.quantised import QUANTIZE
from edgecl_device import Learner
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import read_manifest
from edgecl_export import ExportError, export
from edgecl_export.bundle import Exported
from edgecl_export.latents import INT8, Latents
from edgecl_export.targets import target_of

torch.set_num_threads(1)
ENGINES = ("onnx", "executorch")


class Net(nn.Module):
    """What trunks are made of: batch norm, ReLU6 in place, a grouped convolution, padding, a residual sum, pooling, a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU())
        self.point = nn.Conv2d(width, width, 1)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 4)
        generator = torch.Generator().manual_seed(0)
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.is_floating_point():
                tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var = module.running_var.abs() + 0.5  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.pad(x))
        y: Tensor = F.relu(self.point(self.depth(x)) + x)
        return self.head(self.hidden(self.pool(y)))  # type: ignore[no-any-return]


def samples(count: int, shape: tuple[int, ...] = (3, 12, 12), seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def learner(dtype: str = "int8", method: str = "ridge", model: nn.Module | None = None, at: str = "hidden", seed: int = 0) -> Prepared:
    x = samples(40, seed=seed)
    int8 = {"trunk_dtype": dtype, "calibration": x} if dtype == "int8" else {}
    ready = prepare(model or Net(), at=at, example=x[:1], method=method, classes=4, **int8)  # type: ignore[arg-type]
    return ready.fit(x, np.arange(40) % 4)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Exported]:
    folder = tmp_path_factory.mktemp("int8")
    ready = {dtype: learner(dtype) for dtype in ("float32", "int8")}
    return {(e, d): export(ready[d], folder / f"{e}-{d}", engine=e) for e in ENGINES for d in ready}


def latents(found: Exported, x: Any) -> Any:
    engine = target_of(found.manifest.engine).read(found.path, found.manifest).engine()
    z = np.concatenate([engine.run("encode", {"x": x[i : i + 1]})["z"].copy() for i in range(len(x))])
    engine.close()
    return z


def quantizations(prepared: Prepared) -> list[tuple[float, int]]:
    """Scale and zero point of every quantization, in order."""
    nodes = [n for n in prepared.trunk.model.graph.nodes if n.target is QUANTIZE]  # type: ignore[union-attr]
    return [(n.args[1], n.args[2]) for n in nodes]


@pytest.mark.parametrize("engine", ["eager", *ENGINES])
def test_a_convolution_is_that_of_integers(engine: str, tmp_path: Path) -> None:
    """Codes of input and weights, an int32 sum, one scale a channel: computed with NumPy alone but for the scales of the activations."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = samples(40, (2, 6, 6))
    ready = prepare(net, at="1", example=x[:1], method="ncm", classes=4, trunk_dtype="int8", calibration=x)
    if engine == "eager":
        z = torch.cat(ready.encode(x)).numpy()
    else:
        z = latents(export(ready.fit(x, np.arange(40) % 4), tmp_path / "b", engine=engine), x)

    (scale, zero), (out_scale, out_zero) = quantizations(ready)
    weight, bias = (p.detach().numpy() for p in net[0].parameters())
    weight_scale = np.abs(weight).reshape(3, -1).max(1) / np.float32(127)
    codes = np.rint(weight / weight_scale[:, None, None, None]).astype(np.int32)
    rounded = np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127).astype(np.int32) - zero
    windows = np.lib.stride_tricks.sliding_window_view(rounded, (3, 3), (2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, codes)
    assert sums.dtype == np.int32
    steps = scale * weight_scale.astype(np.float64)[None, :, None, None]
    offset = bias[None, :, None, None]
    if engine != "eager":  # runtimes add it to the sums, as int32
        offset = np.rint(offset / steps) * steps
    value = np.maximum(sums * steps + offset, 0)
    wanted = (np.clip(np.rint(value / out_scale) + out_zero, -128, 127) - out_zero) * out_scale
    apart = np.abs(z - wanted) / out_scale
    assert apart.max() < 1 + 1e-3
    assert np.mean(apart > 1e-3) < 1e-3  # what float32 rounds to the other side
    in_float = np.maximum(F.conv2d(torch.tensor(x), *net[0].parameters()).detach().numpy(), 0)
    error = out_scale / 2 + scale / 2 * np.abs(weight).sum((1, 2, 3)) + weight_scale / 2 * np.abs(x).max() * 18 + 1e-5
    assert (
        np.abs(z - np.minimum(in_float, out_scale * 255))[:, :] <= error[None, :, None, None] + scale * weight_scale[:, None, None] * 5
    ).all()


def test_a_latent_is_the_same_in_every_batch() -> None:
    ready, x = learner(), samples(64, seed=1)
    alone = torch.cat(ready.encode(x, batch=1))
    for batch in (2, 7, 64):
        assert torch.equal(torch.cat(ready.encode(x, batch)), alone)


def test_a_latent_is_near_that_of_float32() -> None:
    x = samples(64, seed=1)
    int8, exact = (torch.cat(learner(dtype).encode(x)) for dtype in ("int8", "float32"))
    assert 0 < torch.linalg.norm(int8 - exact) < 0.03 * torch.linalg.norm(exact)


@pytest.mark.parametrize("engine", ENGINES)
def test_runtimes_compute_what_the_host_does(engine: str, bundles: dict[tuple[str, str], Exported]) -> None:
    x = samples(50, seed=2)
    eager = torch.cat(learner().encode(x)).numpy()
    found, exact = latents(bundles[engine, "int8"], x), torch.cat(learner("float32").encode(x)).numpy()
    assert np.linalg.norm(found - eager) < np.linalg.norm(eager - exact)
    assert np.median(np.abs(found - eager)) == 0  # few values are a rounding away
    parity = next(gate.found for gate in bundles[engine, "int8"].gates if gate.name == "parity")
    assert "int8 trunk: z " in parity


def test_onnx_runtime_computes_every_layer_in_integers(bundles: dict[tuple[str, str], Exported], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(bundles["onnx", "int8"].path / "encode.onnx"), options)
    found = Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (3, 1, 1)
    assert not {"Conv", "Add", "Gemm", "MatMul", "Relu", "Clip"} & set(found)


def test_xnnpack_takes_every_layer(bundles: dict[tuple[str, str], Exported]) -> None:
    """Portable kernels have no integers, so none is left for them; what the delegate got, it got quantised: the program holds the codes."""
    found = bundles["executorch", "int8"]
    files = target_of("executorch").read(found.path, found.manifest)
    assert files.operators("encode") == {"XnnpackBackend"}
    held = [tensor for tensor in build(learner(), "executorch")["encode"].graph.constants().values() if tensor.dtype == torch.int8]
    assert len(held) == 4
    assert all(files.holds("encode", tensor.numpy()) for tensor in held)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_weights_are_a_quarter(engine: str, tmp_path: Path) -> None:
    """Of a wide network, whose weights outweigh scales and biases; in the ledger and in the files."""
    sizes = {}
    for dtype in ("float32", "int8"):
        found = export(learner(dtype, "ncm", Net(128)), tmp_path / dtype, engine=engine)
        file = found.path / ("weights.bin" if engine == "onnx" else "steps.pte")
        sizes[dtype] = (found.manifest.ledger["frozen_weights"], file.stat().st_size, found.manifest.steps["encode"].activation_bytes)
        if engine == "onnx":
            assert sizes[dtype][0] == sizes[dtype][1]
    kernels = 128 * 27 + 128 * 9 + 128 * 128 + 256 * 128
    assert sizes["int8"][0] - kernels < 30 * 4 * 128  # bias, scale of the weights and of the sums for 640 channels, and the means' norms
    assert sizes["float32"][0] - sizes["int8"][0] > 3 * kernels - 30 * 4 * 128
    assert sizes["float32"][1] - sizes["int8"][1] > 3 * kernels - 60 * 4 * 128
    assert sizes["int8"][2] < sizes["float32"][2] / 2


def test_costs_are_those_of_the_same_mathematics(bundles: dict[tuple[str, str], Exported]) -> None:
    for engine in ENGINES:
        steps = [bundles[engine, dtype].manifest.steps["encode"] for dtype in ("float32", "int8")]
        assert steps[0].canonical_macs == steps[1].canonical_macs == steps[1].executed_macs
        assert steps[1].elementwise > steps[0].elementwise
    layers = build(learner())["encode"].layers
    assert set(layers) == {"stem.0", "depth.0", "point", "hidden.0"}


def test_a_bundles_identity_tells_the_type_and_the_calibration(bundles: dict[tuple[str, str], Exported], tmp_path: Path) -> None:
    other = export(learner(seed=5), tmp_path / "other")
    ids = [bundles["onnx", "float32"].manifest.bundle_id, bundles["onnx", "int8"].manifest.bundle_id, other.manifest.bundle_id]
    assert len(set(ids)) == 3
    assert export(learner(), tmp_path / "again").manifest.bundle_id == ids[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_suffix_learns_in_float32(engine: str, tmp_path: Path) -> None:
    ready = learner(method="latent_replay", at="pool")
    assert {tensor.dtype for name, tensor in ready.state.items() if name.startswith("param.")} == {torch.float32}
    found = export(ready, tmp_path / "bundle", engine=engine)
    x = samples(1)[0]
    with Learner.load(found.path) as device:
        losses = [device.learn(x, 2).loss for _ in range(30)]
        assert device.predict(x).label == 2
    assert losses[-1] < losses[0]  # type: ignore[operator]


def test_preprocessing_stays_as_it_is(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
    normalise = ImageU8([0.5] * 3, [0.2] * 3)
    options = {"at": "pool", "example": x[:1], "method": "ncm", "classes": 4, "preprocess": normalise}
    ready = prepare(Net(), **options, trunk_dtype="int8", calibration=x).fit(x, np.arange(40) % 4)  # type: ignore[arg-type]
    graph = onnx.load(export(ready, tmp_path / "b").path / "encode.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert {"Cast", "BatchNormalization"} <= set(kinds[: kinds.index("QuantizeLinear")])  # mean and deviation, in float


def test_several_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.sensor, self.mix, self.head = nn.Conv2d(3, 8, 3), nn.Linear(6, 8), nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, image: Tensor, sensor: Tensor) -> Tensor:
            both = torch.cat([F.relu(self.image(image)).mean((2, 3)), F.relu(self.sensor(sensor))], 1)
            return self.head(F.relu(self.mix(both)))  # type: ignore[no-any-return]

    x = {"image": samples(40), "sensor": samples(40, (6,))}
    one = {name: part[:1] for name, part in x.items()}
    ready = prepare(Two(), at="mix", example=one, method="ncm", classes=4, trunk_dtype="int8", calibration=x).fit(x, np.arange(40) % 4)
    for engine in ENGINES:
        export(ready, tmp_path / engine, engine=engine)


def test_a_bundle_with_other_latents_is_refused() -> None:
    generator, found = np.random.default_rng(0), Latents()
    for _ in range(8):
        exact, error, other = generator.standard_normal((3, 1, 64))
        found.add({"z": exact + 0.01 * error}, {"z": exact + 0.01 * other}, {"z": exact})
    assert "z 1e-02 from eager, 1e-02 from float32" in found.check(1e-4)  # no two roundings agree: the square root of 2
    found.add({"z": exact}, {"z": exact + INT8 * 0.05 * other}, {"z": exact})
    with pytest.raises(ExportError, match=r"z differs from eager by .*, more than 1\.5 times what int8 costs"):
        found.check(1e-4)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 432)


class Bare(nn.Module):
    """Nothing that int8 has a layer for."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.flat, self.head = nn.Tanh(), nn.Flatten(), nn.Linear(432, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.act(x)))  # type: ignore[no-any-return]


def large() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 4))
    nn.init.constant_(net[0].weight, 100.0)  # type: ignore[arg-type]
    return net


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk_dtype": "int4"}, "trunk_dtype: must be one of float32, int8, got 'int4'"),
        ({"calibration": None}, r"calibration: must be raw samples \[N, ...\] for trunk_dtype='int8', got None"),
        ({"trunk_dtype": "float32"}, "calibration: is for trunk_dtype='int8', got samples with 'float32'"),
        (
            {"calibration": samples(4, (3, 8, 8))},
            r"calibration: must be float32 \[N, 3, 12, 12\] as the example, got float32 \[4, 3, 8, 8\]",
        ),
        ({"calibration": samples(4) * np.nan}, "calibration: values must be finite"),
        ({"model": large(), "at": "0", "calibration": samples(4) * np.float32(5e37)}, "calibration: latents of its samples must be finite"),
        ({"calibration": [1.0]}, "calibration: must be a numpy array"),
        ({"calibration": {"a": samples(4)}}, "calibration: must have the inputs of the example, one array"),
        ({"model": Bare(), "at": "act"}, "trunk_dtype: 'int8' must suit the trunk, it has no layer that can be"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"at": "hidden", "trunk_dtype": "int8", "calibration": samples(4), **changes}
    with pytest.raises(InputError, match=message):
        prepare(options.pop("model", Net()), example=samples(1), method="ncm", classes=4, **options)


def test_the_command_calibrates_on_the_base_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    np.savez(tmp_path / "base.npz", x=x, y=np.arange(20) % 4)
    words = ["export", "small_cnn", "--at", "pool", "--method", "ncm", "--preprocess-u8", "HW", "--mean", "0.3", "--std", "0.3"]
    sizes = {}
    for dtype in ("float32", "int8"):
        out = tmp_path / dtype
        assert main([*words, "--data", str(tmp_path / "base.npz"), "--trunk-dtype", dtype, "--out", str(out)]) == 0
        sizes[dtype] = read_manifest(out).ledger["frozen_weights"]
    assert sizes["int8"] < 0.4 * sizes["float32"]
    capsys.readouterr()
    assert main([*words, "--trunk-dtype", "int8", "--out", str(tmp_path / "none")]) == 2
    assert "--data: is needed, --trunk-dtype int8 is calibrated on base samples" in capsys.readouterr().err
    assert main([*words, "--trunk-dtype", "int4", "--data", str(tmp_path / "base.npz"), "--out", str(tmp_path / "none")]) == 2
    assert "trunk_dtype: must be one of float32, int8, got 'int4'" in capsys.readouterr().err


def test_a_trunk_of_single_samples_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), One(), nn.Linear(432, 8), nn.Linear(8, 4))
    with pytest.raises(InputError, match="trunk_dtype: 'int8' must suit the trunk, it cannot be traced for any number of samples"):
        prepare(net, at="2", example=samples(1), method="ncm", classes=4, trunk_dtype="int8", calibration=samples(1))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(EdgeclError, match=r"executorch and torchao are not installed; install them with: pip install 'edgecl\[int8\]'"):
        learner()


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    learner()
    assert capfd.readouterr() == ("", "")


class Odd(nn.Module):
    """A convolution that is used twice, names that differ by a dot, a border of fives, and a sum with a learned map."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
        self.conv_1 = nn.Conv2d(8, 8, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.border = nn.ConstantPad2d(1, 5.0)
        self.last = nn.Conv2d(8, 8, 3)
        self.map = nn.Parameter(torch.randn(1, 8, 12, 12, generator=generator))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 4)
        for name, tensor in self.named_parameters():
            tensor.data = (2.0 if name.endswith("bias") else 0.3) * torch.randn(tensor.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_1(self.conv(x)))
        x = F.relu(self.twice(F.max_pool2d(F.relu(self.twice(x)), 3, stride=1, padding=1)) + self.map)
        x = F.relu(self.last(self.border(torch.sigmoid(x))))
        return self.head(self.pool(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_used_twice_padded_by_numbers_or_named_alike(engine: str, tmp_path: Path) -> None:
    ready = learner(model=Odd(), at="pool")
    found = export(ready, tmp_path / "bundle", engine=engine)
    x = samples(16, seed=3)
    with torch.no_grad():
        [exact] = [ready.trunk.in_float[0](torch.tensor(x)).numpy()]
    assert np.linalg.norm(latents(found, x) - exact) < 0.05 * np.linalg.norm(exact)
