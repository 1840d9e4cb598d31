"""What every method must do on every engine. A new entry in METHODS is tested here without another line."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from edgecl import METHODS
from edgecl.learner import UNSEEN, Learner, call_step
from edgecl.trees import flatten_tree
from edgecl_device import Learner as DeviceLearner
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.errors import EdgeclError, InputError, StepMissingError, UpdateRefusedError
from edgecl_device.event import EVENT_OVERHEAD
from edgecl_device.store import Store

torch.set_num_threads(1)

SHIPPED = [name for name, kind in METHODS.items() if not kind.host_only]  # joint trains offline: tests/test_suffix_methods.py
LEARNING = [name for name in SHIPPED if hasattr(METHODS[name], "learn")]
ENGINES = ("eager", "onnx", "executorch")

shipped = pytest.mark.parametrize("method", SHIPPED)
learning = pytest.mark.parametrize("method", LEARNING)
engines = pytest.mark.parametrize("engine", ENGINES)

WRONG = {
    "lr": (-1.0, float("nan"), float("inf"), "fast"),
    "optimizer": ("rmsprop", 1),
    "momentum": (1.0, -0.1, float("nan")),
    "betas": ((0.9,), (0.9, 1.0), (-0.1, 0.9), 0.9, "ab", ("a", "b"), ([],)),
    "eps": (0.0, float("nan"), float("inf")),
    "weight_decay": (-1e-4, float("inf"), float("nan")),
    "trainable": ("fc.*", ("nothing.*",), (1,), ()),
    "rows_per_step": (0, -1, 2.5, True),
    "capacity_bytes": (0, 10, 1e6),
    "codec": ("int4",),
    "bits": (0, 9, 2.5),
    "subquantizers": (0, -1),
    "centroids": (0, 1, 48, 512),
    "crop": ("yes", 1),
    "dropout": ("yes", 1),
    "mixup": (-0.1, 1.5, float("nan")),
    "lr_decay": (0.0, 1.1, float("nan")),
    "lr_decay_every": (0, 2.5),
    "policy": ("fifo",),
    "loss": ("mse",),
    "new_weight": (0.0, float("inf"), "1"),
    "average": (1.0, -0.1, float("nan")),
    "window": (0, 1.5),
    "seed": (-1, 2**64, 0.5),
    "epochs": (0,),
    "batch": (0,),
    "gamma": (0.0, -1.0, float("inf"), float("nan"), "1", True),
    "g0": (0.0, float("inf"), "a"),
    "projection": (0, -3, 2.5, True, 10**6),
    "projection_seed": ("a", 0.5, -1, 2**64),
    "unit_norm": ("no", 1, None),
    "reflect": ("no", 1, None),
    "delay": (-1, 257, 2.5, True),
    "full": ("yes", 1),
    "task_rows": (-1, 4097, 2.5, True),
    "priors": ("x",),
    "drift": (0.0, 1.5, float("nan")),
    "trace_cap": (0.0, 5.0),
    "dtype": ("float16", "double"),
    "tau": (0.0, 1.0),
    "every": (0, -1, 2.5),
    "parts": ("mid", ("nothing",), (1,), ("fc",)),
    "stem": ("nothing", 1, "fc"),
    "detached": ("yes", 1),
    "pull": ("gradients",),
    "views": (-1, 257, 1.5),
    "threshold": (-0.1, 1.1, float("nan")),
    "teacher": (1.0, -0.1, float("nan")),
    "restore": (1.0, -0.1, float("nan")),
    "warmup_lr": (-0.1, float("nan"), float("inf")),
    "margin": (0.0, float("inf"), float("nan")),
    "redundancy": (0.0, float("inf"), float("nan")),
    "decay": (1.0, -0.1, float("nan")),
    "anchor": (-1.0, float("inf"), float("nan")),
    "statistics": ("batch", 1),
    "share": (0.0, 1.5, float("nan")),
    "reset": ("sometimes",),
    "reset_every": (0, 1.5),
    "reset_below": (-0.1, float("inf"), float("nan")),
    "granularity": ("blocks", 1),
    "sparsity": (-0.1, 1.0, float("nan")),
    "gradient_sparsity": (0.1, 1.0, float("nan")),
    "block": (0, 1.5, 3),
    "sparse": ("mid.3.weight", ("nothing",), (1,), ()),
    "grow": (-0.1, 1.0),
    "exchange": (-0.1, 1.0),
    "grow_for": (-1, 0.5),
    "refresh_every": (-1, 0.5),
    "regrow": ("one",),
    "alpha": (-1.0, float("inf")),
    "beta": (-1.0, float("inf")),
    "replay_weight": (-1.0, float("inf")),
    "distill": (-1.0, float("inf")),
    "skip_above": (0.0, 1.5, float("nan")),
}
"""Values that no method may take, by the name of the hyperparameter; of others, those that are not finite."""


def without_ids(rows):
    return {name: array for name, array in rows.items() if name != "replay.sample_id"}


def test_the_battery_covers_the_registry():
    adapting = {name for name in SHIPPED if hasattr(METHODS[name], "adapt")}  # tests/test_conformance_adapt.py
    assert set(LEARNING) | adapting == set(SHIPPED) - {"frozen"}
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert issubclass(method, Learner)
        assert dataclasses.is_dataclass(method.Config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.Config().anything = 1


@pytest.mark.parametrize("method", METHODS)
def test_wrong_hyperparameters_are_refused_by_name(toy, method):
    for field in dataclasses.fields(METHODS[method].Config):
        for value in WRONG.get(field.name, (float("nan"), float("inf")) if field.type is float else ()):
            with pytest.raises(InputError, match=f"^{field.name}: .*; "):
                toy.prepared(method, fit=False, **{field.name: value})


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_numpy_become_plain(toy, method):
    kinds = {float: np.float64, int: np.int64, bool: np.bool_, str: np.str_}
    plain = toy.config(method)
    given = {f.name: kinds[f.type](getattr(plain, f.name)) for f in dataclasses.fields(plain) if f.type in kinds}
    read = toy.prepared(method, fit=False, **given).learner.config_dict()
    assert json.loads(json.dumps(read)) == json.loads(json.dumps(dataclasses.asdict(plain)))


@pytest.mark.parametrize("method", METHODS)
def test_whole_numbers_beyond_64_bits_are_taken_or_refused_by_name(toy, method):
    x, y = toy.helpers.samples(20)
    for field in dataclasses.fields(METHODS[method].Config):
        if field.type not in (int, float, int | None, float | None):
            continue
        try:
            toy.prepared(method, fit=False, **{field.name: 10**30}).fit(x, y)
        except InputError as error:
            assert str(error).startswith("capacity_bytes: " if field.name == "rows_per_step" else f"{field.name}: "), error


@pytest.mark.parametrize("method", METHODS)
def test_config_survives_json(toy, method):
    plain = toy.prepared(method, fit=False).learner.config_dict()
    read = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(json.dumps(plain)).items()}
    assert METHODS[method].Config(**read) == toy.config(method)


@pytest.mark.parametrize("method", METHODS)
def test_init_returns_new_and_distinct_tensors(toy, method):
    learner = toy.prepared(method, fit=False).learner
    first, second = learner.init(), learner.init()
    frozen = learner.suffix.parameters() if hasattr(learner, "suffix") else ()
    tensors = [*first.values(), *second.values(), *frozen]
    places = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    assert len(set(places)) == len(places)
    assert toy.helpers.same(toy.helpers.arrays(first), toy.helpers.arrays(second))
    assert all(torch.isfinite(t).all() for t in first.values())


@shipped
@engines
def test_steps_run(toy, method, engine):
    x, y = toy.helpers.samples(40, seed=1)
    with toy.device(method, engine) as learner:
        before = learner.state()
        seen = learner.predict(x[0])
        assert seen.scores.dtype == np.float32
        assert seen.scores.shape == (toy.helpers.CLASSES,)
        assert seen.label == seen.scores.argmax()
        assert toy.helpers.same(learner.state(), before), "predict must not write state"
        if method not in LEARNING:
            with pytest.raises(StepMissingError, match="learn"):
                learner.learn(x[0], int(y[0]))
            return
        reports = [learner.learn(a, int(b)) for a, b in zip(x, y, strict=True)]
        assert all(np.isfinite(r.loss) and r.label == b for r, b in zip(reports, y, strict=True))
        assert reports[0].predicted == seen.label, "the prediction is that of the state before the update"
        assert not toy.helpers.same(learner.state(), before)
        assert learner.report()["learned"] == 40
        if learner.manifest.forgets:
            learner.forget(reports[3].sample_id)
            assert learner.report()["forgotten"] == 1
        if "relabel" in learner.manifest.steps:
            learner.relabel(reports[4].sample_id, 2)
        assert {n: (a.shape, a.dtype) for n, a in learner.state().items()} == {n: (a.shape, a.dtype) for n, a in before.items()}


@learning
@engines
def test_it_learns(toy, method, engine):
    x, y = toy.helpers.samples(400, seed=2)
    held_x, held_y = toy.helpers.samples(50, seed=3)
    with toy.device(method, engine, **({"lr": 0.1} if hasattr(METHODS[method].Config, "lr") else {})) as learner:
        before = np.mean([learner.predict(a).label == b for a, b in zip(held_x, held_y, strict=True)])
        for a, b in zip(x, y, strict=True):
            learner.learn(a, int(b))
        after = np.mean([learner.predict(a).label == b for a, b in zip(held_x, held_y, strict=True)])
        assert before <= 0.4, "two of five classes are known"
        assert after >= (0.4 if method in ("finetune", "clr") else 0.8)  # no replay: the floor of the others


@learning
@engines
def test_inputs_are_not_mutated(toy, method, engine):
    _, ready = toy.bundle(method)
    x, y = toy.helpers.samples(3, seed=4)
    kept = x.copy()
    with toy.device(method, engine) as learner:
        for a, b in zip(x, y, strict=True):
            learner.learn(a, int(b))
    assert x.tobytes() == kept.tobytes()
    for step in ready.learner.steps:
        state = {name: t.clone() for name, t in ready.state.items()}
        specs = ready.learner.inputs_of(step)
        data = {name: torch.ones(s.shape, dtype=getattr(torch, s.dtype)) for name, s in flatten_tree(specs).items()}
        given = {**state, **data}
        versions = {name: t._version for name, t in given.items()}
        tree = {k: {n: data[f"{k}.{n}"] for n in v} if isinstance(v, dict) else data[k] for k, v in specs.items()}
        outputs, new = call_step(ready.learner, step, state, tree)
        assert {name: t._version for name, t in given.items()} == versions
        assert toy.helpers.same(toy.helpers.arrays(state), toy.helpers.arrays(ready.state))
        memory = {t.untyped_storage().data_ptr() for t in ready.state.values()}
        assert not memory & {t.untyped_storage().data_ptr() for t in [*outputs.values(), *new.values()]}


@learning
@engines
def test_frozen_tensors_are_bit_identical_after_200_samples(toy, method, engine):
    exported, ready = toy.bundle(method)
    modules = [ready.trunk, *([ready.learner.suffix] if hasattr(ready.learner, "suffix") else [])]
    before = [{k: v.numpy().tobytes() for k, v in module.state_dict().items()} for module in modules]
    files = toy.helpers.hashes(exported.path)
    x, y = toy.helpers.samples(200, seed=5)
    with toy.device(method, engine) as learner:
        for a, b in zip(x, y, strict=True):
            learner.learn(a, int(b))
    assert [{k: v.numpy().tobytes() for k, v in module.state_dict().items()} for module in modules] == before
    assert toy.helpers.hashes(exported.path) == files
    assert toy.helpers.same(toy.helpers.arrays(ready.state), toy.helpers.arrays(toy.prepared(method).state)), "the host's copy"


@learning
@engines
def test_rollback_is_bit_identical(toy, method, engine):
    x, y = toy.helpers.samples(60, seed=6)
    with toy.device(method, engine) as learner:
        for a, b in zip(x[:30], y[:30], strict=True):
            learner.learn(a, int(b))
        state, rows = learner.state(), learner.rows()
        learner.save("thirty")
        first = [learner.learn(a, int(b)).loss for a, b in zip(x[30:], y[30:], strict=True)]
        end = learner.state(), learner.rows()
        learner.rollback("thirty")
        assert toy.helpers.same(learner.state(), state)
        assert toy.helpers.same(learner.rows(), rows)
        assert [learner.learn(a, int(b)).loss for a, b in zip(x[30:], y[30:], strict=True)] == first
        assert toy.helpers.same(learner.state(), end[0])
        assert toy.helpers.same(without_ids(learner.rows()), without_ids(end[1])), "the same rows; sample ids are never used twice"


@learning
def test_a_resumed_run_equals_an_uninterrupted_one(toy, method, tmp_path):
    x, y = toy.helpers.samples(60, seed=7)
    with toy.device(method, "onnx") as whole:
        for a, b in zip(x, y, strict=True):
            whole.learn(a, int(b))
        state, rows = whole.state(), whole.rows()
    for part in (slice(0, 25), slice(25, 60)):
        with toy.device(method, "onnx", store=tmp_path / "learner.db") as learner:
            for a, b in zip(x[part], y[part], strict=True):
                learner.learn(a, int(b))
            resumed = learner.state(), learner.rows()
    assert toy.helpers.same(resumed[0], state)
    assert toy.helpers.same(without_ids(resumed[1]), without_ids(rows))


@learning
def test_a_store_in_memory_keeps_the_features_that_can_be_asked_for_again(toy, method):
    """Nothing is recovered from it: features wait for ``forget`` and ``relabel`` alone."""
    x, y = toy.helpers.samples(5, seed=8)
    with toy.device(method, "onnx") as learner:
        reports = [learner.learn(a, int(b)) for a, b in zip(x, y, strict=True)]
        steps = learner.manifest.steps
        features = sum(spec.nbytes for spec in steps["encode"].outputs) if {"forget", "relabel"} & steps.keys() else 0
        assert learner.report()["log"]["bytes"] == 5 * (EVENT_OVERHEAD + features)
        learner.save("five")
        learner.learn(x[0], int(y[0]))
        learner.rollback("five")
        assert learner.report()["learned"] == 5 == len(reports)


@learning
def test_bytes_after_2n_samples_equal_those_after_n(toy, method, tmp_path):
    """State, rows, samples that wait for a label, log and file, with a log that holds 20 samples."""
    exported, ready = toy.bundle(method)
    features = sum(spec.nbytes for spec in exported.manifest.steps["encode"].outputs)
    manifest = dataclasses.replace(exported.manifest, log_capacity_bytes=20 * (EVENT_OVERHEAD + features), pending_capacity=5)
    path = tmp_path / "learner.db"
    store = Store(path, manifest.bundle_id, manifest.log_capacity_bytes)
    engine = OnnxEngine(exported.path, manifest)
    x, y = toy.helpers.samples(200, seed=8)
    sizes = []
    with DeviceLearner(manifest, engine, toy.helpers.arrays(ready.state), toy.helpers.rows_of(ready), store) as learner:
        for part in (slice(0, 100), slice(100, 200)):
            for a, b in zip(x[part], y[part], strict=True):
                learner.predict(a)
                learner.learn(a, int(b))
            learner.save()
            report = learner.report()
            arrays = [*learner.state().values(), *learner.rows().values()]
            sizes.append((sum(a.nbytes for a in arrays), report["pending"], path.stat().st_size))
            assert 0 < report["log"]["bytes"] <= manifest.log_capacity_bytes
    assert sizes[0] == sizes[1] and sizes[0][1] == 5


@learning
@engines
def test_a_sample_that_is_not_finite_changes_nothing(toy, method, engine):
    x, y = toy.helpers.samples(12, seed=9)
    with toy.device(method, engine) as learner:
        for a, b in zip(x, y, strict=True):
            learner.learn(a, int(b))
        state, rows, report = learner.state(), learner.rows(), learner.report()
        edge = np.zeros(x[0].shape, bool)
        edge[0, 3, 3] = True
        for bad in (np.where(edge, np.nan, x[0]), np.where(edge, -np.inf, x[0]), np.where(edge, x[0], 3e38)):
            for call in (learner.predict, lambda a: learner.learn(a, 1)):
                with pytest.raises(InputError, match=r"^x: .*finite.*; "):
                    call(bad.astype(np.float32))  # the last one is finite and overflows in the trunk
        if hasattr(METHODS[method].Config, "lr"):
            with pytest.raises(UpdateRefusedError, match=r"not finite.*the state is unchanged"):
                learner.learn(x[0] * 1e4, 1, lr=3e38)
        assert toy.helpers.same(learner.state(), state)
        assert toy.helpers.same(learner.rows(), rows)
        assert learner.report()["learned"] == report["learned"]
        with toy.device(method, engine) as twin:
            for a, b in zip(x, y, strict=True):
                twin.learn(a, int(b))
            for a, b in zip(x, y, strict=True):
                assert learner.learn(a, int(b)).loss == twin.learn(a, int(b)).loss, "as if the refused ones had never come"
            assert toy.helpers.same(learner.state(), twin.state())


@learning
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_step_itself_says_that_its_state_is_not_finite(toy, method, value):
    engine = toy.onnx(method)
    _, ready = toy.bundle(method)
    inputs = {n: s.zeros() for step in ("learn",) for n, s in flatten_tree(ready.learner.inputs_of(step)).items()}
    inputs["weight"] = np.ones(1, np.float32)
    inputs["z"] = np.ones(inputs["z"].shape, np.float32)
    inputs.pop("replay.weight", None)
    extra = {"replay.weight": np.zeros(4, np.float32)} if ready.memory is not None else {}
    assert engine.run("learn", {**inputs, **extra})["finite"]
    state = engine.state()
    for name, array in state.items():
        if array.dtype.kind != "f":
            continue
        bad = array.copy()
        bad.reshape(-1)[-1] = value
        eager = {k: torch.tensor(bad if k == name else v) for k, v in state.items()}
        written = name in {s for step in ("learn",) for s in toy.bundle(method)[0].manifest.steps[step].state_out}
        _, new = call_step(ready.learner, "learn", eager, _tree(ready.learner.inputs_of("learn"), {**inputs, **extra}))
        spoiled = any(not torch.isfinite(t).all() for t in new.values())
        engine._views[name][engine._index(name)][...] = bad  # load() would refuse it
        assert bool(engine.run("learn", {**inputs, **extra})["finite"]) is not spoiled, name
        engine._views[name][engine._index(name)][...] = array
        assert written or not spoiled


def _tree(specs, data):
    return {k: {n: torch.tensor(data[f"{k}.{n}"]) for n in v} if isinstance(v, dict) else torch.tensor(data[k]) for k, v in specs.items()}


@shipped
@engines
def test_unseen_classes_are_never_predicted(toy, method, engine):
    generator = np.random.default_rng(10)
    x = (3 * generator.standard_normal((80, 1, 8, 8))).astype(np.float32)
    with toy.device(method, engine) as learner:
        known = {0, 1}
        assert {learner.predict(a).label for a in x} <= known
        if method in LEARNING:
            learner.learn(x[0], 3)
            known.add(3)
        for a in x:
            seen = learner.predict(a)
            assert seen.label in known
            assert {i for i, score in enumerate(seen.scores) if score > UNSEEN / 2} == known


@shipped
@engines
@pytest.mark.parametrize("bad", [-1, 5, 2.0, True, "mug", None])
def test_a_wrong_label_changes_nothing(toy, method, engine, bad):
    x, _ = toy.helpers.samples(1)
    with toy.device(method, engine) as learner:
        state = learner.state()
        with pytest.raises(EdgeclError):
            learner.learn(x[0], bad)
        assert toy.helpers.same(learner.state(), state)
