import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from edgecl_device import BundleError, InputError, Learner, SchemaError
from edgecl_device.manifest import DTYPES, TargetSpec, TensorSpec, read_manifest, to_json

FILES = ["encode.onnx", "predict.onnx", "learn.onnx", "forget.onnx", "relabel.onnx", "state.safetensors"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_altered_file_is_named_and_the_store_is_left_alone(means, load, stream, tmp_path, name):
    with load(means, store=tmp_path / "l.db") as learner:
        learner.learn(stream[0][0], 1)
    store, good = (tmp_path / "l.db").read_bytes(), (means / name).read_bytes()
    altered = bytearray(good)
    altered[len(good) // 2] ^= 1
    for content, message in (
        (None, "file is missing; copy the whole bundle again"),
        (bytes(altered), "SHA-256 differs"),
        (b"", "SHA-256 differs"),
    ):
        (means / name).unlink()
        if content is not None:
            (means / name).write_bytes(content)
        with pytest.raises(BundleError, match=f"{name}: {message}"):
            load(means, store=tmp_path / "l.db")
        (means / name).write_bytes(b"")
    (means / name).write_bytes(good)
    assert (tmp_path / "l.db").read_bytes() == store
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 1


def test_a_newer_schema_is_refused(means, load):
    data = json.loads((means / "manifest.json").read_text())
    # A newer schema may hash in another way: it comes first.
    (means / "manifest.json").write_text(json.dumps({**data, "schema": 5}))
    with pytest.raises(SchemaError, match="schema is 5, this package reads up to 4; update edgecl on the device"):
        load(means)


def test_a_bundle_of_schema_1_and_its_store_go_on(means, load, stream, edit_manifest, tmp_path, crash):
    x, y = stream
    new = load(means, store=tmp_path / "l.db")
    new.learn(x[0], int(y[0]))
    crash(new)
    edit_manifest(means, schema=1, target="class")
    old = load(means, store=tmp_path / "l.db")
    assert old.report()["learned"] == 1 and old.manifest.target == TargetSpec()
    old.learn(x[1], int(y[1]))
    edit_manifest(means, schema=1, target="box")
    with pytest.raises(BundleError, match="target: expected an object, got box"):
        load(means)


def test_the_manifests_own_hash_is_what_the_page_says(means):
    data = json.loads((means / "manifest.json").read_text())
    found = data.pop("manifest_sha256")
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert found == hashlib.sha256(text.encode("ascii")).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.5},
        {"class_names": ["dog", "cat"]},
        {"bundle_id": "0" * 64},
        {"files": {}},
        {"config": {"rate": 1}},
        {"steps": 7},
        {"mood": "good"},
        {"manifest_sha256": "0" * 64},
        {"manifest_sha256": None},
    ],
)
def test_an_altered_manifest_is_refused_whatever_was_altered(means, load, stream, tmp_path, change):
    with load(means, store=tmp_path / "l.db") as learner:
        learner.learn(stream[0][0], 1)
    store, good = (tmp_path / "l.db").read_bytes(), (means / "manifest.json").read_text()
    (means / "manifest.json").write_text(json.dumps({**json.loads(good), **change}))
    with pytest.raises(BundleError, match=r"manifest\.json: does not match its own manifest_sha256, .* copy or export the bundle again"):
        load(means, store=tmp_path / "l.db")
    assert (tmp_path / "l.db").read_bytes() == store
    (means / "manifest.json").write_text(json.dumps(json.loads(good)))  # another layout of the same content is the same manifest
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 1


def test_a_manifest_without_its_own_hash_is_refused(means, load):
    data = json.loads((means / "manifest.json").read_text())
    del data["manifest_sha256"]
    (means / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="does not match its own manifest_sha256"):
        load(means)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate: expected a finite number, got fast"),
        ({"mood": "good"}, r"expected no other fields, got \['mood'\]"),
        ({"steps": 7}, "steps: expected an object, got 7"),
    ],
)
def test_a_malformed_field_is_named(means, load, edit_manifest, change, message):
    edit_manifest(means, **change)
    with pytest.raises(BundleError, match=message):
        load(means)


@pytest.mark.parametrize("name", [FILES[2], FILES[5]])
def test_a_file_without_a_hash_is_refused(means, load, edit_manifest, name):
    files = json.loads((means / "manifest.json").read_text())["files"]
    del files[name]
    edit_manifest(means, files=files)
    with pytest.raises(BundleError, match=f"'{name}' has no entry in files"):
        load(means)


def test_no_folder_and_no_json(means, load, tmp_path):
    with pytest.raises(BundleError, match="no manifest"):
        load(tmp_path / "nowhere")
    (means / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        load(means)


def broken(data, change):
    steps = data["steps"]
    scores = steps["learn"]["outputs"][0]
    assert scores["name"] == "scores"
    if change == "no encode":
        del steps["encode"]
    elif change == "no predict":
        del steps["predict"]
    elif change == "predict writes":
        steps["predict"]["state_out"] = ["sum"]
    elif change == "two inputs":
        steps["encode"]["inputs"].append({"name": "more", "shape": [1], "dtype": "float32"})
    elif change == "unknown input":
        steps["learn"]["inputs"].append({"name": "mood", "shape": [1], "dtype": "float32"})
    elif change == "wrong input":
        steps["predict"]["inputs"][0]["shape"] = [1, 9]
    elif change == "no loss":
        steps["learn"]["outputs"] = [o for o in steps["learn"]["outputs"] if o["name"] != "loss"]
    elif change == "no finite":
        steps["forget"]["outputs"] = []
    elif change == "names":
        data["class_names"] = ["a", "b", "c", "d", "e", "f"]
    elif change == "no forget":
        del steps["forget"]
    elif change == "bundle id":
        data["bundle_id"] = "\ud800"
    elif change == "same names":
        data["class_names"] = ["a", "a"]
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no encode", "steps: 'encode' is missing"),
        ("no predict", "steps: 'predict' is missing"),
        ("predict writes", "step 'predict': must not write state"),
        ("two inputs", "step 'encode': inputs must be x, or x.NAME each"),
        ("unknown input", "step 'learn': the loop cannot feed .*mood"),
        ("wrong input", "step 'predict': the loop cannot feed"),
        ("no loss", "step 'learn': output .*loss.* is missing"),
        ("no finite", "step 'forget': output .*finite.* is missing"),
        ("names", "class_names: must be at most 5 different names"),
        ("no forget", "forgets must be false without a step 'forget'"),
        ("bundle id", "bundle_id must be a SHA-256 in hexadecimal"),
        ("same names", "class_names: must be at most 5 different names"),
    ],
)
def test_a_manifest_that_the_loop_cannot_serve_is_refused(means, edit_manifest, change, message):
    edit_manifest(means, **broken(json.loads((means / "manifest.json").read_text()), change))

    class NoEngine:
        """The loop's own checks come before any engine's."""

        def load(self, state):
            raise AssertionError

    with pytest.raises(BundleError, match=message):
        Learner(read_manifest(means), NoEngine(), load_file(means / "state.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": np.array([0, 0, np.nan, 0, 0], np.float32)}, "count: values must be finite"),
        ({"count": np.array([0, 0, np.inf, 0, 0], np.float32)}, "count: values must be finite"),
        ({"count": np.zeros(6, np.float32)}, r"count: shape must be \[5\], got \[6\]"),
        ({"count": np.zeros(5)}, "count: dtype must be float32, got float64"),
        ({"more": np.zeros(5)}, r"tensors must be \['count', 'sum'\], got \['count', 'more', 'sum'\]"),
    ],
)
def test_an_initial_state_that_does_not_fit_is_refused(means, load, edit_manifest, change, message):
    state = {**load_file(means / "state.safetensors"), **change}
    (means / "state.safetensors").write_bytes(save(state))
    edit_manifest(means)
    with pytest.raises(BundleError, match=f"state: .*{message}"):
        load(means)


@pytest.mark.parametrize("content", [b"", b"not safetensors" * 9])
def test_a_state_file_that_cannot_be_read_is_named(means, load, edit_manifest, content):
    (means / "state.safetensors").write_bytes(content)
    edit_manifest(means)
    with pytest.raises(BundleError, match=r"state\.safetensors: cannot be read as safetensors"):
        load(means)


def test_rows_and_memory_must_fit(head, means, load, edit_manifest):
    (head / "rows.safetensors").write_bytes(save({"replay.z": np.zeros((12, 8), np.uint8), "replay.target": np.zeros(12, np.int64)}))
    edit_manifest(head)
    with pytest.raises(BundleError, match=r"replay: replay\.target: 11 rows fit into 300 bytes, got 12"):
        load(head)
    data = json.loads((head / "manifest.json").read_text())
    edit_manifest(head, replay={**data["replay"], "capacity_bytes": 80})
    with pytest.raises(BundleError, match="replay: capacity_bytes: must be at least 88"):
        load(head)
    edit_manifest(head, replay=data["replay"], replay_file=None)
    assert len(load(head).rows()["replay.target"]) == 0
    with pytest.raises(BundleError, match="rows: the manifest has no replay memory"):
        Learner(read_manifest(means), load(means)._engine, load_file(means / "state.safetensors"), rows={})


def test_initial_rows_are_those_of_the_file(head, load):
    rows = load(head).rows()
    assert rows["replay.target"].tolist() == [0, 1, 1]
    assert rows["replay.z"][:, 0].tolist() == [8, 0, 16]
    assert load(head)._core.memory.generator.counter == 5


def test_engine_names_are_checked(means, load, edit_manifest):
    with pytest.raises(InputError, match="engine: must be one of onnx, executorch, got 'tflite'"):
        load(means, engine="tflite")
    with pytest.raises(BundleError, match="was exported for engine 'onnx', not 'executorch'; pass engine='onnx'"):
        load(means, engine="executorch")
    edit_manifest(means, engine="tflite")
    with pytest.raises(BundleError, match="was exported for engine 'tflite', this package has onnx, executorch; update it"):
        load(means)


def test_a_bundle_is_never_written_to(means, load, stream, tmp_path):
    before = contents(means)
    with load(means, store=tmp_path / "l.db") as learner:
        ids = [learner.learn(x, 1).sample_id for x in stream[0][:5]]
        learner.forget(ids[0])
        learner.save("x")
        learner.rollback("x")
    assert contents(means) == before


def test_the_manifest_survives_a_round_trip(means):
    manifest = read_manifest(means)
    assert to_json(manifest) == (means / "manifest.json").read_text()
    assert manifest.steps["encode"].inputs == (TensorSpec("x", (1, 4, 4), "uint8"),)


def test_the_types_of_tensors_are_one_list_that_the_docstring_repeats():
    assert DTYPES == ("float32", "float64", "int16", "int32", "int64", "uint8", "bool")
    assert all(f"``{name}``" in TensorSpec.__doc__ for name in DTYPES)
    assert all(TensorSpec("x", (2,), name).zeros().dtype == name for name in DTYPES)
