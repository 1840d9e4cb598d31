"""ONNX against eager, step by step from the states of a real trajectory, and planted defects from the same states."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgecl import METHODS, EagerEngine, ImageU8, prepare
from edgecl.learner import UNSEEN
from edgecl.methods._optim import Optimiser
from edgecl.streams import fashion_mnist_subset
from edgecl_device import Learner
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_export import ExportError, export
from edgecl_export.kinks import nudged
from edgecl_export.parity import compare_step

torch.set_num_threads(1)

STEPS = 500
WEIGHTS, MOMENTS, CHANGE, WHOLE = 1e-5, 1e-4, 1e-3, 1e-4
KINKS = 2
"""Steps of :data:`STEPS` that may meet a kink."""
LR = {"sgd": 1e-2, "momentum": 1e-3, "adam": 1e-3}
REPLAY = itertools.product(LR, ("er", "er-ace"), ("float32", "uint8"))
CASES = [
    *((name, {}) for name, kind in METHODS.items() if not kind.host_only),  # a new method is in it without another line
    *(("finetune", {"optimizer": o, "lr": LR[o]}) for o in LR),
    *(("latent_replay", {"optimizer": o, "loss": loss, "codec": codec, "lr": LR[o]}) for o, loss, codec in REPLAY),
    ("latent_replay", {"average": 0.98}),
    ("latent_replay", {"codec": "packed", "bits": 5}),
    ("latent_replay", {"crop": True, "mixup": 0.1, "lr_decay": 0.9, "lr_decay_every": 10}),
    ("latent_replay", {"codec": "pq", "subquantizers": 4, "centroids": 32}),
    ("ridge", {"gamma": 1.0}),
    ("ridge", {"gamma": 1.0, "dtype": "float64"}),
    ("ridge", {"projection": 150}),
    ("ridge", {"drift": 0.99}),
    ("ridge", {"gamma": 1.0, "delay": 5}),
    ("slda", {"delay": 5}),
    ("clr", {"task_rows": 4, "codec": "uint8", "full": True, "optimizer": "momentum", "lr": 1e-3}),
]

ANALYTIC = ("ncm", "slda", "ridge")
"""Methods without a decision or a gradient in them: their whole trajectories stay together, too."""


class Small(nn.Module):
    """28x28 grey images; 128 values cross the cut after ``stem``."""

    def __init__(self, settle):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3))
        self.block = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, 10)
        settle(self)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.block(self.stem(x)), 1).flatten(1))


def distance(reference, other):
    """|a - b| / |b|, in float64."""
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(wide - other)) / max(float(np.linalg.norm(wide)), 1e-30)


class Witness:
    """ONNX Runtime as the loop's engine, with eager beside it: each run starts from ONNX's own state and inputs."""

    name = "onnx"

    def __init__(self, exported, ready):
        self.inner = OnnxEngine(exported.path, exported.manifest)
        self.eager = EagerEngine(ready.trunk, ready.learner)
        self.compared = 0
        self.kinks = 0
        self.batch = 0

    def load(self, state):
        self.inner.load(state)

    def state(self, names=None):
        return self.inner.state(names)

    def close(self):
        self.inner.close()

    def run(self, step, inputs):
        self.before, self.ran = self.inner.state(), (step, {name: value.copy() for name, value in inputs.items()})
        self.eager.load(self.before)
        outputs, reference = self.inner.run(step, inputs), self.eager.run(step, inputs)
        assert set(outputs) == set(reference)
        for name, value in reference.items():
            got = outputs[name]
            assert got.dtype == value.dtype
            if name == "scores":
                seen = value > UNSEEN / 2
                assert np.array_equal(got > UNSEEN / 2, seen)
                value, got = value[seen], got[seen]
            if value.dtype.kind == "f":
                assert distance(value, got) <= MOMENTS, (step, name)
            else:
                assert np.array_equal(value, got), (step, name)
        if "replay.weight" in inputs:
            self.batch = max(self.batch, 1 + int(inputs["replay.weight"].sum()))
        self.compared += step != "encode"
        return outputs

    def commit(self):
        self.inner.commit()
        self.eager.commit()
        apart = self.apart(self.before)
        if apart is not None:
            assert any(self.apart(self.stepped(start)) is None for start in nudged(self.before)), apart
            self.kinks += 1

    def apart(self, before):
        """The first tensor in which eager's step from ``before`` and ONNX's from its own state differ, or None."""
        reference, other = self.eager.state(), self.inner.state()
        for name, value in reference.items():
            old, own = before[name].astype(np.float64), self.before[name].astype(np.float64)
            bar = MOMENTS if name.startswith(("momentum.", "adam_")) else WEIGHTS
            if distance(value, other[name]) > bar or distance(value - old, other[name] - own) > CHANGE:
                return name, distance(value, other[name]), distance(value - old, other[name] - own)
        return None

    def stepped(self, before):
        """Let eager do the step from another state."""
        self.eager.load(before)
        self.eager.run(*self.ran)
        self.eager.commit()
        return before


def toy_case(toy, folder, method, config):
    """A learner on the small net, fitted on classes 0-5, its bundle and a stream of all ten classes."""
    data = fashion_mnist_subset()
    base = np.flatnonzero(data.y < 6)[:90]
    ready = prepare(
        Small(toy.helpers.settle),
        at="stem",
        example=data.x[:1],
        method=method,
        classes=10,
        config=METHODS[method].Config(**config),
        preprocess=ImageU8([0.286], [0.353], "HW"),
    ).fit(data.x[base], data.y[base])
    return ready, export(ready, folder / "bundle"), data.x[100 : 100 + STEPS], data.y[100 : 100 + STEPS]


def initial(ready, toy):
    return toy.helpers.arrays(ready.state), toy.helpers.rows_of(ready)


@pytest.mark.parametrize(("method", "config"), CASES, ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else v)
def test_single_steps_equal_eager(toy, tmp_path, method, config):
    """Strictly: no floor for rounding, no allowance for small losses."""
    ready, exported, x, y = toy_case(toy, tmp_path, method, config)
    witness = Witness(exported, ready)
    learner = Learner(exported.manifest, witness, *initial(ready, toy))
    ids = []
    for sample, label in zip(x, y, strict=True):
        if "adapt" in exported.manifest.steps:
            learner.adapt(sample)
            continue
        if "learn" not in exported.manifest.steps:
            learner.predict(sample)
            continue
        ids.append(learner.learn(sample, int(label)).sample_id)
    learner.predict(x[0])
    if exported.manifest.forgets:
        for sample_id in ids[::20]:
            learner.forget(sample_id)
    if "relabel" in exported.manifest.steps:
        for sample_id in ids[1::20]:
            learner.relabel(sample_id, 3)
    assert witness.compared >= STEPS
    assert witness.kinks <= KINKS
    replay = exported.manifest.replay
    assert witness.batch == (0 if replay is None or "adapt" in exported.manifest.steps else 1 + replay.rows_per_step)


@pytest.mark.parametrize(("method", "config"), [c for c in CASES if c[0] in ANALYTIC], ids=str)
def test_analytic_methods_stay_together_over_the_whole_trajectory(toy, tmp_path, method, config):
    ready, exported, x, y = toy_case(toy, tmp_path, method, config)
    eager = Learner(exported.manifest, EagerEngine(ready.trunk, ready.learner), *initial(ready, toy))
    onnx = Learner.load(exported.path)
    for learner in (eager, onnx):
        for sample, label in zip(x, y, strict=True):
            learner.learn(sample, int(label))
    other = onnx.state()
    for name, value in eager.state().items():
        assert distance(value, other[name]) <= WHOLE, name


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-4), ("float64", 1e-9)])
def test_ridge_after_forgetting_equals_batch_ridge(toy, tmp_path, dtype, bar):
    ready, exported, x, y = toy_case(toy, tmp_path, "ridge", {"gamma": 1.0, "dtype": dtype})
    data = fashion_mnist_subset()
    base = np.flatnonzero(data.y < 6)[:90]
    learner = Learner.load(exported.path)
    ids = [learner.learn(sample, int(label)).sample_id for sample, label in zip(x, y, strict=True)]
    gone = np.random.default_rng(0).choice(STEPS, STEPS // 20, replace=False)
    before = learner.state()["readout"]
    for i in gone:
        learner.forget(ids[i])
    kept = np.setdiff1d(np.arange(STEPS), gone)
    engine = OnnxEngine(exported.path, exported.manifest)
    # The features that each sample really had: the host's for the base samples, the device's for the others.
    host = [z.numpy() for z in ready.encode(data.x[base])]
    device = [engine.run("encode", {"x": row[None]})["z"] for row in x[kept]]
    z = np.stack([a.ravel() for a in host + device]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    target = np.eye(10)[np.concatenate([data.y[base], y[kept]])]
    batch = np.linalg.solve(z.T @ z + np.eye(z.shape[1]), z.T @ target)
    assert distance(batch, learner.state()["readout"]) <= bar
    assert distance(batch, before) > 100 * bar, "forgetting must have changed something"


def trajectory(toy, ready, exported, x, y):
    """State and inputs of every ``learn`` of the device's loop."""
    seen = []

    class Recorder(Witness):
        def run(self, step, inputs):
            if step == "learn":
                seen.append((self.inner.state(), {name: np.copy(value) for name, value in inputs.items()}))
            return self.inner.run(step, inputs)

        def commit(self):
            self.inner.commit()

    learner = Learner(exported.manifest, Recorder(exported, ready), *initial(ready, toy))
    for sample, label in zip(x, y, strict=True):
        learner.learn(sample, int(label))
    return seen


TINY = {"lr": 1e-5}  # a step far below the bar of the weights themselves: only the change can tell
DEFECTS = [
    ("latent_replay", {}, "param.block.0.weight", 1.1),  # a step that is 10 % wrong
    ("latent_replay", TINY, "param.block.0.weight", 1.1),
    ("latent_replay", TINY, "param.fc.weight", 0.9),
    ("latent_replay", {}, "param.block.0.weight", 1.002),  # just above the bar
    ("latent_replay", {}, "param.fc.bias", 0.0),  # a dropped bias gradient
    ("latent_replay", TINY, "param.fc.bias", 0.0),
    ("latent_replay", TINY, "param.", 9.0),  # the sum over the batch in place of the mean
    ("ridge", {}, "inverse", 1.1),
    ("ridge", {}, "readout", 0.99),
    ("ncm", {}, "mean", 1.1),
    ("slda", {}, "precision", 1.1),
    ("slda", {}, "mean", 1.1),
]


@pytest.mark.parametrize(("method", "config", "target", "factor"), DEFECTS)
def test_the_bars_refuse_a_wrong_step_from_every_state(toy, tmp_path, method, config, target, factor):
    ready, exported, x, y = toy_case(toy, tmp_path, method, config)
    eager = EagerEngine(ready.trunk, ready.learner)
    good = OnnxEngine(exported.path, exported.manifest)
    bad = toy.helpers.Spoiled(OnnxEngine(exported.path, exported.manifest), toy.helpers.scaled(target, factor))
    states = trajectory(toy, ready, exported, x[:100], y[:100])
    spoiled = 0
    for state, inputs in states:
        compare_step("learn", state, inputs, eager, good)
        bad.load(state)
        bad.run("learn", inputs)
        bad.commit()
        if toy.helpers.same(bad.state(), good.state()):
            continue  # the step leaves this tensor alone: the first sample of a class in slda
        spoiled += 1
        with pytest.raises(ExportError, match=r"gate 'parity': step 'learn': .* differs"):
            compare_step("learn", state, inputs, eager, bad)
    assert spoiled >= 90


@pytest.mark.parametrize(("eps", "wrong"), [(1e-8, 0.0), (1e-3, 1e-8)])
def test_the_bars_refuse_a_missing_epsilon(toy, tmp_path, eps, wrong):
    ready, exported, x, y = toy_case(toy, tmp_path, "latent_replay", {"optimizer": "adam", "lr": 1e-3, "eps": eps})
    eager = EagerEngine(ready.trunk, ready.learner)
    other = prepare(
        Small(toy.helpers.settle), at="stem", example=x[:1], method="latent_replay", classes=10, preprocess=ImageU8([0.286], [0.353], "HW")
    ).learner
    other.codecs = ready.learner.codecs
    optimiser = Optimiser("adam")
    object.__setattr__(optimiser, "eps", wrong)  # zero is refused by the optimiser itself
    object.__setattr__(other.config, "optimiser", lambda: optimiser)
    for state, inputs in trajectory(toy, ready, exported, x[:50], y[:50]):
        with pytest.raises(ExportError, match=r"gate 'parity': step 'learn': .*eager"):
            compare_step("learn", state, inputs, eager, EagerEngine(ready.trunk, other))
