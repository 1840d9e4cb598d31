"""ONNX against eager, step by step from the states of a real trajectory, and the bars themselves against planted defects."""

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
from edgecl_export.parity import MOST_KINKS, Tally, compare_step, nudged

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

    def state(self):
        return self.inner.state()

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
    assert witness.batch == (0 if replay is None else 1 + replay.rows_per_step)


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


class Spoiled:
    """An engine whose new state is spoiled before it is handed over."""

    def __init__(self, inner, spoil):
        self.inner, self.spoil = inner, spoil

    def load(self, state):
        self.before = dict(state)
        self.inner.load(state)

    def run(self, step, inputs):
        return self.inner.run(step, inputs)

    def commit(self):
        self.inner.commit()

    def state(self):
        return {name: self.spoil(name, self.before[name], value) for name, value in self.inner.state().items()}


def scaled(target, factor):
    """The change of the tensors whose name begins with ``target``, times ``factor``."""

    def spoil(name, old, new):
        wide = old.astype(np.float64)
        return (wide + factor * (new - wide)).astype(new.dtype) if name.startswith(target) else new

    return spoil


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
    bad = Spoiled(OnnxEngine(exported.path, exported.manifest), scaled(target, factor))
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


class Fixed:
    """An engine that makes one change: to ``new`` from [1, 2], and the same from weights beside those."""

    def __init__(self, new, tensor="w", **outputs):
        self.new, self.tensor = np.array(new), tensor
        self.outputs = {name: np.array(value, bool if name == "guard" else np.float32) for name, value in outputs.items()}

    def load(self, state):
        self.start = state

    def run(self, step, inputs):
        return self.outputs

    def commit(self):
        pass

    def state(self):
        return {self.tensor: self.new + (self.start[self.tensor] - np.array([1.0, 2.0]))}


OLD = {name: np.array([1.0, 2.0]) for name in ("w", "param.w", "average.w", "momentum.w", "adam_m.w")}
ALLOWANCES = [  # outputs, new state of both engines, whether it passes, how many comparisons need an allowance
    ({}, [1.1, 2.1], [1.1, 2.1], True, 0),
    ({}, [1.1, 2.1], [1.1001, 2.1], True, 1),  # 4e-5 of the state, 7e-4 of the change
    ({}, [1.1, 2.1], [1.1002, 2.1], False, 0),  # 8e-5 and 1.4e-3
    ({}, [21.0, 22.0], [21.004, 22.0], False, 0),  # 1.3e-4 and 1.4e-4
    ({"health.s": 0.05}, [1.1, 2.1], [1.1002, 2.1], True, 2),
    ({"health.s": 0.01}, [1.1, 2.1], [1.102, 2.1], True, 2),  # 8e-4 and 1.4e-2
    ({"health.s": 1e-6}, [1.1, 2.1], [1.11, 2.1], False, 0),  # 4e-3: no division loses more than a factor of 100
    ({"loss": 1e-5}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.08e-6], True, 1),
    ({"loss": 1e-5}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.12e-6], False, 0),
    ({"loss": 0.0}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.49e-6], True, 1),
    ({"loss": 0.0}, [1.0, 2.0 + 1e-6], [1.0, 2.0 + 1.6e-6], False, 0),  # half of a change is never rounding
    ({}, [1.0, 2.0 + 1e-13], [1.0, 2.0 + 1.004e-13], True, 1),  # two roundings of the stored value
    ({}, [1.0, 2.0], [1.0, 2.0 + 1e-15], True, 1),  # four roundings of the tensor, where nothing should change
    ({}, [1.0, 2.0], [1.0, 2.0 + 2e-15], False, 0),
    ({}, [1e-6, 0.0], [2e-6, 0.0], True, 1),  # what shrinks is known relative to what it was
    ({}, [1e-3, 0.0], [1.3e-3, 0.0], False, 0),  # 1.3e-4
    ({"guard": False}, [1.1, 2.1], [3.0, 4.0], True, 0),  # neither engine keeps it
]


@pytest.mark.parametrize(("outputs", "reference", "other", "passes", "allowed"), ALLOWANCES)
def test_allowances_are_bounded_and_counted(outputs, reference, other, passes, allowed):
    tally = Tally()
    engines = [Fixed(new, "param.w" if "loss" in outputs else "w", **outputs) for new in (reference, other)]
    if passes:
        assert compare_step("learn", OLD, {}, *engines, tally) == ("guard" not in outputs)
        compared = 0 if "guard" in outputs else 2 + len(outputs)
        assert (tally.bare, tally.allowed) == (compared - allowed, allowed)
    else:
        with pytest.raises(ExportError, match=r"gate 'parity': step 'learn': .* differs from eager"):
            compare_step("learn", OLD, {}, *engines, tally)


@pytest.mark.parametrize(
    ("tensor", "passes"),
    [("w", False), ("readout", False), ("param.w", True), ("average.w", True), ("momentum.w", True), ("adam_m.w", True)],
)
def test_a_small_loss_widens_the_bar_of_what_a_gradient_changes_only(tensor, passes):
    old = {tensor: np.array([1.0, 2.0])}
    engines = [Fixed([1.0, last], tensor, loss=1e-5) for last in (2.0 + 1e-6, 2.0 + 1.05e-6)]
    if passes:
        compare_step("learn", old, {}, *engines)
    else:
        with pytest.raises(ExportError, match=f"the change of {tensor} differs from eager"):
            compare_step("learn", old, {}, *engines)


def test_trained_parameters_that_shrink_are_compared_with_themselves():
    with pytest.raises(ExportError, match=r"step 'learn': param\.w differs from eager"):
        compare_step("learn", {"param.w": OLD["w"]}, {}, *(Fixed([last, 0.0], "param.w") for last in (1e-6, 2e-6)))


def test_a_step_that_one_engine_refuses_is_refused():
    with pytest.raises(ExportError, match="step 'learn': output guard is"):
        compare_step("learn", OLD, {}, Fixed([1.1, 2.1], guard=True), Fixed([1.1, 2.1], guard=False))


def test_an_output_near_zero_needs_an_allowance():
    tally = Tally()
    compare_step("learn", OLD, {}, Fixed([1.0, 2.0], loss=1e-5), Fixed([1.0, 2.0], loss=1.05e-5), tally)
    assert (tally.bare, tally.allowed) == (2, 1)
    with pytest.raises(ExportError, match="loss differs"):
        compare_step("learn", OLD, {}, Fixed([1.0, 2.0], loss=1e-5), Fixed([1.0, 2.0], loss=1.2e-5))


@pytest.mark.parametrize(
    ("tensor", "norm", "difference", "passes"),
    [
        ("param.w", 1.0, 1.2e-6, True),  # 1e-6 and a rounding of |w| |z| = 2.24
        ("param.w", 1.0, 1.4e-6, False),
        ("param.w", 10.0, 3.6e-6, True),
        ("param.w", 10.0, 3.8e-6, False),
        ("param.w", 1e9, 1.005e-4, True),  # a hundredth of the score, whatever the terms
        ("param.w", 1e9, 1.02e-4, False),
        ("w", 1e9, 1.2e-6, False),
    ],
)
def test_scores_that_cancel_are_known_to_a_rounding_of_their_terms(tensor, norm, difference, passes):
    old, z = {tensor: np.array([1.0, 2.0])}, {"z": np.array([[norm]], np.float32)}
    engines = [Fixed([1.0, 2.0], tensor, scores=value) for value in (1e-4, 1e-4 + difference)]
    if passes:
        compare_step("predict", old, z, *engines)
    else:
        with pytest.raises(ExportError, match="scores differs"):
            compare_step("predict", old, z, *engines)


def test_codes_may_lie_on_an_edge_but_not_be_floored(toy):
    exported, ready = toy.bundle("latent_replay")
    eager = EagerEngine(ready.trunk, ready.learner)
    inputs = {spec.name: spec.zeros() for spec in exported.manifest.steps["learn"].inputs}
    inputs["z"] = ready.examples[3][0].numpy()
    inputs["weight"] = np.ones(1, np.float32)
    state = toy.helpers.arrays(ready.state)

    class Codes(Spoiled):
        def run(self, step, inputs):
            outputs = self.inner.run(step, inputs)
            row = outputs["row.z"].copy()
            row.reshape(-1)[: self.spoil] += 1
            return {**outputs, "row.z": row}

        def state(self):
            return self.inner.state()

    compare_step("learn", state, inputs, eager, Codes(toy.onnx("latent_replay"), 1))
    with pytest.raises(ExportError, match=r"codes row\.z differ"):
        compare_step("learn", state, inputs, eager, Codes(toy.onnx("latent_replay"), 20))


def test_another_codeword_is_as_good_only_where_it_is_as_near(toy):
    """One code of a product-quantised row is another one: allowed while the row loses as much, and no step is compared by it."""
    codec = {"codec": "pq", "subquantizers": 3, "centroids": 8}
    exported, ready = toy.bundle("latent_replay", **codec)
    eager = EagerEngine(ready.trunk, ready.learner)
    inputs = {spec.name: spec.zeros() for spec in exported.manifest.steps["learn"].inputs}
    inputs |= {"z": ready.examples[3][0].numpy(), "weight": np.ones(1, np.float32)}
    state = toy.helpers.arrays(ready.state)

    class Codes(Spoiled):
        loses = 1.0

        def run(self, step, inputs):
            outputs = self.inner.run(step, inputs)
            row = outputs["row.z"].copy()
            row[0, : self.spoil] ^= 4
            return {**outputs, "row.z": row, "health.reconstruction": outputs["health.reconstruction"] * np.float32(self.loses)}

    tally, other = Tally(), Codes(toy.onnx("latent_replay", **codec), 1)
    assert not compare_step("learn", state, inputs, eager, other, tally)
    assert tally.allowed == 1
    with pytest.raises(ExportError, match=r"codes row\.z differ"):
        compare_step("learn", state, inputs, eager, Codes(toy.onnx("latent_replay", **codec), 2))
    other.loses = 1.1
    with pytest.raises(ExportError, match=r"health\.reconstruction differs from eager"):
        compare_step("learn", state, inputs, eager, other)


class Kinked(nn.Module):
    """One unit of the trained layer is exactly zero for latents of equal values; ``side`` is its derivative there."""

    def __init__(self, side):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem, self.mid, self.fc, self.side = nn.Identity(), nn.Linear(8, 6), nn.Linear(6, 3), side
        for weight in self.parameters():
            nn.init.normal_(weight, 0.0, 0.5, generator=generator)
        with torch.no_grad():
            self.mid.weight[0] = torch.tensor([1.0, -1.0] * 4)
            self.mid.bias[0] = 0.0

    def forward(self, x):
        h = self.mid(self.stem(x))
        return self.fc(torch.where(h >= 0 if self.side else h > 0, h, torch.zeros_like(h)))


@pytest.fixture(scope="module")
def kinked():
    """Two healthy engines that stand on either side of a kink, the state and inputs of a step there."""
    x = np.full((1, 8), 0.7, np.float32)
    learners = [prepare(Kinked(side), at="stem", example=x, method="finetune", classes=3) for side in (0, 1)]
    engines = [EagerEngine(ready.trunk, ready.learner) for ready in learners]
    state = {name: value.numpy().copy() for name, value in learners[0].state.items()}
    state["count"] = np.ones_like(state["count"])  # over one seen class the loss would be zero
    inputs = {"z": x, "target": np.array([1]), "weight": np.ones(1, np.float32), "lr": np.array(0.01, np.float32)}
    return *engines, state, inputs


def second(kinked):
    """A second engine on the reference's side."""
    return EagerEngine(kinked[0]._trunk, kinked[0]._learner)


def test_a_healthy_network_at_a_kink_passes_and_is_counted(kinked):
    eager, other, state, inputs = kinked
    changes = []
    for engine in (eager, other):
        engine.load(state)
        engine.run("learn", inputs)
        engine.commit()
        changes.append(engine.state()["param.mid.weight"] - state["param.mid.weight"])
    assert distance(*changes) > 0.03, "the two sides differ by far more than the bar"
    tally = Tally()
    for count in range(1, MOST_KINKS + 1):
        assert compare_step("learn", state, inputs, eager, other, tally)
        assert tally.kinks == count
    assert str(tally).endswith(f"; {MOST_KINKS} updates (at most {MOST_KINKS}) at a kink, equal to eager's from weights 1e-06 away")
    assert tally.worst["change"] < CHANGE
    with pytest.raises(ExportError, match=f"more than {MOST_KINKS} states lie at a kink"):
        compare_step("learn", state, inputs, eager, other, tally)
    smooth = Tally()
    compare_step("learn", state, inputs, eager, second(kinked), smooth)
    assert smooth.kinks == 0 and "kink" not in str(smooth)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("tensor", ["param.mid.weight", "param.mid.bias", "param.fc.weight", "param.fc.bias"])
@pytest.mark.parametrize("factor", [1.036, 0.964])
def test_an_error_of_a_kinks_size_is_refused_at_a_kink_too(kinked, side, tensor, factor):
    """On either side of it: nudged weights explain the jump, not the error beside it."""
    eager, state, inputs = kinked[0], *kinked[2:]
    with pytest.raises(ExportError, match=r"step 'learn': .* differs from eager"):
        compare_step("learn", state, inputs, eager, Spoiled(kinked[1] if side else second(kinked), scaled(tensor, factor)))


def test_a_side_that_only_one_tensor_takes_is_refused(kinked):
    """The gradient of a kink's other side belongs to all tensors of that side, or to none."""
    eager, other, state, inputs = kinked
    other.load(state)
    other.run("learn", inputs)
    other.commit()
    crossed = other.state()["param.mid.bias"]
    with pytest.raises(ExportError, match=r"param\.mid\.bias differs from eager"):
        compare_step(
            "learn", state, inputs, eager, Spoiled(second(kinked), lambda name, _, new: crossed if name == "param.mid.bias" else new)
        )
