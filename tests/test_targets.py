"""Targets of every kind: real vectors, several labels, dense maps; the losses, the methods, the loop, the store."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgecl import METHODS, DenseMap, EagerEngine, MultiLabel, Vector, prepare
from edgecl.learner import UNSEEN, Problem
from edgecl.methods._losses import binary_cross_entropy, pixel_cross_entropy, squared_error
from edgecl_device import Learner
from edgecl_device.cli import main
from edgecl_device.errors import EdgeclError, ForgetRefusedError, InputError
from edgecl_device.manifest import ReplaySpec, TargetSpec, TensorSpec
from edgecl_device.memory import ReplayMemory
from edgecl_device.record import Record
from edgecl_export import export

NAMES = ("red", "round", "small")
TARGETS = {"vector": Vector(2), "multilabel": MultiLabel(NAMES), "map": DenseMap(4, ignore=np.int64(255))}
RATES = {"vector": 0.1, "multilabel": 0.5, "map": 3.0}
CASES = (
    ("vector", "finetune"), ("vector", "latent_replay"), ("vector", "ridge"), ("vector", "frozen"),
    ("multilabel", "finetune"), ("multilabel", "latent_replay"), ("multilabel", "ridge"), ("multilabel", "frozen"),
    ("map", "finetune"), ("map", "latent_replay"), ("map", "frozen"),
)  # fmt: skip
LEARNING = [case for case in CASES if case[1] != "frozen"]


def net(kind):
    torch.manual_seed(0)
    if kind == "map":
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2 if kind == "vector" else 3))


def data(kind, count=40, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "map":
        x = rng.random((count, 1, 5, 4)).astype(np.float32)
        y = (x[:, 0] * 3).astype(np.int64)  # class 3 never comes
        y[:, 0, 0] = 255
        return x, y
    x = rng.standard_normal((count, 6)).astype(np.float32)
    plan = np.random.default_rng(7).standard_normal((6, 2 if kind == "vector" else 3))
    return x, (x @ plan).astype(np.float32) if kind == "vector" else (x @ plan > 0).astype(np.float32)


def config(method, **changes):
    small = {"rows_per_step": 3, "capacity_bytes": 2048, "policy": "reservoir"} if method == "latent_replay" else {}
    return METHODS[method].Config(**{**small, **changes})


def prepared(kind, method, **changes):
    x, y = data(kind)
    ready = prepare(net(kind), at="1", example=x[:1], method=method, target=TARGETS[kind], config=config(method, **changes))
    return ready.fit(x[:10], y[:10])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundle and prepared learner of a case, made once; every gate of the export has passed then."""
    made = {}

    def bundle(kind, method, engine="onnx"):
        key = kind, method, engine
        if key not in made:
            ready = prepared(kind, method)
            made[key] = export(ready, tmp_path_factory.mktemp("bundle") / "b", engine=engine), ready
        return made[key]

    return bundle


@pytest.mark.parametrize("batch", [1, 3])
def test_losses_and_gradients_are_torchs(batch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, 5, generator=generator, dtype=torch.float64) * 30
    scores[0, :2] = 0.0  # where a kink would give another gradient
    labels, values = torch.randint(0, 2, (batch, 5), generator=generator).double(), torch.randn(batch, 5, generator=generator).double()
    maps = torch.randn(batch, 4, 3, 2, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (batch, 3, 2), generator=generator)
    classes[0, 0] = 7
    seen = torch.tensor([True, True, True, False])
    masked = lambda s: s.masked_fill(~seen.reshape(1, 4, 1, 1), -torch.inf)  # noqa: E731
    pairs = [
        (squared_error, lambda s: F.mse_loss(s, values, reduction="none").mean(1), scores, (values,)),
        (binary_cross_entropy, lambda s: F.binary_cross_entropy_with_logits(s, labels, reduction="none").mean(1), scores, (labels,)),
        (
            pixel_cross_entropy,
            lambda s: torch.stack([F.cross_entropy(masked(s)[i : i + 1], classes[i : i + 1], ignore_index=7) for i in range(batch)]),
            maps,
            (classes, seen, 7),
        ),
    ]
    for ours, theirs, at, rest in pairs:
        a, b = at.clone().requires_grad_(), at.clone().requires_grad_()
        got, wanted = ours(a, *rest), theirs(b)
        assert got.shape == (batch,)
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
        weights = torch.arange(1.0, batch + 1).double()
        gradients = [torch.autograd.grad((v * weights).sum(), t)[0] for v, t in ((got, a), (wanted, b))]
        torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-8)


def test_losses_of_known_value():
    assert binary_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.0, 1, 1, 0]])).item() == pytest.approx(np.log(2))
    assert binary_cross_entropy(torch.tensor([[1e30, -1e30]]), torch.tensor([[1.0, 0.0]])).item() == 0
    every, zeros = torch.ones(3, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.int64)
    assert pixel_cross_entropy(torch.zeros(1, 3, 2, 2), zeros, every, None).item() == pytest.approx(np.log(3))
    assert pixel_cross_entropy(torch.ones(1, 3, 2, 2), torch.full((1, 2, 2), 9), every, 9).item() == 0


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_it_predicts_what_the_kind_has(bundles, toy, kind, method):
    exported, ready = bundles(kind, method)
    x, y = data(kind, seed=1)
    rows = None if ready.memory is None else ready.memory.rows_by_name()
    eager = EagerEngine(ready.trunk, ready.learner)
    for runner in (Learner.load(exported.path), Learner(exported.manifest, eager, toy.helpers.arrays(ready.state), rows)):
        with runner as learner:
            seen = learner.predict(x[0])
            assert (seen.label, seen.class_name) == (None, None)
            if kind == "vector":
                assert np.array_equal(seen.value, seen.scores) and seen.value.shape == (2,)
            if kind == "multilabel":
                limit = 0.5 if method == "ridge" else 0.0
                assert seen.labels == tuple(np.flatnonzero(seen.scores > limit))
                assert seen.label_names == tuple(NAMES[i] for i in seen.labels)
            if kind == "map":
                assert np.array_equal(seen.label_map, seen.scores.argmax(0)) and seen.label_map.shape == (5, 4)
                assert (seen.scores[3] == np.float32(UNSEEN)).all() and (seen.scores[:3] > UNSEEN / 2).all()
            if method != "frozen":
                report = learner.learn(seen.sample_id, y[0])
                assert np.array_equal(report.predicted, seen.outcome)
                assert np.array_equal(report.label, np.flatnonzero(y[0]) if kind == "multilabel" else y[0])


@pytest.mark.parametrize("kind", TARGETS)
def test_one_step_of_finetune_is_sgd_on_torchs_own_loss(bundles, kind):
    exported, _ = bundles(kind, "finetune")
    x, y = data(kind, seed=2)
    model = net(kind)
    scores, target = model(torch.tensor(x[:1])), torch.tensor(y[:1])
    if kind == "map":
        scores = scores.masked_fill(~torch.tensor([True, True, True, False]).reshape(1, 4, 1, 1), -torch.inf)
    loss = {
        "vector": F.mse_loss,
        "multilabel": F.binary_cross_entropy_with_logits,
        "map": lambda s, t: F.cross_entropy(s, t, ignore_index=255),
    }[kind](scores, target)
    (2.0 * loss).backward()
    with Learner.load(exported.path) as learner:
        report = learner.learn(x[0], y[0], weight=2.0, lr=0.3)
        assert report.loss == pytest.approx(2 * loss.item(), rel=1e-4)
        for name in ("weight", "bias"):
            wanted = getattr(model[2], name) - 0.3 * getattr(model[2], name).grad
            np.testing.assert_allclose(learner.state()[f"param.2.{name}"], wanted.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TARGETS)
def test_replay_is_sgd_on_the_sample_and_the_mean_of_the_rows(kind):
    ready = prepared(kind, "latent_replay", codec="float32", capacity_bytes=8192)
    drawn = {name: torch.tensor(a.copy()) for name, a in ready.memory.draw().items()}
    x, y = data(kind, seed=3)
    z, target = ready.encode(x[:1])[0], torch.tensor(y[:1])
    replay = {"z": drawn["replay.z"], "target": drawn["replay.target"], "weight": drawn["replay.weight"]}
    _, new = ready.learner.learn(ready.state, z, target, torch.ones(1), torch.tensor(0.1), replay)
    head = net(kind)[2]
    scores, targets = head(torch.cat([z, drawn["replay.z"]])), torch.cat([target, drawn["replay.target"].to(target.dtype)])
    if kind == "map":
        scores = scores.masked_fill(~torch.tensor([True, True, True, False]).reshape(1, 4, 1, 1), -torch.inf)
    each = {
        "vector": F.mse_loss,
        "multilabel": F.binary_cross_entropy_with_logits,
        "map": lambda s, t: F.cross_entropy(s, t, ignore_index=255),
    }[kind]
    loss = [each(scores[i : i + 1], targets[i : i + 1]) for i in range(4)]
    (loss[0] + sum(loss[1:]) / 3).backward()
    torch.testing.assert_close(new["param.2.weight"], (head.weight - 0.1 * head.weight.grad).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "method"), LEARNING)
def test_it_learns(bundles, kind, method):
    exported, _ = bundles(kind, method)
    x, y = data(kind, 300, seed=4)
    with Learner.load(exported.path) as learner:
        losses = [learner.learn(a, b, **({} if method == "ridge" else {"lr": RATES[kind]})).loss for a, b in zip(x, y, strict=True)]
    assert np.mean(losses[-100:]) < 0.95 * np.mean(losses[:100])


def batch_ridge(ready, x, y, weights):
    phi = np.concatenate([z.flatten(1).numpy() for z in ready.encode(x)]).astype(np.float64)
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    scaled = phi * weights[:, None]
    return np.linalg.solve(scaled.T @ phi + ready.learner.config.gamma * np.eye(phi.shape[1]), scaled.T @ y)


@pytest.mark.parametrize("kind", ["vector", "multilabel"])
def test_ridge_is_the_batch_solution_after_forget_and_relabel(bundles, kind):
    exported, ready = bundles(kind, "ridge")
    base_x, base_y = data(kind)
    x, y = data(kind, 12, seed=5)
    weights = np.linspace(0.5, 3, 12)
    with Learner.load(exported.path) as learner:
        ids = [learner.learn(a, b, weight=w).sample_id for a, b, w in zip(x, y, weights, strict=True)]
        learner.forget(ids[3])
        learner.relabel(ids[5], 1 - y[5])
        with pytest.raises(ForgetRefusedError):
            learner.forget(ids[3])
        readout = learner.state()["readout"]
        assert learner.report()["learned"] == 12 and learner.state()["count"].tolist() == [10 + 11]
    kept = np.delete(np.arange(12), 3)
    changed = y.copy()
    changed[5] = 1 - y[5]
    alls = np.concatenate([base_x[:10], x[kept]]), np.concatenate([base_y[:10], changed[kept]])
    wanted = batch_ridge(ready, *alls, np.concatenate([np.ones(10), weights[kept]]))
    np.testing.assert_allclose(readout, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "method"), LEARNING)
def test_recovery_replays_the_log_to_the_bit(bundles, toy, tmp_path, kind, method):
    exported, _ = bundles(kind, method)
    x, y = data(kind, 30, seed=6)
    learner = Learner.load(exported.path, tmp_path / "l.db")
    for a, b in zip(x[:20], y[:20], strict=True):
        learner.learn(a, b)
    if method == "ridge":
        learner.relabel(3, y[4])
        learner.forget(5)
    waiting = learner.predict(x[20])
    learner.save()
    learner.learn(waiting.sample_id, y[20])
    late = learner.learn(x[21], y[21]).sample_id
    facts = learner.state(), learner.rows(), learner.report()["class_counts"]
    learner._store.close()  # as a killed process: without a last snapshot
    with Learner.load(exported.path, tmp_path / "l.db") as again:
        assert toy.helpers.same(again.state(), facts[0]) and toy.helpers.same(again.rows(), facts[1])
        assert again.report()["class_counts"] == facts[2]
        if method == "ridge":
            again.relabel(3, y[7])
            again.forget(late)
            assert again.report()["class_counts"] == ({} if kind == "vector" else again.report()["class_counts"])
            assert again.report()["forgotten"] == 2


def test_rows_hold_their_targets(bundles):
    for kind, dtype in (("vector", "float32"), ("multilabel", "uint8"), ("map", "uint8")):
        exported, _ = bundles(kind, "latent_replay")
        x, y = data(kind, 120, seed=7)
        base = data(kind)[1][:10]
        assert exported.manifest.ledger["logged_features_per_update"] == Record(exported.manifest).nbytes
        with Learner.load(exported.path) as learner:
            known = {learner.learn(a, b).sample_id: b for a, b in zip(x, y, strict=True)}
            rows = learner.rows()
            assert learner.report()["replay"]["bytes"] <= 2048
        assert rows["replay.target"].dtype == dtype
        assert len(rows["replay.target"]) == learner._core.memory.rows, "it is full"
        for target, sample in zip(rows["replay.target"], rows["replay.sample_id"], strict=True):
            assert np.array_equal(target, known[sample]) if sample >= 0 else any(np.array_equal(target, b) for b in base)


def test_rows_with_targets_are_removed_relabelled_and_restored():
    spec = TARGETS["vector"].resolved(None)[0]
    fields = (TensorSpec("z", (2,), "float32"), spec.stored(2))
    memory = ReplayMemory(ReplaySpec(fields, 2, 400, "reservoir", 0), classes=2)
    for i in range(6):
        memory.offer({"z": np.full(2, i, np.float32)}, np.array([i, -i], np.float32), i)
    assert memory.remove(2) and memory.relabel(4, np.array([9, 9], np.float32)) and not memory.relabel(2, np.zeros(2, np.float32))
    rows = memory.rows_by_name()
    found = dict(zip(rows["replay.sample_id"].tolist(), rows["replay.target"].tolist(), strict=True))
    assert found == {0: [0, 0], 1: [1, -1], 3: [3, -3], 4: [9, 9], 5: [5, -5]}
    other = ReplayMemory(memory.spec, classes=2)
    other.fill(rows)
    third = ReplayMemory(memory.spec, classes=2)
    third.restore(memory.snapshot())
    assert sorted(other.rows_by_name()["replay.target"].tolist()) == sorted(third.rows_by_name()["replay.target"].tolist())
    assert set(memory.draw()) == {"replay.z", "replay.target", "replay.weight"}


@pytest.mark.parametrize(("kind", "method"), [("vector", "finetune"), ("multilabel", "finetune"), ("map", "latent_replay")])
def test_executorch_has_every_kind(bundles, kind, method):
    exported, _ = bundles(kind, method, "executorch")
    x, y = data(kind, 3, seed=8)
    with Learner.load(exported.path) as there, Learner.load(bundles(kind, method)[0].path) as here:
        for a, b in zip(x, y, strict=True):
            assert there.learn(a, b).loss == pytest.approx(here.learn(a, b).loss, rel=1e-4)
        np.testing.assert_allclose(there.predict(x[0]).scores, here.predict(x[0]).scores, rtol=1e-3, atol=1e-5)


WRONG = {
    "vector": [
        (np.zeros(3, np.float32), r"y: shape must be \[2\], got \[3\]; reshape"),
        (np.zeros(2, np.int64), r"y: must be a numpy array of float32 \[2\], got int64 \[2\]; convert"),
        ([0.5, 0.5], "y: must be a numpy array of float32 .* of type list; convert"),
        (np.array([0, np.nan], np.float32), "y: values must be finite.*; drop"),
        (np.array([0, 1e39]), "y: values must be finite in float32.*; drop"),
        (1, "y: must be a numpy array"),
    ],
    "multilabel": [
        (np.array([0, 1, 2]), r"y: labels must be 0 or 1, got \[0, 1, 2\]; pass one value a label"),
        (np.zeros(2), r"y: shape must be \[3\], got \[2\]"),
        (["red", "heavy"], "y: no class 'heavy', known are .*'red'"),
        ("red", r"y: must be zeros and ones \[3\], got 'red'"),
    ],
    "map": [
        (np.full((5, 4), 4), r"y: pixels must be in \[0, 4\) or 255 \(ignored\), got \[4\]; map them"),
        (np.zeros((4, 5), int), r"y: shape must be \[5, 4\], got \[4, 5\]"),
        (np.zeros((5, 4)), r"y: must be a numpy array of integers \[5, 4\], got float64"),
        (0, "y: must be a numpy array of integers"),
    ],
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_targets_change_nothing(bundles, toy, kind):
    exported, _ = bundles(kind, "finetune")
    x, _ = data(kind, 1)
    with Learner.load(exported.path) as learner:
        before = learner.state()
        for y, message in WRONG[kind]:
            with pytest.raises(InputError, match=message):
                learner.learn(x[0], y)
        assert toy.helpers.same(learner.state(), before) and learner.report()["learned"] == 0


def test_forms_of_targets(bundles):
    x, y = data("multilabel", 2)
    with Learner.load(bundles("multilabel", "ridge")[0].path) as learner:
        assert learner.learn(x[0], ["small", "red"]).label == (0, 2)
        assert learner.learn(x[0], []).label == ()
        assert learner.learn(x[1], y[1].astype(bool)).label == tuple(np.flatnonzero(y[1]))
        assert learner.report()["class_counts"] == {name: n for name, n in zip(NAMES, [1, 0, 1] + y[1], strict=True) if n}
    x, y = data("map", 1)
    with Learner.load(bundles("map", "finetune")[0].path) as learner:
        learner.learn(x[0], y[0].astype(np.uint8))
        assert learner.report()["class_counts"] == {str(i): 1 for i in np.unique(y[0]) if i != 255}
    with Learner.load(bundles("vector", "finetune")[0].path) as learner, pytest.raises(InputError, match="vector have no classes"):
        learner.add_class("mug")


def ready(kind="vector", method="ridge", **options):
    return prepare(net(kind), at="1", example=data(kind)[0][:1], method=method, **options)


def fitted(y):
    return ready(target=Vector(2)).fit(data("vector")[0], y)


REFUSED = {
    "method": (lambda: ready(method="ncm", target=Vector(2)), "target: ncm serves class, got vector; methods for vector are .*ridge"),
    "map without a head": (lambda: ready("map", target=DenseMap(4)), "target: ridge serves class, vector, multilabel, got map"),
    "outputs": (lambda: ready(method="finetune", target=Vector(3)), r"suffix: must return scores \[1, 3\], got \[1, 2\]; .*Vector\(size\)"),
    "no map": (lambda: ready(method="finetune", target=DenseMap(2)), r"scores \[1, 2, H, W\], got \[1, 2\]; give it such a head"),
    "policy": (lambda: prepared("vector", "latent_replay", policy="largest-class"), "policy: must be 'reservoir' .*; take 'reservoir'"),
    "er-ace": (lambda: prepared("map", "latent_replay", loss="er-ace"), "loss: must be 'er' for targets of kind map, .*; use 'er'"),
    "kind": (lambda: ready(target="box"), "target: must be 'class', Vector"),
    "classes": (lambda: ready(target=Vector(2), classes=2), "classes, class_names: are for target='class'"),
    "no classes": (ready, "classes: must be an integer, got None"),
    "threshold": (lambda: ready(target=MultiLabel(3, threshold=1.0)), "threshold: must be between 0 and 1, got 1.0"),
    "ignore": (lambda: ready("map", "finetune", target=DenseMap(4, ignore=1 << 40)), "ignore: must fit into 32 bits"),
    "one name": (lambda: ready(target=Vector(3, names="abc")), r"names: must be a list of strings, got 'abc'; pass \['abc'\]"),
    "too many names": (lambda: ready(target=Vector(1, names=["a", "b"])), "^names: must be at most 1 names, got 2; raise size"),
    "one name twice": (lambda: ready(target=MultiLabel(["a", "a"])), "^labels: must be different names"),
    "size": (lambda: ready(target=Vector(0)), "size: must be an integer of 1 to"),
    "base targets": (lambda: fitted(np.zeros(40)), r"y: must be float32 \[40, 2\], got float64 \[40\]; reshape it"),
    "base values": (lambda: fitted(np.where(np.arange(80).reshape(40, 2) == 7, np.nan, 0.0)), "sample 3: y: values must be finite"),
    "learner": (
        lambda: METHODS["slda"](Problem(TensorSpec("z", (1, 2), "float32"), 2, TargetSpec("vector", (1, 2), "float32"))),
        "target: slda serves class, got vector",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_mend(what):
    call, message = REFUSED[what]
    with pytest.raises(EdgeclError, match=message):
        call()


@pytest.mark.parametrize("kind", TARGETS)
def test_the_command_runs_a_stream_of_every_kind(bundles, tmp_path, capsys, kind):
    exported, _ = bundles(kind, "finetune")
    x, y = data(kind, 8, seed=9)
    weight = np.linspace(0.5, 2, 8)
    np.savez(tmp_path / "s.npz", x=x, y=y, weight=weight)
    assert main(["run", str(exported.path), "--data", str(tmp_path / "s.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = []
    with Learner.load(exported.path) as learner:
        for a, b, w in zip(x, y, weight, strict=True):
            seen = learner.predict(a)
            measured.append({
                "vector": lambda s, b: np.mean((s.scores - b) ** 2),
                "multilabel": lambda s, b: np.mean((s.scores > 0) == b),
                "map": lambda s, b: np.mean((s.label_map == b)[b != 255]),
            }[kind](seen, b))  # fmt: skip
            learner.learn(seen.sample_id, b, weight=w)
    name = {"vector": "squared_error", "multilabel": "label_accuracy", "map": "pixel_accuracy"}[kind]
    assert found[f"prequential_{name}"] == pytest.approx(np.mean(measured), rel=1e-5)
    assert main(["verify", str(exported.path)]) == 0
    assert main(["info", str(exported.path)]) == 0
    np.savez(tmp_path / "s.npz", x=x, y=y, weight=weight * 0)
    assert main(["run", str(exported.path), "--data", str(tmp_path / "s.npz")]) == 2
    assert "sample 0: weight: must be finite in float32 and above 0" in capsys.readouterr().err
