"""What every method that adapts without targets must do on every engine. A new entry in METHODS is tested here without another line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from edgecl import METHODS, EagerEngine
from edgecl.learner import call_step
from edgecl.trees import flatten_tree, unflatten_like
from edgecl_device import Learner as DeviceLearner
from edgecl_device import cli
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.errors import InputError, StepMissingError, UpdateRefusedError
from edgecl_device.event import EVENT_OVERHEAD
from edgecl_device.store import Store

torch.set_num_threads(1)

ADAPTING = [name for name, kind in METHODS.items() if hasattr(kind, "adapt")]
CASES = [(name, {}) for name in ADAPTING]
ENGINES = ("eager", "onnx", "executorch")

adapting = pytest.mark.parametrize(("method", "changes"), CASES, ids=str)
engines = pytest.mark.parametrize("engine", ENGINES)


def everything(learner):
    """All that a learner knows, but sample ids, which are never used twice."""
    rows = {name: value for name, value in learner.rows().items() if name != "replay.sample_id"}
    totals = {name: value for name, value in learner.report().items() if name in ("adapted", "updates", "resets", "adaptation", "health")}
    return learner.state(), rows, totals


def same(toy, left, right):
    return toy.helpers.same(left[0], right[0]) and toy.helpers.same(left[1], right[1]) and left[2] == right[2]


@adapting
@engines
def test_samples_are_predicted_and_adapted_to(toy, method, changes, engine):
    x, _ = toy.helpers.samples(40, seed=1)
    with toy.device(method, engine, **changes) as learner:
        before, spec = learner.state(), learner.manifest.adapt
        seen = learner.predict(x[0])
        assert toy.helpers.same(learner.state(), before), "predict must not write state"
        with pytest.raises(StepMissingError, match="learn"):
            learner.learn(x[0], 1)
        reports = [learner.adapt(a) for a in x]
        assert reports[0].prediction.scores.shape == seen.scores.shape and reports[0].prediction.label in (0, 1)
        assert all(r.updated == (r.loss is not None) and np.isfinite(r.loss or 0.0) for r in reports)
        updates = [i for i, r in enumerate(reports) if r.updated]
        replay = learner.manifest.replay
        if replay is None:
            assert updates == list(range(40))
        elif all(r.selected for r in reports):
            assert updates == [i for i in range(40) if i + 1 >= replay.rows_per_step and (i + 1) % spec.every == 0]
        assert not toy.helpers.same(learner.state(), before)
        told = learner.report()
        assert (told["adapted"], told["updates"], told["resets"], told["learned"]) == (40, len(updates), 0, 0)
        assert told["session"]["adapted"] == 40 and told["adaptation"]["updates"] == len(updates)
        steps = learner.manifest.steps
        own = [steps["encode"].canonical_macs + sum(steps[s].canonical_macs for s in names) for names in _ran(steps)]
        assert {r.macs for r in reports} <= set(own) and reports[updates[0]].macs == own[-1]
        assert learner.adapt(learner.predict(x[0]).sample_id).macs in (own[0] - steps["encode"].canonical_macs, reports[updates[0]].macs)
        assert {n: (a.shape, a.dtype) for n, a in learner.state().items()} == {n: (a.shape, a.dtype) for n, a in before.items()}


def _ran(steps):
    """Steps of a sample without an update, and with one."""
    return [["track"], ["track", "adapt"]] if "track" in steps else [["adapt"]]


@adapting
@engines
def test_inputs_and_frozen_tensors_stay(toy, method, changes, engine):
    exported, ready = toy.bundle(method, **changes)
    modules = [ready.trunk, ready.learner.suffix]
    before = [{k: v.numpy().tobytes() for k, v in module.state_dict().items()} for module in modules]
    x, _ = toy.helpers.samples(40, seed=4)
    kept, files = x.copy(), toy.helpers.hashes(exported.path)
    with toy.device(method, engine, **changes) as learner:
        for a in x:
            learner.adapt(a)
    assert x.tobytes() == kept.tobytes()
    assert [{k: v.numpy().tobytes() for k, v in module.state_dict().items()} for module in modules] == before
    assert toy.helpers.hashes(exported.path) == files


@adapting
def test_steps_leave_their_arguments_alone(toy, method, changes):
    _, ready = toy.bundle(method, **changes)
    for step in ready.learner.steps:
        state = {name: t.clone() for name, t in ready.state.items()}
        data = {name: torch.ones(s.shape, dtype=getattr(torch, s.dtype)) for name, s in flatten_tree(ready.learner.inputs_of(step)).items()}
        versions = {name: t._version for name, t in {**state, **data}.items()}
        outputs, new = call_step(ready.learner, step, state, unflatten_like(ready.learner.inputs_of(step), data))
        assert {name: t._version for name, t in {**state, **data}.items()} == versions
        memory = {t.untyped_storage().data_ptr() for t in [*ready.state.values(), *state.values()]}
        assert not memory & {t.untyped_storage().data_ptr() for t in [*outputs.values(), *new.values()]}


@adapting
@engines
def test_rollback_is_bit_identical(toy, method, changes, engine):
    x, _ = toy.helpers.samples(60, seed=6)
    with toy.device(method, engine, **changes) as learner:
        for a in x[:31]:
            learner.adapt(a)
        middle = everything(learner)
        learner.save("middle")
        first = [learner.adapt(a).loss for a in x[31:]]
        end = everything(learner)
        learner.rollback("middle")
        assert same(toy, everything(learner), middle)
        assert [learner.adapt(a).loss for a in x[31:]] == first
        assert same(toy, everything(learner), end)


@adapting
@pytest.mark.parametrize("engine", ["onnx", "executorch"])
def test_what_a_crash_interrupts_goes_on_to_the_same_bits(toy, method, changes, engine, tmp_path):
    """A copy of a store that is open is what a killed process leaves: the log, and the snapshot of the start or of a full log."""
    x, _ = toy.helpers.samples(60, seed=7)
    with toy.device(method, engine, **changes) as whole:
        for i, a in enumerate(x):
            if i == 45:
                whole.reset_adaptation()
            whole.adapt(a)
        wanted = everything(whole)
    folder = tmp_path / "0"
    folder.mkdir()
    for number, (begin, end) in enumerate([(0, 25), (25, 26), (26, 50), (50, 60)]):
        learner = toy.device(method, engine, store=folder / "learner.db", **changes)
        for i in range(begin, end):
            if i == 45:
                learner.reset_adaptation()
            learner.adapt(x[i])
        shutil.copytree(folder, tmp_path / str(number + 1))
        learner.close()
        folder = tmp_path / str(number + 1)
    with toy.device(method, engine, store=folder / "learner.db", **changes) as learner:
        assert same(toy, everything(learner), wanted)


@adapting
def test_bytes_after_2n_samples_equal_those_after_n(toy, method, changes, tmp_path):
    exported, ready = toy.bundle(method, **changes)
    features = sum(spec.nbytes for spec in exported.manifest.steps["encode"].outputs)
    manifest = dataclasses.replace(exported.manifest, log_capacity_bytes=20 * (EVENT_OVERHEAD + features), pending_capacity=5)
    path = tmp_path / "learner.db"
    store = Store(path, manifest.bundle_id, manifest.log_capacity_bytes)
    x, _ = toy.helpers.samples(200, seed=8)
    sizes = []
    with DeviceLearner(
        manifest, OnnxEngine(exported.path, manifest), toy.helpers.arrays(ready.state), toy.helpers.rows_of(ready), store
    ) as learner:
        for part in (slice(0, 100), slice(100, 200)):
            for a in x[part]:
                learner.adapt(a)
            learner.save()
            report = learner.report()
            arrays = [*learner.state().values(), *learner.rows().values()]
            sizes.append((sum(a.nbytes for a in arrays), path.stat().st_size, (report["replay"] or {}).get("bytes")))
            assert 0 < report["log"]["bytes"] <= manifest.log_capacity_bytes
        if manifest.replay is not None:
            assert report["replay"]["bytes"] == manifest.replay.capacity_bytes == manifest.ledger["replay"]
    assert sizes[0] == sizes[1]


@adapting
@engines
def test_what_is_not_finite_changes_nothing(toy, method, changes, engine):
    x, _ = toy.helpers.samples(24, seed=9)
    with toy.device(method, engine, **changes) as learner, toy.device(method, engine, **changes) as twin:
        spec, replay = learner.manifest.adapt, learner.manifest.replay
        due = 1 if replay is None else spec.every * -(-replay.rows_per_step // spec.every)
        for a in x[: due - 1]:
            learner.adapt(a)
            twin.adapt(a)
        before = everything(learner)
        for bad in (np.full_like(x[0], np.nan), np.full_like(x[0], 3e38)):
            with pytest.raises(InputError, match=r"^x: .*finite.*; "):
                learner.adapt(bad)
        if learner.manifest.config.get("optimizer") == "adam":  # whose steps are of the learning rate's size
            with pytest.raises(UpdateRefusedError, match=r"not finite.*reset_adaptation.*the state is unchanged"):
                learner.adapt(x[due - 1], lr=3e38)
            assert learner.report()["session"]["refused"] == 1
        assert same(toy, everything(learner), before)
        for a in x[due - 1 :]:
            assert learner.adapt(a).loss == twin.adapt(a).loss, "as if the refused ones had never come"
        assert same(toy, everything(learner), everything(twin))


@adapting
@engines
def test_it_goes_back_to_the_start(toy, method, changes, engine):
    x, _ = toy.helpers.samples(40, seed=10)
    with toy.device(method, engine, **changes) as learner:
        start = everything(learner)
        first = [learner.adapt(a).loss for a in x]
        learner.reset_adaptation()
        assert toy.helpers.same(learner.state(), start[0]) and toy.helpers.same(everything(learner)[1], start[1])
        assert learner.report()["resets"] == 1 and learner.report()["adaptation"] == {"updates": 0, "loss": None}
        if learner.manifest.replay is None or not learner.manifest.replay.draws:  # the generator goes on
            assert [learner.adapt(a).loss for a in x] == first


@adapting
@pytest.mark.parametrize("policy", [{"reset": "every", "reset_every": 2}, {"reset": "loss", "reset_below": 100.0}], ids=["every", "loss"])
def test_it_goes_back_by_its_own_policy(toy, method, changes, policy):
    x, _ = toy.helpers.samples(60, seed=11)
    exported, ready = toy.bundle(method, **changes)
    manifest = dataclasses.replace(exported.manifest, adapt=dataclasses.replace(exported.manifest.adapt, **policy))
    engine = EagerEngine(ready.trunk, ready.learner)
    with DeviceLearner(manifest, engine, toy.helpers.arrays(ready.state), toy.helpers.rows_of(ready)) as learner:
        start = learner.state()
        updates = 0
        for a in x:
            report = learner.adapt(a)
            updates += report.updated
            due = report.updated and updates % (2 if policy["reset"] == "every" else 1) == 0  # every loss is below 100
            assert report.reset == due
            if due:
                assert toy.helpers.same(learner.state(), start)
                assert manifest.replay is None or learner.report()["replay"]["rows"] == 0
        assert learner.report()["resets"] > 0


def test_a_learner_that_knows_no_class_adapts_to_nothing(toy):
    ready = toy.prepared("tent", fit=False)
    exported, _ = toy.bundle("tent")
    with DeviceLearner(exported.manifest, EagerEngine(ready.trunk, ready.learner), toy.helpers.arrays(ready.state)) as learner:
        before = everything(learner)
        with pytest.raises(InputError, match=r"^x: needs a class that was learned.*fit source samples"):
            learner.adapt(toy.helpers.samples(1)[0][0])
        assert same(toy, everything(learner), before)


def test_the_device_s_commands_adapt(toy, tmp_path, capsys):
    exported, _ = toy.bundle("tent")
    x, y = toy.helpers.samples(24, seed=12)
    np.savez(tmp_path / "stream.npz", x=x, y=y)
    assert cli.main(["verify", str(exported.path), "--json"]) == 0
    assert {"check": "adapt", "result": "taken in"} in json.loads(capsys.readouterr().out)["checks"]
    assert cli.main(["run", str(exported.path), "--data", str(tmp_path / "stream.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with toy.device("tent", "onnx") as learner:
        right = [learner.adapt(a).prediction.label == b for a, b in zip(x, y, strict=True)]
        updates = learner.report()["updates"]
    assert (found["adapted_in_all"], found["updates_in_all"], found["learned_in_all"]) == (24, updates, 0)
    assert found["prequential_accuracy"] == np.mean(right)


def test_a_learner_without_the_step_says_so(toy):
    with toy.device("ncm", "eager") as learner:
        for call in (lambda: learner.adapt(toy.helpers.samples(1)[0][0]), learner.reset_adaptation):
            with pytest.raises(StepMissingError, match=r"^adapt: ncm has no such step"):
                call()
        assert learner.report()["adaptation"] is None


OTHER = [
    ("bn_stats", {"statistics": "rows", "rows_per_step": 6, "every": 4}),
    ("bn_stats", {"statistics": "source", "share": 0.1}),
    ("tent", {"policy": "balanced", "codec": "uint8", "statistics": "rows", "optimizer": "momentum"}),
    ("ecotta", {"detached": False, "pull": "outputs"}),
]


@pytest.mark.parametrize(("method", "changes"), OTHER, ids=str)
def test_other_settings_ship_and_recover(toy, method, changes, tmp_path):
    x, _ = toy.helpers.samples(40, seed=13)
    (tmp_path / "open").mkdir()
    with toy.device(method, "onnx", store=tmp_path / "open" / "learner.db", **changes) as learner:
        updates = sum(learner.adapt(a).updated for a in x)
        shutil.copytree(tmp_path / "open", tmp_path / "crashed")
        wanted = everything(learner)
    with toy.device(method, "onnx", store=tmp_path / "crashed" / "learner.db", **changes) as learner:
        assert same(toy, everything(learner), wanted)
    assert updates > 3


def test_updates_of_no_row_are_no_sign_of_a_collapse(toy):
    """Their loss is the pull alone: it says nothing of the stream, and nothing has moved."""
    x, _ = toy.helpers.samples(30, seed=2)
    with toy.device("ecotta", "onnx", margin=1e-6, reset="loss", reset_below=10.0, statistics="rows") as learner:
        before = learner.state()
        reports = [learner.adapt(a) for a in x]
        assert any(r.updated for r in reports) and not any(r.reset for r in reports)
        assert learner.report()["adaptation"] == {"updates": 0, "loss": None}
        assert toy.helpers.same(learner.state(), before), "statistics of rows that do not count stay"
