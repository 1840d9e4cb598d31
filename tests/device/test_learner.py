import dataclasses
import json

import numpy as np
import pytest

from edgecl_device import InputError, Learner, ReplayMemory, StepMissingError, UpdateRefusedError
from edgecl_device.checks import read_tensors
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.manifest import read_manifest
from edgecl_device.store import EVENT_OVERHEAD


def encode(bundle, x):
    """The trunk as numpy, from the graph's own constants: z is affine in x."""
    engine = OnnxEngine(bundle, read_manifest(bundle))
    shift = engine.run("encode", {"x": np.zeros((1, 4, 4), np.uint8)})["z"][0].astype(np.float64)
    ones = np.eye(16, dtype=np.uint8).reshape(16, 1, 4, 4)
    trunk = np.stack([engine.run("encode", {"x": one})["z"][0] - shift for one in ones])
    return x.reshape(len(x), 16).astype(np.float64) @ trunk + shift


def test_class_sums_over_a_stream_equal_numpys(means, load, stream):
    x, y = stream
    z = encode(means, x)
    learner = load(means)
    for i in range(len(x)):
        weight = 1 + i % 3
        report = learner.learn(x[i], int(y[i]), weight=weight)
        assert report.label == y[i]
        assert report.health == {"size": pytest.approx(np.abs(z[i]).max(), rel=1e-6)}
    weights = 1 + np.arange(len(x)) % 3
    expected = np.stack([(z[y == c] * weights[y == c, None]).sum(0) for c in range(5)])
    np.testing.assert_array_equal(learner.state()["sum"], expected)
    assert learner.report()["class_counts"] == {name: int((y == c).sum()) for c, name in enumerate(["cat", "dog", "2", "3"])}


@pytest.mark.parametrize("rows", ["of the bundle", "none"])
def test_replay_over_a_stream_equals_a_numpy_loop(head, load, stream, edit_manifest, rows):
    x, y = stream
    z = encode(head, x)
    memory = ReplayMemory(read_manifest(head).replay, 5)
    if rows == "none":
        edit_manifest(head, replay_file=None)
    else:
        memory.fill(read_tensors(head / "rows.safetensors"))
    weight, bias = np.full((8, 5), 0.125), np.zeros(5)
    learner = load(head)
    for i in range(60):
        drawn = memory.draw()
        rows = np.concatenate([z[i : i + 1], (drawn["replay.z"].astype(np.float64) - 128) / 16])
        labels = np.concatenate([[y[i]], drawn["replay.target"]])
        shares = np.concatenate([[1.0], drawn["replay.weight"]])
        shares /= shares.sum()
        logits = rows @ weight + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        delta = (p - np.eye(5)[labels]) * shares[:, None] * 0.05
        memory.offer({"z": np.clip(np.round(z[i].astype(np.float32) * 16 + 128), 0, 255).astype(np.uint8)}, int(y[i]), i)
        report = learner.learn(x[i], int(y[i]))
        assert report.loss == pytest.approx(-(shares * np.log(p[np.arange(3), labels])).sum(), rel=1e-3, abs=1e-5)
        assert report.predicted == logits[0].argmax()
        weight, bias = weight - rows.T @ delta, bias - delta.sum(0)
    np.testing.assert_allclose(learner.state()["weight"], weight, rtol=1e-3, atol=1e-4)
    kept = learner.rows()
    assert all((kept[name] == value).all() for name, value in memory.rows_by_name().items())
    assert learner._core.memory.generator.counter == memory.generator.counter
    assert len(memory) == memory.rows  # the loop above has met a full memory


def test_predict_then_learn_by_id_is_learn(means, load, stream, facts):
    x, y = stream
    direct, delayed = load(means), load(means)
    for i in range(20):
        seen = delayed.predict(x[i])
        report = delayed.learn(seen.sample_id, int(y[i]))
        expected = direct.learn(x[i], int(y[i]))
        assert dataclasses.replace(report, seconds=0, macs=0) == dataclasses.replace(expected, seconds=0, macs=0)
        assert report.macs == 120 and expected.macs == 248
        assert seen.label == report.predicted
        assert seen.scores.shape == (5,) and seen.scores.dtype == np.float32
    assert facts(direct) == facts(delayed)


def test_late_labels_in_any_order_and_encode_runs_once(means, load, stream, monkeypatch):
    x, y = stream
    learner = load(means)
    runs = []
    run = learner._engine.run
    monkeypatch.setattr(learner._engine, "run", lambda step, inputs: runs.append(step) or run(step, inputs))
    ids = [learner.predict(x[i]).sample_id for i in range(4)]
    for i in (2, 0, 3):
        assert learner.learn(ids[i], int(y[i])).sample_id == ids[i]
    assert runs == ["encode", "predict"] * 4 + ["learn"] * 3
    assert learner.report()["pending"] == 1


def test_a_batch_dimension_may_be_left_out_and_a_view_may_be_passed(means, load, stream, facts):
    x, _ = stream
    one, other = load(means), load(means)
    assert (one.predict(x[0]).scores == other.predict(x[:1]).scores).all()
    turned = np.asfortranarray(x[1])
    one.learn(turned, 1)
    other.learn(x[1], 1)
    assert (turned == x[1]).all()
    one._pending.discard(0), other._pending.discard(0)
    assert facts(one) == facts(other)


def test_a_prediction_does_not_change_the_learner_but_for_the_waiting_sample(means, load, stream, facts):
    learner = load(means)
    learner.learn(stream[0][0], 1)
    before = facts(learner)
    seen = learner.predict(stream[0][1])
    learner._pending.discard(seen.sample_id)
    assert facts(learner) == before
    assert seen.class_name == "dog" and seen.label == 1


def test_unseen_classes_are_masked(means, load, stream):
    learner = load(means)
    learner.learn(stream[0][0], 3)
    scores = learner.predict(stream[0][1]).scores
    assert scores.argmax() == 3
    assert (np.delete(scores, 3) == np.float32(-1e30)).all()


def test_nothing_learned_is_no_class(means, head, load, stream):
    learner = load(means)
    seen = learner.predict(stream[0][0])
    assert (seen.label, seen.class_name) == (None, None)
    assert (seen.scores == np.float32(-1e30)).all()
    first, second = (learner.learn(stream[0][i], 1) for i in range(2))
    assert (first.predicted, second.predicted) == (None, 1)
    learner.forget(first.sample_id)
    learner.forget(second.sample_id)
    assert learner.predict(stream[0][0]).label is None
    assert load(head).predict(stream[0][0]).label == 0  # its scores are equal and real: the first wins


def test_a_waiting_sample_beyond_the_capacity_names_it(means, load, stream, facts):
    learner = load(means)
    ids = [learner.predict(stream[0][i]).sample_id for i in range(5)]
    before = facts(learner)
    with pytest.raises(InputError, match=rf"{ids[0]} does not wait .* last 4 predictions \(pending_capacity\)"):
        learner.learn(ids[0], 1)
    assert facts(learner) == before
    learner.learn(ids[1], 1)


def test_learning_a_sample_twice_is_refused(means, load, stream, facts):
    learner = load(means)
    seen = learner.predict(stream[0][0])
    learner.learn(seen.sample_id, 1)
    before = facts(learner)
    with pytest.raises(InputError, match="was learned"):
        learner.learn(seen.sample_id, 1)
    assert facts(learner) == before


BAD_CALLS = {
    "shape": (lambda a, x: a.learn(x[:3], 1), InputError, r"x: shape must be \[1, 4, 4\], got \[3, 4\]"),
    "two samples": (lambda a, x: a.learn(np.stack([x, x]), 1), InputError, r"x: shape must be \[1, 4, 4\], got \[2, 4, 4\]"),
    "dtype": (lambda a, x: a.learn(x.astype(np.float32), 1), InputError, "x: dtype must be uint8, got float32"),
    "masked": (lambda a, x: a.predict(np.ma.array(x, mask=x > 9)), InputError, r"x: must not be a masked array, .* \.filled\(value\)"),
    "masked to learn": (lambda a, x: a.learn(np.ma.array(x), 1), InputError, "x: must not be a masked array"),
    "list": (lambda a, x: a.predict(x.tolist()), InputError, "x: expected a numpy array, got list"),
    "list to learn": (lambda a, x: a.learn(x.tolist(), 1), InputError, "x: must be a numpy array, or a sample_id .*, got list; .*asarray"),
    "unknown id": (lambda a, x: a.learn(99, 1), InputError, "99 does not wait"),
    "negative id": (lambda a, x: a.learn(-1, 1), InputError, "-1 does not wait"),
    "id True": (lambda a, x: a.learn(True, 1), InputError, "must be an integer, got True"),
    "label too large": (lambda a, x: a.learn(x, 5), InputError, r"y: must be in \[0, 5\).*got 5; export with more max_classes"),
    "label negative": (lambda a, x: a.learn(x, -1), InputError, r"y: must be in \[0, 5\).*got -1"),
    "label True": (lambda a, x: a.learn(x, True), InputError, "y .*must be an integer, got True"),
    "label numpy True": (lambda a, x: a.learn(x, np.True_), InputError, "y .*must be an integer, got"),
    "label float": (lambda a, x: a.learn(x, 1.0), InputError, "y .*must be an integer, got 1.0"),
    "label None": (lambda a, x: a.learn(x, None), InputError, "y .*must be an integer, got None"),
    "label name": (lambda a, x: a.learn(x, "mug"), InputError, r"no class 'mug', known are \['cat', 'dog'\]; call add_class"),
    "weight zero": (lambda a, x: a.learn(x, 1, weight=0), InputError, "weight: must be finite in float32 and above 0, got 0"),
    "weight negative": (lambda a, x: a.learn(x, 1, weight=-1.0), InputError, "weight"),
    "weight NaN": (lambda a, x: a.learn(x, 1, weight=float("nan")), InputError, "weight"),
    "weight beyond float32": (lambda a, x: a.learn(x, 1, weight=1e39), InputError, "weight"),
    "weight beyond float64": (lambda a, x: a.learn(x, 1, weight=10**400), InputError, "weight: .* got 1000.*[.][.][.]; pass"),
    "weight below float32": (lambda a, x: a.learn(x, 1, weight=1e-60), InputError, "weight"),
    "weight True": (lambda a, x: a.learn(x, 1, weight=True), InputError, "weight: must be a number, got True"),
    "weight text": (lambda a, x: a.learn(x, 1, weight="1"), InputError, "weight: must be a number, got '1'"),
    "empty class name": (lambda a, x: a.add_class(""), InputError, "name: must be a string of 1 to 200 characters, got ''"),
    "long class name": (lambda a, x: a.add_class("m" * 201), InputError, "name: must be a string of 1 to 200 characters, got 'mmm"),
    "class name of half a character": (lambda a, x: a.add_class("\ud800"), InputError, "name: must be valid Unicode"),
    "snapshot of half a character": (lambda a, x: a.save("\udfff"), InputError, "name: must be valid Unicode"),
    "known class name": (lambda a, x: a.add_class("dog"), InputError, "class 'dog' exists at index 1"),
    "class number": (lambda a, x: a.add_class(3), InputError, "name: must be a string"),
    "unknown snapshot": (lambda a, x: a.rollback("lunch"), InputError, r"no snapshot 'lunch', there are \['kept'\]"),
    "empty snapshot name": (lambda a, x: a.save(""), InputError, "name: must be a string of 1 to 200 characters"),
    "long snapshot name": (lambda a, x: a.rollback("x" * 10**6), InputError, "name: must be a string of 1 to 200 .{1,200}$"),
    "long label": (lambda a, x: a.learn(x, "m" * 10**6), InputError, "no class 'mmm.{1,200}$"),
    "huge id": (lambda a, x: a.learn("3" * 10**6, 1), InputError, "x: must be a numpy array, .*got str"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_typed_and_changes_nothing(means, load, stream, facts, tmp_path, case):
    call, kind, message = BAD_CALLS[case]
    learner = load(means, store=tmp_path / "l.db")
    for i in range(3):
        learner.learn(stream[0][i], int(stream[1][i]))
    learner.save("kept")
    learner.predict(stream[0][4])
    before = facts(learner)
    with pytest.raises(kind, match=message):
        call(learner, stream[0][5])
    assert facts(learner) == before


BAD_HEAD_CALLS = {
    "lr NaN": (lambda a, x: a.learn(x, 1, lr=float("nan")), InputError, "lr: must be finite in float32 and at least 0"),
    "lr infinite": (lambda a, x: a.learn(x, 1, lr=float("inf")), InputError, "lr"),
    "lr negative": (lambda a, x: a.learn(x, 1, lr=-0.1), InputError, "lr"),
    "lr True": (lambda a, x: a.learn(x, 1, lr=True), InputError, "lr: must be a number"),
    "no forget": (lambda a, x: a.forget(0), StepMissingError, "head does not forget exactly, its steps are encode, learn, predict"),
    "no relabel": (lambda a, x: a.relabel(0, 1), StepMissingError, "head has no such step, its steps are encode, learn, predict"),
    "overflow": (
        lambda a, x: a.learn(x, 4, 1e6, 3e38),
        UpdateRefusedError,
        "learn: refused for sample 4: the new state or the loss .* not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_HEAD_CALLS)
def test_bad_input_to_a_replay_method_changes_neither_rows_nor_generator(head, load, stream, facts, tmp_path, case):
    call, kind, message = BAD_HEAD_CALLS[case]
    learner = load(head, store=tmp_path / "l.db")
    for i in range(4):
        learner.learn(stream[0][i], int(stream[1][i]))
    before, other = facts(learner), load(head)
    with pytest.raises(kind, match=message):
        call(learner, stream[0][5])
    assert facts(learner) == before
    for i in range(4):
        other.learn(stream[0][i], int(stream[1][i]))
    learner.learn(stream[0][6], 2)
    other.learn(stream[0][6], 2)
    after, expected = ({k: v for k, v in facts(each).items() if k.startswith(("state.", "memory."))} for each in (learner, other))
    if case == "overflow":  # the refused sample has used an id
        del after["memory.sample_id"], expected["memory.sample_id"]
    assert after == expected


def test_the_guard_refuses_and_names_its_figure(means, load, stream, loud, facts, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learner.learn(stream[0][0], 1)
    before = facts(learner)
    with pytest.raises(UpdateRefusedError, match=r"learn: refused for sample 1: the method's guard failed \(health\.size = 22\.69"):
        learner.learn(loud, 1)
    assert facts(learner) == before
    seen = learner.predict(loud)
    with pytest.raises(UpdateRefusedError):
        learner.learn(seen.sample_id, 1)
    assert learner.report()["session"]["refused"] == 2
    assert seen.sample_id in learner._pending.samples


def test_options_that_a_method_lacks_are_refused(means, head, load, stream):
    with pytest.raises(InputError, match=r"lr: means has no learning rate, got 0\.1; leave it out"):
        load(means).learn(stream[0][0], 1, lr=0.1)
    learner = load(head)
    learner._options = learner._options - {"weight"}
    with pytest.raises(InputError, match=r"weight: head takes no sample weight, got 2.0; leave it at 1"):
        learner.learn(stream[0][0], 1, weight=2)


def test_the_default_learning_rate_is_the_bundles(head, load, stream):
    one, other, still = load(head), load(head), load(head)
    start = still.state()
    one.learn(stream[0][0], 1)
    other.learn(stream[0][0], 1, lr=0.05)
    still.learn(stream[0][0], 1, lr=0)
    assert all((one.state()[name] == other.state()[name]).all() for name in start)
    assert all((still.state()[name] == start[name]).all() for name in start)
    assert (one.state()["weight"] != start["weight"]).any()


def test_classes_are_added_up_to_the_declared_maximum(means, load, stream, facts):
    learner = load(means)
    learner.learn(stream[0][0], 3)  # a class without a name takes its index
    assert learner.add_class("mug") == 2
    assert learner.add_class("spoon") == 4
    before = facts(learner)
    with pytest.raises(InputError, match="all 5 classes of this bundle are taken, got 'fork'; export with more max_classes"):
        learner.add_class("fork")
    assert facts(learner) == before
    assert learner.learn(stream[0][1], "mug").label == 2
    assert learner.predict(stream[0][1]).class_name == "mug"


def test_a_method_without_learn_lists_its_steps(means, load, stream, edit_manifest):
    data = json.loads((means / "manifest.json").read_text())
    edit_manifest(means, steps={name: data["steps"][name] for name in ("encode", "predict")}, forgets=False)
    learner = load(means)
    learner.predict(stream[0][0])
    with pytest.raises(StepMissingError, match="learn: means has no such step, its steps are encode, predict"):
        learner.learn(stream[0][0], 1)


def test_features_that_overflow_are_refused(means, load, stream, monkeypatch, facts):
    learner = load(means)
    before = facts(learner)
    monkeypatch.setattr(learner._engine, "run", lambda step, inputs: {"z": np.array([[np.inf]], np.float32)})
    with pytest.raises(InputError, match="x: its features are not finite"):
        learner.predict(stream[0][0])
    monkeypatch.undo()
    assert facts(learner) == before


def test_the_report_counts(head, load, stream, tmp_path):
    learner = load(head, store=tmp_path / "l.db")
    for i in range(6):
        learner.predict(stream[0][i])
        written = learner.learn(stream[0][i], 1).bytes_written
        assert 1024 <= written < 5 * 1100
    report = learner.report()
    assert report["method"] == "head" and report["learned"] == 6 and report["class_counts"] == {"dog": 6}
    assert report["session"]["macs"] == 6 * (128 + 40) + 6 * (128 + 120)
    assert report["session"]["predicted"] == report["session"]["learned"] == 6
    assert report["log"] == {
        "last_event": 6,
        "bytes": 6 * (EVENT_OVERHEAD + 32),
        "capacity_bytes": 65536,
        "in_memory": False,
        "erased": True,
    }
    assert load(head).report()["log"]["in_memory"] is True
    assert report["replay"] == {"rows": 9, "row_capacity": 11, "bytes": learner._core.memory.nbytes}
    assert report["state_bytes"] == sum(array.nbytes for array in learner.state().values()) == 180


def test_bytes_after_2n_samples_are_bytes_after_n(head, load, stream, tmp_path):
    learner = load(head, store=tmp_path / "l.db")
    x, y = stream

    def size():
        learner._store.fold(force=True)
        arrays = sum(array.nbytes for array in learner._core.capture().tensors.values())
        return arrays, len(learner._pending.samples), (tmp_path / "l.db").stat().st_size

    sizes = []
    for i in range(2000):
        seen = learner.predict(x[i % 120])
        learner.learn(seen.sample_id if i % 2 else x[i % 120], int(y[i % 120]))
        if i in (999, 1999):
            sizes.append(size())
    assert sizes[0] == sizes[1]


def test_any_engine_is_driven_by_the_same_loop(means, stream):
    class MeansInNumpy:
        name = "numpy"
        written = None

        def load(self, state):
            self.current = {name: array.copy() for name, array in state.items()}

        def state(self):
            return {name: array.copy() for name, array in self.current.items()}

        def run(self, step, inputs):
            self.written = None
            if step == "encode":
                return {"z": trunk(inputs["x"][0])}
            if step == "learn":
                hot = np.eye(5, dtype=np.float32)[inputs["target"][0]] * inputs["weight"]
                self.written = {"sum": self.current["sum"] + hot[:, None] * inputs["z"], "count": self.current["count"] + hot}
            flags = {"finite": np.True_, "guard": np.True_, "health.size": np.float32(0)}
            return {"scores": self.current["count"][None].copy(), "loss": np.float32(0), **flags}

        def commit(self):
            self.current = self.written or self.current

        def close(self):
            self.current = {}

    def trunk(x):
        return encode(means, x[None]).astype(np.float32)

    manifest = read_manifest(means)
    state = read_tensors(means / "state.safetensors")
    learner, stock = Learner(manifest, MeansInNumpy(), state), Learner.load(means)
    for i in range(5):
        for each in (learner, stock):
            each.learn(stream[0][i], int(stream[1][i]))
    assert all((learner.state()[name] == array).all() for name, array in stock.state().items())
    learner.close()
    stock.close()
