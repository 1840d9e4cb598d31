"""The bundle writer: its figures are real sizes, its output is the same every time, what it cannot write it names."""

import copy
import itertools
import json
import os
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

from edgecl import METHODS, prepare
from edgecl.graph.lowering import build, within
from edgecl.graph.step import UnsupportedOperatorError
from edgecl.ledger import RAM
from edgecl_device import Learner, SchemaError
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import MANIFEST, from_json, read_manifest, to_json
from edgecl_device.whole import memory_of
from edgecl_export import ExportError, export, place

torch.set_num_threads(1)

SHIPPED = [name for name, kind in METHODS.items() if not kind.host_only]
shipped = pytest.mark.parametrize("method", SHIPPED)


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


def test_names_of_classes_never_collide(toy, tmp_path):
    x, y = toy.helpers.samples(20)
    ready = prepare(toy.helpers.Net(), at="stem", example=x[:1], method="ncm", classes=5, class_names=["3", "_3"]).fit(x, y)
    assert ready.known_names() == ("3", "_3", "2", "__3", "4")
    export(ready, tmp_path / "bundle")


def test_parameters_of_any_layout_and_width_ship(tmp_path):
    x = np.random.default_rng(1).standard_normal((8, 6))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight.data = model[2].weight.data.t()
    for i, (net, samples) in enumerate([(model, x.astype(np.float32)), (copy.deepcopy(model).double(), x)]):
        ready = prepare(net, at="1", example=samples[:1], method="finetune", classes=4).fit(samples, np.arange(8) % 4)
        path = export(ready, tmp_path / str(i)).path
        assert np.array_equal(load_file(path / "state.safetensors")["param.2.weight"], net[2].weight.detach().numpy())


def test_a_failed_overwrite_keeps_the_old_bundle(toy, tmp_path):
    export(toy.prepared("ncm"), tmp_path / "bundle")
    before = toy.helpers.hashes(tmp_path / "bundle")
    with pytest.raises(ExportError, match="gate 'loads'"):
        export(toy.prepared("ncm"), tmp_path / "bundle", overwrite=True, log_capacity_bytes=10)
    assert toy.helpers.hashes(tmp_path / "bundle") == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_joint_is_refused(toy, tmp_path):
    toy.refused(tmp_path, "joint", "^method: 'joint' trains offline", InputError)


@shipped
def test_the_ledger_is_real_sizes(toy, method):
    exported, _ = toy.bundle(method)
    path, manifest, ledger = exported.path, exported.manifest, exported.manifest.ledger
    assert ledger["frozen_weights"] == (path / "weights.bin").stat().st_size
    assert ledger["graphs"] == sum(p.stat().st_size for p in path.glob("*.onnx"))
    assert ledger["state"] == sum(a.nbytes for a in load_file(path / manifest.state_file).values())
    with Learner.load(path) as learner:
        real = 0 if learner._core.memory is None else learner._core.memory.nbytes
        assert ledger["replay"] == real == (learner.report()["replay"] or {"bytes": 0})["bytes"]
    if manifest.replay is not None:
        memory = memory_of(manifest.replay, manifest.max_classes)
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
    with pytest.raises(SchemaError, match="schema is 5, this package reads up to 4; update edgecl"):
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
        return torch.cumprod(x, 1)


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
    toy.refused(tmp_path, ready, f"{operator}.* in {where}\\b.*; ", UnsupportedOperatorError)


@pytest.mark.parametrize(("part", "where"), [("front", "front.1"), ("back", "head.odd")])
def test_an_unsupported_function_is_named(toy, tmp_path, part, where):
    x, y = toy.helpers.samples(10)
    ready = prepare(Odd(**{part: Sums()}), at="pool", example=x[:1], method="finetune", classes=5).fit(x, y)
    toy.refused(tmp_path, ready, rf"aten\.cumprod\.default.* in {where}\b", UnsupportedOperatorError)


def test_a_state_beyond_the_budget_is_refused(toy, tmp_path):
    """The budget is for what the ledger says: a projection that is never written is not held twice."""
    for method, changes in (("ridge", {}), ("latent_replay", {}), ("frozen", {})):
        ready = toy.prepared(method, **changes)
        found = toy.bundle(method, **changes)[0].manifest.ledger
        parts = ("state", "state_second_buffers", "replay", "activations_peak", "inputs_outputs", "pending_features")
        least = max(within(step, 0).plan.arena_bytes for step in build(ready).values())  # activations computed again, not kept
        need = sum(found[name] for name in parts) - found["activations_peak"] + least
        with pytest.raises(
            InputError, match=rf"^ram_budget_bytes .*at least {need:,}, .*replay {found['replay']:,}, .*got {need - 1:,}; cut"
        ):
            export(ready, tmp_path / "bundle", ram_budget_bytes=need - 1)
        assert list(tmp_path.iterdir()) == []
        tight = export(ready, tmp_path / "bundle", ram_budget_bytes=need).manifest.ledger
        assert {name: tight[name] for name in parts} == {name: found[name] for name in parts} | {"activations_peak": least}
        shutil.rmtree(tmp_path / "bundle")


def test_a_codec_without_a_range_says_what_to_call(toy, tmp_path):
    toy.refused(tmp_path, toy.prepared("latent_replay", fit=False), r"has no range yet; call fit\(\)", EdgeclError)


@shipped
def test_a_learner_that_was_never_fitted_ships(toy, tmp_path, method):
    changes = {"codec": "float32"} if method in ("latent_replay", "sparcl") else {}
    export(toy.prepared(method, fit=False, **changes), tmp_path / "empty")
    x, _ = toy.helpers.samples(3)
    with Learner.load(tmp_path / "empty") as learner:
        assert np.all(learner.predict(x[0]).scores < -1e29), "no class is known"
        if "adapt" in learner.manifest.steps:
            with pytest.raises(InputError, match=r"^x: needs a class that was learned"):
                learner.adapt(x[1])
        elif method != "frozen":
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


@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_activations_are_computed_again_within_the_budget(toy, tmp_path, engine):
    ready = toy.prepared("latent_replay")
    found = export(ready, tmp_path / "wide", engine=engine).manifest
    total = sum(found.ledger[name] for name in RAM)
    tight = export(ready, tmp_path / "tight", engine=engine, ram_budget_bytes=total - 64).manifest
    assert sum(tight.ledger[name] for name in RAM) <= total - 64
    wide, small = found.steps["learn"], tight.steps["learn"]
    assert small.activation_bytes < wide.activation_bytes
    assert small.canonical_macs == wide.canonical_macs
    assert small.executed_macs + small.elementwise >= wide.executed_macs + wide.elementwise
    assert tight.bundle_id == found.bundle_id, "a store goes on behind another budget"
    x, y = toy.helpers.samples(8)
    with Learner.load(tmp_path / "wide") as a, Learner.load(tmp_path / "tight") as b:
        for sample, label in zip(x, y, strict=True):
            assert a.learn(sample, int(label)).loss == b.learn(sample, int(label)).loss
