"""The bundle writer: its gates refuse what they are for, its figures are real sizes, its output is the same every time."""

import copy
import itertools
import json
import os
import re
import shutil
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
from edgecl import METHODS, ImageU8, prepare
from edgecl.graph.step import UnsupportedOperatorError
from edgecl.methods.finetune import Finetune
from edgecl_device import BundleError, Learner, ReplayMemory, SchemaError
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import MANIFEST, from_json, read_manifest, to_json
from edgecl_export import ExportError, export, place
from edgecl_export.onnx_ops import TRANSLATIONS
from edgecl_export.targets import onnx as targets

torch.set_num_threads(1)

SHIPPED = [name for name, kind in METHODS.items() if not kind.host_only]
shipped = pytest.mark.parametrize("method", SHIPPED)


def refused(toy, folder, method, match, error=ExportError, **changes):
    """The export fails with this error and leaves nothing behind, not even a missing parent."""
    ready = toy.prepared(method, **changes) if isinstance(method, str) else method
    before = {name: tensor.clone() for name, tensor in ready.state.items()}
    with pytest.raises(error, match=match):
        export(ready, folder / "new" / "bundle")
    assert list(folder.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in ready.state.items())


@pytest.fixture
def spoil(monkeypatch):
    """Changes every model between the emitter and the file."""

    def install(change):
        real = targets.Emitter

        class Spoiled(real):
            def emit(self):
                model = super().emit()
                change(self.graph.name, model)
                return model

        monkeypatch.setattr(targets, "Emitter", Spoiled)

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
    names = ["kernels", "no random operator", "state is input", "initial state", "parity", "frozen tensors", "loads"]
    assert [gate.name for gate in exported.gates] == names
    assert all(gate.found for gate in exported.gates)
    parity = next(gate.found for gate in exported.gates if gate.name == "parity")
    words = r"change \S+, outputs \S+, state \S+; (\d+) comparisons held the bare bars, (\d+) needed an allowance; states: (.*)"
    found = re.fullmatch(words, parity)
    assert found is not None
    assert int(found[1]) > 24 * 10 > int(found[2])
    assert found[3] == "encode 9, predict 25, learn 25", "24 of a trajectory and one of zeros; 8 raw samples and a random one"


def planted(monkeypatch, operator, change):
    """Another translation of an operator, in every step or in one."""
    good = TRANSLATIONS[operator]
    monkeypatch.setitem(TRANSLATIONS, operator, lambda emitter, node, *args, **kwargs: change(good, emitter, node, *args, **kwargs))


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("step", ["forget", "relabel"])
@pytest.mark.parametrize("classes", [5, 100])
def test_gate_parity_compares_revisions_of_what_was_learned(tmp_path, monkeypatch, fit, step, classes):
    """From a state that has not learned the sample, both engines refuse, and a wrong step would pass."""

    def seven(good, emitter, node, added, left, right, beta=1, alpha=1):
        return good(emitter, node, added, left, right, beta, alpha * (7.0 if emitter.graph.name == step else 1.0))

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, classes))
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    ready = prepare(model, at="1", example=x[:1], method="ridge", classes=classes)
    if fit:
        ready.fit(x, np.arange(40) % 2)
    parity = next(g.found for g in export(ready, tmp_path / "good").gates if g.name == "parity")
    counts = dict(part.split() for part in parity.split("states: ")[1].split(", "))
    assert [counts[name] for name in ("learn", "forget", "relabel")] == ["25"] * 3
    planted(monkeypatch, torch.ops.aten.addmm.default, seven)
    with pytest.raises(ExportError, match=f"gate 'parity': step '{step}': .* differs from eager"):
        export(ready, tmp_path / "bad")


def test_what_a_single_sample_cannot_forget_two_alike_can(tmp_path):
    """A guard that refuses to let the last sample of a direction go: the gate learns another like it."""
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 4))
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    ready = prepare(model, at="0", example=x, method="ridge", classes=4, config=METHODS["ridge"].Config(tau=0.3))
    parity = next(g.found for g in export(ready, tmp_path / "bundle").gates if g.name == "parity")
    assert "forget 25, relabel 25" in parity


def test_gate_parity_refuses_a_step_that_is_never_compared(toy, tmp_path):
    """Features of such a length that the guard refuses every sample: the bundle would never learn."""
    refused(
        toy, tmp_path, toy.prepared("ridge", fit=False, gamma=1e-7, unit_norm=False), r"gate 'parity': step 'learn' could be .* from \d "
    )


@pytest.mark.parametrize("real", [False, True])
def test_gate_parity_encodes_more_than_one_sample(tmp_path, monkeypatch, real):
    """A black image hides a transposed one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    x[0] = 0
    preprocess = ImageU8([0.5] * 3, [0.25] * 3, "HWC")
    ready = prepare(model, at="2", example=x[:1], method="ncm", classes=10, preprocess=preprocess)
    if real:
        ready.fit(x, np.arange(20) % 10)
        assert ready.samples.shape == (8, 8, 8, 3) and np.array_equal(ready.samples[[0, -1]], x[[0, -1]])
    planted(monkeypatch, torch.ops.aten.permute.default, lambda good, emitter, node, x, axes: emitter.op("Transpose", x, perm=[0, 3, 2, 1]))
    refused(None, tmp_path, ready, "gate 'parity': step 'encode': z differs from eager")


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
    export(ready, tmp_path / "right")
    (tmp_path / "wrong").mkdir()
    spoil(change)
    refused(toy, tmp_path / "wrong", ready, "gate 'parity': step 'learn': .* differs from eager by")


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_gates_refuse_an_altered_weight(toy, monkeypatch, tmp_path, size):
    """A large change is seen by parity, a small one by the comparison to the bit."""
    real = targets.WeightFile.place

    def altered(self, array):
        array = np.array(array)
        if array.dtype == np.float32 and array.size > 50:
            array.flat[0] *= 1 + np.float32(size)
        return real(self, array)

    monkeypatch.setattr(targets.WeightFile, "place", altered)
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
    with pytest.raises(InputError, match=r"^path: .* holds \['left over'\], which are not the bundle's; move them"):
        export(toy.prepared("slda"), str(path), overwrite=True)
    assert (path / "left over").read_text() == "from an older one"
    (path / "left over").unlink()
    export(toy.prepared("slda"), str(path), overwrite=True)
    assert read_manifest(path).method == "slda"
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"")
    for manifest in (None, "{}", '{"name": "an extension of a browser"}'):
        if manifest is not None:
            (other / MANIFEST).write_text(manifest)
        with pytest.raises(InputError, match="this one holds no bundle"):
            export(ready, other, overwrite=True)
        assert (other / "cat.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "photos"]


def test_the_working_directory_and_links(toy, tmp_path, monkeypatch):
    ready, real = toy.prepared("ncm"), tmp_path / "real"
    export(ready, real)
    before = toy.helpers.hashes(real)
    monkeypatch.chdir(real)
    with pytest.raises(InputError, match="is or holds the working directory"):
        export(ready, ".", overwrite=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    assert export(toy.prepared("slda"), "link", overwrite=True).path == real
    assert (tmp_path / "link").is_symlink() and read_manifest(real).method == "slda" and toy.helpers.hashes(real) != before
    assert export(ready, "dangling").path == tmp_path / "later"
    (tmp_path / "file").write_text("")
    for path in ("file", "file/bundle"):
        with pytest.raises(InputError, match=r"^path: "):
            export(ready, path, overwrite=True)


def test_an_interrupted_move_puts_the_old_bundle_back(toy, tmp_path, monkeypatch):
    export(toy.prepared("ncm"), tmp_path / "bundle")
    before = toy.helpers.hashes(tmp_path / "bundle")
    real = Path.rename

    def fails(self, target):
        if self.name == "bundle" and self.parent != tmp_path:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(place, "_swapped", lambda left, right: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(InputError, match=r"^path: .*bundle' cannot be written \(No space left on device\); choose"):
        export(toy.prepared("slda"), tmp_path / "bundle", overwrite=True)
    assert toy.helpers.hashes(tmp_path / "bundle") == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["log_capacity_bytes", "pending_capacity"])
@pytest.mark.parametrize("value", [0, -5, 2.5, True, "a", None])
def test_capacities_are_checked(toy, tmp_path, name, value):
    with pytest.raises(InputError, match=f"^{name}: must be "):
        export(toy.prepared("ncm"), tmp_path / "bundle", **{name: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, "x", float("nan"), 2.5, -1])
def test_the_memory_budget_is_an_integer(toy, tmp_path, value):
    with pytest.raises(InputError, match=r"^ram_budget_bytes: must be .*; "):
        export(toy.prepared("ncm"), tmp_path / "bundle", ram_budget_bytes=value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [5, None, b"x", "a\0b", "n" * 300, "/proc/nothing/b", "/sys/b", "/dev/null/b"])
def test_paths_that_cannot_be(toy, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^path: .*; "):
        export(toy.prepared("ncm"), path)
    assert list(tmp_path.iterdir()) == []


def test_any_name_that_the_file_system_takes(toy, tmp_path):
    for overwrite in (False, True):
        export(toy.prepared("ncm"), tmp_path / ("n" * 250), overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["n" * 250]


def test_only_what_prepare_returns_is_exported(toy, tmp_path):
    with pytest.raises(InputError, match=r"^prepared: must be what edgecl\.prepare returned, got Net; call prepare"):
        export(toy.helpers.Net(), tmp_path / "bundle")


def test_numpy_integers_are_integers(toy, tmp_path):
    exported = export(toy.prepared("ncm"), tmp_path / "bundle", log_capacity_bytes=np.int64(1 << 20))
    assert read_manifest(exported.path).log_capacity_bytes == 1 << 20


def test_gate_loads(toy, tmp_path):
    """A log that holds no sample: every graph is right, and yet nothing could be learned."""
    with pytest.raises(ExportError, match=r"gate 'loads': the device's loop refuses .*log_capacity_bytes: must be at least"):
        export(toy.prepared("ncm"), tmp_path / "bundle", log_capacity_bytes=10)
    assert list(tmp_path.iterdir()) == []


def test_names_of_classes_never_collide(toy, tmp_path):
    x, y = toy.helpers.samples(20)
    ready = prepare(toy.helpers.Net(), at="stem", example=x[:1], method="ncm", classes=5, class_names=["3", "_3"]).fit(x, y)
    assert ready.known_names() == ("3", "_3", "2", "__3", "4")
    export(ready, tmp_path / "bundle")


IDENTICAL = [("ncm", {}), ("slda", {}), ("ridge", {}), ("ridge", {"gamma": 1.0})]


@pytest.mark.parametrize(("method", "config"), IDENTICAL, ids=str)
@pytest.mark.parametrize("kind", ["identical", "nothing", "normal"])
def test_learners_of_odd_but_legitimate_samples_ship(tmp_path, method, config, kind):
    """Forty times one sample, none at all, six noisy ones."""
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 4))
    x = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    x = np.repeat(x[:1], 40, 0) if kind == "identical" else x[:6]
    ready = prepare(model, at="0", example=x[:1], method=method, classes=4, config=METHODS[method].Config(**config))
    export(ready if kind == "nothing" else ready.fit(x, np.arange(len(x)) % 4), tmp_path / "bundle")


def test_a_badly_conditioned_learner_is_told_the_mend(toy, tmp_path):
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 4))
    x = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    config = METHODS["ridge"].Config(unit_norm=False, gamma=0.02)
    ready = prepare(model, at="0", example=x[:1], method="ridge", classes=4, config=config).fit(x, np.arange(6) % 4)
    refused(toy, tmp_path, ready, "gate 'parity': .*; if the learner is badly conditioned .* use unit_norm or float64; else report this")


def test_parameters_of_any_layout_and_width_ship(tmp_path):
    x = np.random.default_rng(1).standard_normal((8, 6))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight.data = model[2].weight.data.t()
    for i, (net, samples) in enumerate([(model, x.astype(np.float32)), (copy.deepcopy(model).double(), x)]):
        ready = prepare(net, at="1", example=samples[:1], method="finetune", classes=4).fit(samples, np.arange(8) % 4)
        path = export(ready, tmp_path / str(i)).path
        assert np.array_equal(load_file(path / "state.safetensors")["param.2.weight"], net[2].weight.detach().numpy())


def test_integers_that_are_indices(tmp_path):
    """The gates run on a sample that the model takes; other numbers may be no row of its table."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
            self.flat, self.head = nn.Flatten(), nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.flat(torch.index_select(self.table, 0, x.reshape(-1)).reshape(-1, 4, 8)))

    x = np.array([[0, 4, 1, 2], [3, 3, 0, 1]])
    export(prepare(Table(), at="flat", example=x[:1], classes=3).fit(x, np.array([0, 1])), tmp_path / "bundle")


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
    assert ledger["logged_features_per_update"] == sum(a.nbytes for a in z.values())
    assert ledger["pending_features"] == manifest.pending_capacity * ledger["logged_features_per_update"]
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
    [made] = tmp_path.glob("*/*/bundle")
    assert toy.helpers.hashes(made) == toy.helpers.hashes(toy.bundle("latent_replay")[0].path)


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
    with pytest.raises(SchemaError, match="schema is 3, this package reads up to 2; update edgecl"):
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


def test_stores_of_other_frozen_parts_do_not_fit(toy, tmp_path):
    """The same trunk and hyperparameters behind another codec range or another frozen layer are another bundle."""
    x, y = toy.helpers.samples(60)
    first, _ = toy.bundle("latent_replay")
    ready = toy.prepared("latent_replay", fit=False).fit(2 * x[y < 2], y[y < 2])
    other = export(ready, tmp_path / "other range").manifest
    assert other.files["encode.onnx"] == first.manifest.files["encode.onnx"]
    assert other.bundle_id != first.manifest.bundle_id
    ids = set()
    for scale in (1.0, 2.0):
        net = toy.helpers.Net()
        net.mid[3].weight.data *= scale
        config = toy.config("finetune", trainable=("fc.*",))
        ready = prepare(net, at="stem", example=x[:1], method="finetune", classes=5, config=config).fit(x[y < 2], y[y < 2])
        ids.add(export(ready, tmp_path / f"frozen {scale}").manifest.bundle_id)
    assert len(ids) == 2


class Sums(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)


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
        (Odd(front=nn.Softshrink()), r"aten\.softshrink", r"front\.1"),
        (Odd(front=nn.Upsample(scale_factor=2, mode="bicubic")), r"aten\.upsample_bicubic2d", r"front\.1"),
        (Odd(back=nn.Hardshrink()), r"aten\.hardshrink", r"head\.odd"),
        (Odd(back=Pair()), r"aten\._trilinear", r"head\.odd\.bilinear"),
        (Odd(back=nn.LogSigmoid()), r"aten\.log_sigmoid_forward", r"head\.odd"),
    ],
)
def test_an_unsupported_operator_is_named_with_its_module(toy, tmp_path, model, operator, where):
    x, y = toy.helpers.samples(10)
    ready = prepare(model, at="pool", example=x[:1], method="finetune", classes=5).fit(x, y)
    refused(toy, tmp_path, ready, f"{operator}.* in {where}\\b.*; ", UnsupportedOperatorError)


@pytest.mark.parametrize(("part", "where"), [("front", "front.1"), ("back", "head.odd")])
def test_an_unsupported_function_is_named(toy, tmp_path, part, where):
    x, y = toy.helpers.samples(10)
    ready = prepare(Odd(**{part: Sums()}), at="pool", example=x[:1], method="finetune", classes=5).fit(x, y)
    refused(toy, tmp_path, ready, rf"aten\.cumsum\.default.* in {where}\b", UnsupportedOperatorError)


def test_a_state_beyond_the_budget_is_refused(toy, tmp_path):
    """The budget is for what the ledger says: a projection that is never written is not held twice."""
    for method, changes in (("ridge", {}), ("latent_replay", {}), ("frozen", {})):
        ready = toy.prepared(method, **changes)
        found = toy.bundle(method, **changes)[0].manifest.ledger
        need = found["state"] + found["state_second_buffers"] + found["replay"]
        with pytest.raises(
            InputError, match=rf"^ram_budget_bytes .*at least {need:,}, .*replay {found['replay']:,}, got {need - 1:,}; cut"
        ):
            export(ready, tmp_path / "bundle", ram_budget_bytes=need - 1)
        assert list(tmp_path.iterdir()) == []
        assert export(ready, tmp_path / "bundle", ram_budget_bytes=need).manifest.ledger == found
        shutil.rmtree(tmp_path / "bundle")


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


def test_rows_in_a_file_are_flash_in_the_ledger_and_in_the_budget(toy, tmp_path):
    """A memory of 8 MB within a budget of 2 MB; the device's figures are the ledger's."""
    ready = toy.prepared("latent_replay", capacity_bytes=8 << 20)
    with pytest.raises(InputError, match=r"^ram_budget_bytes .* or keep its rows in a file"):
        export(ready, tmp_path / "bundle", ram_budget_bytes=2 << 20)
    exported = export(ready, tmp_path / "bundle", ram_budget_bytes=2 << 20, rows_in_file=True)
    ledger = exported.manifest.ledger
    with Learner.load(exported.path, store=tmp_path / "l.db", rows=tmp_path / "rows.bin") as learner:
        learner.learn(toy.helpers.samples(1)[0][0], 0)
        found = learner.report()["replay"]
    assert (found["bytes"], found["file_bytes"]) == (ledger["replay"], ledger["replay_file"])
    assert (tmp_path / "rows.bin").stat().st_size == ledger["replay_file"] > 7 * ledger["replay"] > 1 << 20
    assert ledger["beyond_trunk"] == ledger["state"] + ledger["replay"] + ledger["replay_file"]
    assert exported.manifest.bundle_id != toy.bundle("latent_replay", capacity_bytes=8 << 20)[0].manifest.bundle_id
    with pytest.raises(InputError, match=r"^rows_in_file: must be False for ncm, which stores no rows"):
        export(toy.prepared("ncm"), tmp_path / "other", rows_in_file=True)
