"""The bundle writer: its gates refuse what they are for, its figures are real sizes, its output is the same every time."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

import edgecl_export.bundle as bundle
from edgecl import METHODS, prepare
from edgecl.graph.step import UnsupportedOperatorError
from edgecl.methods.finetune import Finetune
from edgecl_device import BundleError, Learner, ReplayMemory, SchemaError
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import MANIFEST, from_json, read_manifest, to_json
from edgecl_export import ExportError, export

torch.set_num_threads(1)

SHIPPED = [name for name in METHODS if name != "joint"]
shipped = pytest.mark.parametrize("method", SHIPPED)


def refused(toy, folder, method, match, error=ExportError, **changes):
    """The export fails with this error and leaves nothing behind, not even a missing parent."""
    ready = toy.prepared(method, **changes) if isinstance(method, str) else method
    before = toy.helpers.arrays(ready.state)
    with pytest.raises(error, match=match):
        export(ready, folder / "new" / "bundle")
    assert list(folder.iterdir()) == []
    assert toy.helpers.same(toy.helpers.arrays(ready.state), before)


@pytest.fixture
def spoil(monkeypatch):
    """Changes every model between the emitter and the file."""

    def install(change):
        real = bundle.Emitter

        class Spoiled(real):
            def emit(self):
                model = super().emit()
                change(self.graph.name, model)
                return model

        monkeypatch.setattr(bundle, "Emitter", Spoiled)

    return install


def replace_first(model, op_type, new_type, **attributes):
    """Another operator in place of the first of a kind."""
    node = next(n for n in model.graph if n.op_type == op_type)
    other = ir.node(new_type, [node.inputs[0]], attributes, outputs=[ir.Value(name=o.name + "_new") for o in node.outputs])
    model.graph.insert_before(node, other)
    for old, new in zip(node.outputs, other.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new)
    model.graph.remove(node)


def test_every_gate_reports_what_it_found(toy):
    exported, _ = toy.bundle("latent_replay")
    names = ["kernels", "no random operator", "state is input", "initial state", "parity", "frozen tensors"]
    assert [gate.name for gate in exported.gates] == names
    assert all(gate.found for gate in exported.gates)


def test_gate_kernels(toy, spoil, tmp_path):
    spoil(lambda step, model: replace_first(model, "Relu", "Swish") if step == "encode" else None)
    refused(toy, tmp_path, "ridge", r"gate 'kernels': step 'encode' uses Swish, opset 18, .*no kernel.*; add a rule")


def test_gate_no_random_operator(toy, spoil, tmp_path):
    spoil(lambda step, model: replace_first(model, "Relu", "RandomNormalLike") if step == "encode" else None)
    refused(toy, tmp_path, "ridge", r"gate 'no random operator': step 'encode' draws random numbers \(RandomNormalLike\)")


def test_gate_state_is_input_of_the_graph(toy, spoil, tmp_path):
    def bake(step, model):
        if step == "predict":
            value = next(v for v in model.graph.inputs if v.name == "state.readout")
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)
            model.graph.initializers[value.name] = value

    spoil(bake)
    refused(toy, tmp_path, "ridge", r"gate 'state is input': step 'predict': \['state.readout'\] must be inputs")


@pytest.mark.parametrize("transposed", [False, True])
def test_gate_state_is_not_baked_in(toy, tmp_path, transposed):
    class Baked(Finetune):
        """Predicts with the weights that it was made with: eager and ONNX agree, and it never learns."""

        def predict(self, state, z):
            outputs, new = super().predict(state, z)
            weight, row = self.suffix.get_parameter("mid.3.weight").reshape(8, 6), z.reshape(1, -1)
            baked = torch.mm(row[:, :6], weight.t()) if transposed else torch.mm(row[:, :8], weight)
            return {"scores": outputs["scores"] + baked.sum(1, keepdim=True)}, new

    ready = toy.prepared("finetune")
    ready.learner = Baked(ready.learner.problem, ready.learner.config, suffix=ready.learner.suffix)
    refused(toy, tmp_path, ready, r"gate 'state is input': step 'predict' holds the values of state 'param.mid.3.weight' as a constant")


def test_gate_initial_state(toy, monkeypatch, tmp_path):
    real = bundle.save

    def spoiled(tensors):
        return real({name: array + np.float32(1e-6) if name == "readout" else array for name, array in tensors.items()})

    monkeypatch.setattr(bundle, "save", spoiled)
    refused(toy, tmp_path, "ridge", "gate 'initial state': 'readout' in the bundle differs")


def test_gate_parity(toy, spoil, tmp_path):
    spoil(lambda step, model: replace_first(model, "Clip", "Identity") if step == "learn" else None)
    refused(toy, tmp_path, "finetune", "gate 'parity': step 'learn': .* differs from eager by")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_gates_refuse_a_step_that_is_ten_percent_wrong(toy, spoil, tmp_path, trained, factor):
    """Also on a network that knows its samples, whose losses are all but zero."""

    def change(step, model):
        if step == "learn":
            lr = next(v for v in model.graph.inputs if v.name == "lr")
            users = list(lr.uses())
            scale = ir.Value(name="scale", shape=ir.Shape(()), type=lr.type, const_value=ir.tensor(np.float32(factor), name="scale"))
            model.graph.initializers["scale"] = scale
            wrong = ir.node("Mul", [lr, scale], outputs=[ir.Value(name="wrong_lr", shape=lr.shape, type=lr.type)])
            model.graph.insert_before(next(iter(model.graph)), wrong)
            for node, index in users:
                node.replace_input_with(index, wrong.outputs[0])

    net = toy.helpers.Net()
    x, y = toy.helpers.samples(60)
    if trained:
        optimiser = torch.optim.Adam(net.parameters(), 0.03)
        for _ in range(150):
            optimiser.zero_grad()
            loss = F.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y))
            loss.backward()
            optimiser.step()
        assert loss < 1e-3
    ready = prepare(net, at="stem", example=x[:1], method="latent_replay", classes=5, config=toy.config("latent_replay")).fit(x, y)
    export(ready, toy.folder / f"right {trained} {factor}")
    spoil(change)
    refused(toy, tmp_path, ready, "gate 'parity': step 'learn': .* differs from eager by")


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_gates_refuse_an_altered_weight(toy, monkeypatch, tmp_path, size):
    """A large change is seen by parity, a small one by the comparison to the bit."""
    real = bundle.WeightFile.place

    def altered(self, array):
        array = np.array(array)
        if array.dtype == np.float32 and array.size > 50:
            array.flat[0] *= 1 + np.float32(size)
        return real(self, array)

    monkeypatch.setattr(bundle.WeightFile, "place", altered)
    refused(toy, tmp_path, "frozen", "gate '(parity|frozen tensors)'")


def test_gates_refuse_files_that_change_while_they_run(toy, monkeypatch, tmp_path):
    real = bundle.verify

    def late(folder, *rest):
        (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[::-1])
        return real(folder, *rest)

    monkeypatch.setattr(bundle, "verify", late)
    refused(toy, tmp_path, "ridge", "weights.bin: SHA-256 differs", BundleError)


def test_existing_folders(toy, tmp_path):
    ready, path = toy.prepared("ncm"), tmp_path / "bundle"
    export(ready, path)
    before = toy.helpers.hashes(path)
    with pytest.raises(InputError, match=r"^path: .*bundle exists; choose another folder or pass overwrite=True"):
        export(ready, path)
    assert toy.helpers.hashes(path) == before
    (path / "left over").write_text("from an older one")
    export(toy.prepared("slda"), str(path), overwrite=True)
    assert read_manifest(path).method == "slda"
    assert not (path / "left over").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"")
    with pytest.raises(InputError, match="this one holds no bundle"):
        export(ready, other, overwrite=True)
    assert (other / "cat.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "photos"]


def test_a_failed_overwrite_keeps_the_old_bundle(toy, spoil, tmp_path):
    export(toy.prepared("ncm"), tmp_path / "bundle")
    before = toy.helpers.hashes(tmp_path / "bundle")
    spoil(lambda step, model: replace_first(model, "Relu", "Identity") if step == "encode" else None)
    with pytest.raises(ExportError):
        export(toy.prepared("ncm"), tmp_path / "bundle", overwrite=True)
    assert toy.helpers.hashes(tmp_path / "bundle") == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_joint_is_refused(toy, tmp_path):
    refused(toy, tmp_path, "joint", "^method: 'joint' trains offline", InputError)


@shipped
def test_the_ledger_is_real_sizes(toy, method):
    exported, _ = toy.bundle(method)
    path, manifest, ledger = exported.path, exported.manifest, exported.manifest.ledger
    assert ledger["frozen_weights"] == (path / "weights.bin").stat().st_size
    assert ledger["graphs"] == sum(p.stat().st_size for p in path.glob("*.onnx"))
    assert ledger["state"] == sum(a.nbytes for a in load_file(path / manifest.state_file).values())
    with Learner.load(path) as learner:
        real = learner._core.memory.nbytes if learner._core.memory else 0
        assert ledger["replay"] == real == (learner.report()["replay"] or {"bytes": 0})["bytes"]
    if manifest.replay is not None:
        memory = ReplayMemory(manifest.replay, manifest.max_classes)
        memory.fill(load_file(path / manifest.replay_file))
        assert memory.nbytes == ledger["replay"] <= manifest.replay.capacity_bytes
    engine = OnnxEngine(path, manifest)
    buffers = [view.nbytes for views in engine._views.values() for view in views]
    assert ledger["state"] + ledger["state_second_buffers"] == sum(buffers)
    ports = [a.nbytes for step in engine._steps.values() for a in (*step.inputs.values(), *step.outputs.values())]
    assert ledger["inputs_outputs"] == sum(ports)
    z = engine.run("encode", {"x": np.zeros((1, 1, 8, 8), np.float32)})
    assert ledger["flash_per_update"] == sum(a.nbytes for a in z.values())
    assert ledger["pending_features"] == manifest.pending_capacity * ledger["flash_per_update"]
    assert ledger["beyond_trunk"] == ledger["state"] + ledger["replay"]
    assert {p.name: p.stat().st_size for p in path.iterdir() if p.name != MANIFEST} == {n: f.bytes for n, f in manifest.files.items()}


@shipped
def test_two_exports_are_equal(toy, method, tmp_path):
    exported, _ = toy.bundle(method)
    export(toy.prepared(method), tmp_path / "again")
    assert toy.helpers.hashes(tmp_path / "again") == toy.helpers.hashes(exported.path)


def test_two_processes_write_equal_bundles(toy, tmp_path):
    """Sets and dictionaries are hashed with another seed in every process."""
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('helpers', sys.argv[1]); helpers = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(helpers); helpers.Toy(Path(sys.argv[2])).bundle('latent_replay')\n"
    )
    helpers = str(Path(__file__).with_name("helpers.py"))
    command = [sys.executable, "-c", code, helpers, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert toy.helpers.hashes(tmp_path / "0") == toy.helpers.hashes(toy.bundle("latent_replay")[0].path)


@shipped
def test_the_manifest_round_trips(toy, method):
    exported, _ = toy.bundle(method)
    assert from_json(to_json(exported.manifest)) == exported.manifest == read_manifest(exported.path)


def test_a_newer_schema_is_refused(toy, tmp_path):
    exported, _ = toy.bundle("ncm")
    for file in exported.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**data, "schema": data["schema"] + 1, "hologram": True}))
    with pytest.raises(SchemaError, match="schema is 2, this package reads up to 1; update edgecl"):
        Learner.load(tmp_path)


@pytest.mark.parametrize(("method", "changes"), [("finetune", {"trainable": ("fc.*",)}), ("ridge", {"projection": 40})])
def test_all_graphs_read_one_weight_file(toy, method, changes):
    exported, _ = toy.bundle(method, **changes)
    places = {}
    for step in exported.manifest.steps.values():
        model = ir.load(exported.path / step.file)
        assert model.ir_version == 10
        assert model.opset_imports[""] == 18
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                assert str(value.const_value.location) == "weights.bin"
                places.setdefault((value.const_value.offset, value.const_value.length), set()).add(step.file)
    assert any(len(files) > 1 for files in places.values()), "a tensor of several steps is stored once"
    spans = sorted(places)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans)), "no two tensors overlap"
    stored = (exported.path / "weights.bin").read_bytes()
    assert len({stored[a : a + n] for a, n in spans}) == len(spans), "no tensor is stored twice"
    assert len(stored) == max(a + n for a, n in spans)
    assert all(a % 64 == 0 for a, _ in spans)


def test_stores_of_other_frozen_parts_do_not_fit(toy):
    """The same trunk and hyperparameters behind another codec range or another frozen layer are another bundle."""
    x, y = toy.helpers.samples(60)
    first, _ = toy.bundle("latent_replay")
    ready = toy.prepared("latent_replay", fit=False).fit(2 * x[y < 2], y[y < 2])
    other = export(ready, toy.folder / "other range").manifest
    assert other.trunk_hash == first.manifest.trunk_hash
    assert other.bundle_id != first.manifest.bundle_id
    ids = set()
    for scale in (1.0, 2.0):
        net = toy.helpers.Net()
        net.mid[3].weight.data *= scale
        config = toy.config("finetune", trainable=("fc.*",))
        ready = prepare(net, at="stem", example=x[:1], method="finetune", classes=5, config=config).fit(x[y < 2], y[y < 2])
        ids.add(export(ready, toy.folder / f"frozen {scale}").manifest.bundle_id)
    assert len(ids) == 2


class Erf(nn.Module):
    def forward(self, x):
        return torch.erf(x)


class Odd(nn.Module):
    """A net with something in the trunk and something in the suffix that no runtime rule covers."""

    def __init__(self, front=None, back=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.front = nn.Sequential(nn.ReLU(), front or nn.Identity())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.ModuleDict({"odd": back or nn.Identity(), "fc": nn.Linear(4, 5)})

    def forward(self, x):
        return self.head["fc"](self.head["odd"](self.pool(self.front(self.conv(x)))))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.bilinear(x, x)


@pytest.mark.parametrize(
    ("model", "operator", "where"),
    [
        (Odd(front=nn.GELU()), r"aten\.gelu", r"front\.1"),
        (Odd(front=nn.LayerNorm(6)), r"aten\.native_layer_norm", r"front\.1"),
        (Odd(back=nn.GELU("tanh")), r"aten\.gelu", r"head\.odd"),
        (Odd(back=Pair()), r"aten\._trilinear", r"head\.odd\.bilinear"),
        (Odd(back=nn.PReLU()), r"aten\._prelu", r"head\.odd"),
    ],
)
def test_an_unsupported_operator_is_named_with_its_module(toy, tmp_path, model, operator, where):
    x, y = toy.helpers.samples(10)
    ready = prepare(model, at="pool", example=x[:1], method="finetune", classes=5).fit(x, y)
    refused(toy, tmp_path, ready, f"{operator}.* in {where}\\b.*; ", UnsupportedOperatorError)


@pytest.mark.parametrize(("part", "where"), [("front", "front.1"), ("back", "head.odd")])
def test_an_unsupported_function_is_named(toy, tmp_path, part, where):
    x, y = toy.helpers.samples(10)
    ready = prepare(Odd(**{part: Erf()}), at="pool", example=x[:1], method="finetune", classes=5).fit(x, y)
    refused(toy, tmp_path, ready, rf"aten\.erf\.default.* in {where}\b", UnsupportedOperatorError)


def test_a_state_beyond_the_budget_is_refused(toy, tmp_path):
    ready = toy.prepared("ridge")
    state = sum(tensor.numel() * tensor.element_size() for tensor in ready.state.values())
    with pytest.raises(InputError, match=f"ram_budget_bytes.*{2 * state - 1:,}"):
        export(ready, tmp_path / "bundle", ram_budget_bytes=2 * state - 1)
    assert list(tmp_path.iterdir()) == []
    export(ready, tmp_path / "bundle", ram_budget_bytes=2 * state)


def test_a_codec_without_a_range_says_what_to_call(toy, tmp_path):
    refused(toy, tmp_path, toy.prepared("latent_replay", fit=False), r"has no range yet; call fit\(\)", EdgeclError)


@shipped
def test_a_learner_that_was_never_fitted_ships(toy, tmp_path, method):
    changes = {"codec": "float32"} if method == "latent_replay" else {}
    export(toy.prepared(method, fit=False, **changes), tmp_path / "empty")
    x, _ = toy.helpers.samples(3)
    with Learner.load(tmp_path / "empty") as learner:
        assert np.all(learner.predict(x[0]).scores < -1e29), "no class is known"
        if method != "frozen":
            learner.learn(x[1], 4)
            assert learner.predict(x[1]).label == 4


def test_costs_are_in_the_manifest(toy):
    exported, _ = toy.bundle("ridge")
    steps = exported.manifest.steps
    size, classes = 96, 5
    assert steps["predict"].canonical_macs == size * classes
    assert steps["learn"].canonical_macs == 2 * size**2 + 2 * size * classes + size
    assert steps["encode"].canonical_macs == 6 * 9 * 64
    assert all(sum(s.macs_by_phase.values()) == s.canonical_macs <= s.executed_macs for s in steps.values())
