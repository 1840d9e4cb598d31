"""Damage to a store or a bundle: found, named, and nothing goes on from it."""

import dataclasses
import json
import random
import shutil
import sqlite3

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from edgecl_device import BundleError, EdgeclError, InputError, StoreError
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.event import Event
from edgecl_device.manifest import TensorSpec, read_manifest, sealed
from edgecl_device.snapshot import Snapshot


@pytest.fixture
def closed(head, load, stream, tmp_path):
    """The file of a closed store: ten samples, the last waiting, a named snapshot, three more events."""
    learner = load(head, store=tmp_path / "l.db")
    for i in range(10):
        learner.learn(stream[0][i], int(stream[1][i]))
    learner.predict(stream[0][10])
    learner.save("ten")
    learner.save()
    for i in range(11, 14):
        learner.learn(stream[0][i], int(stream[1][i]))
    learner._store.close()
    return tmp_path / "l.db"


def sql(path, statement, *values):
    db = sqlite3.connect(path)
    db.execute(statement, values)
    db.commit()
    db.close()


def test_the_file_alone_holds_what_was_saved(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    shutil.copy(tmp_path / "l.db", tmp_path / "new.db")
    for i in range(50):
        learner.learn(stream[0][i], int(stream[1][i]))
    learner.save("gold")
    last = learner.predict(stream[0][50]).sample_id
    learner.save()
    state = learner.state()
    shutil.copy(tmp_path / "l.db", tmp_path / "copy.db")
    copy = load(means, store=tmp_path / "copy.db")
    assert copy.report()["learned"] == 50 and copy.report()["snapshots"] == {"": 50, "gold": 50}
    assert all((copy.state()[name] == array).all() for name, array in state.items())
    assert copy.predict(stream[0][51]).sample_id > last
    assert load(means, store=tmp_path / "new.db").report()["snapshots"] == {"": 0}


@pytest.mark.parametrize("size", [0, 1, 511])
def test_a_file_cut_to_nothing_is_not_a_new_store(means, load, tmp_path, size):
    (tmp_path / "l.db").write_bytes(bytes(size))
    with pytest.raises(StoreError, match=rf"l\.db: is damaged \(cut to {size} bytes, what it held is lost\); delete the file \*-wal"):
        load(means, store=tmp_path / "l.db")
    assert (tmp_path / "l.db").read_bytes() == bytes(size)


@pytest.mark.parametrize(("name", "message"), [("", "the automatic snapshot"), ("ten", "snapshot 'ten'")])
@pytest.mark.parametrize("place", [9, 1000, -1])
def test_one_flipped_bit_in_a_snapshot_is_found(head, load, closed, name, message, place):
    whole, db = closed.read_bytes(), sqlite3.connect(closed)
    blob = bytearray(db.execute("SELECT blob FROM snapshots WHERE name = ?", (name,)).fetchone()[0])
    db.close()
    blob[place] ^= 4
    sql(closed, "UPDATE snapshots SET blob = ? WHERE name = ?", bytes(blob), name)
    learner = load(head, store=closed) if name else None
    with pytest.raises(
        StoreError,
        match=rf"is damaged \({message} differs from its CRC-32\); delete the file \*-wal beside the store, .* restore the store from",
    ):
        learner.rollback(name) if learner else load(head, store=closed)
    if learner:
        assert learner.report()["learned"] == 13
        learner._store.close()
    closed.write_bytes(whole)
    load(head, store=closed).rollback("ten")


EVENT_CHANGES = [
    "features = zeroblob(length(features))",
    "features = NULL",
    "features = 'text'",
    "label = label + 1",
    "label = NULL",
    "weight = weight / 2",
    "lr = 0.1",
    "sample_id = sample_id + 1000",
    "kind = 'add_class'",
    "name = 'x'",
    "crc = NULL",
]


@pytest.mark.parametrize("change", EVENT_CHANGES)
def test_a_changed_event_is_found_when_it_is_replayed(head, load, closed, change):
    sql(closed, f"UPDATE events SET {change} WHERE seq = 12")
    with pytest.raises(StoreError, match=r"is damaged \(event 12 differs from its CRC-32\)"):
        load(head, store=closed)


def test_a_changed_event_is_found_when_it_is_to_be_forgotten(means, load, stream, facts, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    sample = learner.learn(stream[0][0], 1).sample_id
    learner._store._db.execute("UPDATE events SET label = 2")
    before = facts(learner)
    with pytest.raises(StoreError, match="event 1 differs"):
        learner.forget(sample)
    assert facts(learner) == before


STORE_CHANGES = {
    "no bundle": ("DELETE FROM meta WHERE key = 'bundle_id'", "bundle_id is missing"),
    "no ids": ("UPDATE meta SET value = 'abc' WHERE key = 'reserved_ids'", "reserved_ids is 'abc'"),
    "float ids": ("UPDATE meta SET value = 1e300 WHERE key = 'reserved_ids'", r"reserved_ids is 1e\+300"),
    "no eviction": ("UPDATE meta SET value = NULL WHERE key = 'evicted_before'", "evicted_before is None"),
    "negative": ("UPDATE meta SET value = -1 WHERE key = 'evicted_before'", "evicted_before is -1"),
    "no automatic": ("DELETE FROM snapshots WHERE name = ''", "the automatic snapshot is missing"),
    "no snapshot": ("DELETE FROM snapshots", "the automatic snapshot is missing"),
    "null": ("UPDATE snapshots SET blob = NULL", "the automatic snapshot differs"),
    "number": ("UPDATE snapshots SET blob = 5", "the automatic snapshot differs"),
    "another": ("UPDATE snapshots SET blob = (SELECT blob FROM snapshots WHERE name = 'ten')", "the automatic snapshot differs"),
    "no seq": ("UPDATE snapshots SET seq = NULL", "a snapshot has no number"),
    "seq": ("UPDATE snapshots SET seq = -5", "the automatic snapshot differs"),
    "no table": ("DROP TABLE events", "no such table"),
    "no Unicode": ("UPDATE snapshots SET name = CAST(x'ff41' AS TEXT) WHERE name = 'ten'", "UTF-8|utf-8"),
}


@pytest.mark.parametrize("case", STORE_CHANGES)
def test_a_changed_store_is_refused(head, load, closed, case):
    statement, message = STORE_CHANGES[case]
    sql(closed, statement)
    with pytest.raises(StoreError, match=message):
        load(head, store=closed)


def test_a_store_without_any_sample_must_have_its_snapshot_too(head, load, stream, tmp_path):
    learner = load(head, store=tmp_path / "l.db")
    learner.predict(stream[0][0])
    learner.close()
    sql(tmp_path / "l.db", "DELETE FROM snapshots")
    with pytest.raises(StoreError, match="the automatic snapshot is missing"):
        load(head, store=tmp_path / "l.db")


def negative(array):
    return -array - 1


SNAPSHOT_CHANGES = {
    "names": (lambda s: s.meta.update(class_names=5), "class_names: must be 5 names or nulls, got 5"),
    "few names": (lambda s: s.meta.update(class_names=["a"]), "class_names: must be 5 names"),
    "numbers for names": (lambda s: s.meta.update(class_names=[1] * 5), "class_names: must be 5 names"),
    "counts": (lambda s: s.meta.update(class_counts=[1]), "class_counts: must be 5 integers"),
    "texts for counts": (lambda s: s.meta.update(class_counts=["a"] * 5), "class_counts: must be 5 integers"),
    "negative counts": (lambda s: s.meta.update(class_counts=[-1] * 5), "class_counts: must be 5 integers"),
    "totals": (lambda s: s.meta.update(totals=[]), "totals and health: must be objects"),
    "no totals": (lambda s: s.meta.update(totals={}), "totals and health: must be objects"),
    "health": (lambda s: s.meta.update(health=3), "totals and health: must be objects"),
    "nothing": (lambda s: s.meta.clear(), "class_names"),
    "no pending": (lambda s: s.tensors.pop("pending.z"), r"pending\.z: is missing"),
    "no waiting ids": (lambda s: s.tensors.pop("pending.sample_id"), r"pending\.sample_id: is missing"),
    "few pending": (lambda s: s.tensors.update({"pending.z": s.tensors["pending.z"][:0]}), r"pending\.z: shape must be \[1, 1, 8\]"),
    "pending float64": (lambda s: s.tensors.update({"pending.z": s.tensors["pending.z"].astype(float)}), r"pending\.z: dtype must be"),
    "slots": (lambda s: s.tensors.update({"memory.slots": s.tensors["memory.slots"] * 0}), r"memory\.slots: must hold every slot"),
    "far slots": (lambda s: s.tensors.update({"memory.slots": s.tensors["memory.slots"] + 9999}), r"memory\.slots: must hold"),
    "starts": (lambda s: s.tensors.update({"memory.starts": s.tensors["memory.starts"] + 7}), r"memory\.starts: must rise from 0"),
    "falling": (lambda s: s.tensors.update({"memory.starts": s.tensors["memory.starts"][::-1]}), r"memory\.starts: must rise from 0"),
    "counters": (lambda s: s.tensors.update({"memory.counters": negative(s.tensors["memory.counters"])}), r"memory\.counters: must be at"),
    "fewer rows": (
        lambda s: s.tensors.update({n: a[:1] for n, a in s.tensors.items() if n in ("memory.row.z", "memory.sample_id")}),
        r"memory\.starts: .* kept slots be below 1",
    ),
}


@pytest.mark.parametrize("case", SNAPSHOT_CHANGES)
def test_a_snapshot_that_another_runner_wrote_wrongly_is_refused(head, load, closed, case):
    """Its CRC is right: what is in it does not fit."""
    change, message = SNAPSHOT_CHANGES[case]
    learner = load(head, store=closed)
    snapshot = Snapshot.unpack(learner._store.snapshot(""))
    change(snapshot)
    with learner._store.transaction():
        learner._store.put_snapshot("", 10, snapshot.pack())
    learner._store.close()
    with pytest.raises(StoreError, match=message):
        load(head, store=closed)


EVENTS = {
    "features": (lambda e: dataclasses.replace(e, features=b"\0"), "features: must be 32 bytes, got 1"),
    "no features": (lambda e: dataclasses.replace(e, features=None), "features: must be 32 bytes, got 0"),
    "weight": (lambda e: dataclasses.replace(e, weight=None), "event 1 cannot be replayed"),
    "class": (lambda e: Event(e.seq, "add_class", label=99, name="q"), "its content does not fit the bundle"),
    "label": (lambda e: dataclasses.replace(e, label=99), "its content does not fit the bundle"),
    "no label": (lambda e: dataclasses.replace(e, label=None), "its content does not fit the bundle"),
}


@pytest.mark.parametrize("case", EVENTS)
def test_an_event_that_does_not_fit_is_refused(means, load, stream, tmp_path, case):
    change, message = EVENTS[case]
    learner = load(means, store=tmp_path / "l.db")
    event = learner._store.sample(learner.learn(stream[0][0], 1).sample_id)
    with learner._store.transaction():
        learner._store.erase(event)
        learner._store.append(change(event))
    learner._store.close()
    with pytest.raises(StoreError, match=message):
        load(means, store=tmp_path / "l.db")


def test_random_damage_raises_no_untyped_error(head, load, closed):
    whole, found = closed.read_bytes(), []
    for seed in range(30):
        numbers, data = random.Random(seed), bytearray(whole)
        for _ in range(20):
            data[numbers.randrange(100, len(data))] = numbers.randrange(256)
        closed.write_bytes(data)
        try:
            learner = load(head, store=closed)
            learner.rollback("ten")
            learner._store.close()
        except EdgeclError as error:
            found.append(type(error))
    assert len(found) > 20 and all(issubclass(kind, StoreError) for kind in found)


NO_MANIFESTS = (b"\xff\xfe{}", b"[" * 200_000, b'{"schema":1,"config":' + b'{"a":' * 100_000, b'{"schema":' + b"9" * 5000 + b"}")


@pytest.mark.parametrize("text", NO_MANIFESTS, ids=["not Unicode", "deep list", "deep object", "long number"])
def test_a_manifest_that_is_no_text_or_no_json_is_named(means, load, text):
    (means / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json: (cannot be read|not valid JSON)"):
        load(means)


def changed(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    data[last] = value


MANIFEST_CHANGES = [
    (("state", 0, "dtype"), "x", "state: dtype of 'sum' must be one of"),
    (("state", 0, "dtype"), "", "state: dtype of 'sum' must be one of"),
    (("state", 0, "shape"), [-5, 8], "state: sizes of 'sum' must be at least 0"),
    (("state", 0, "shape"), [10**30], "state: sizes of 'sum' must be at least 0 and at most"),
    (("state", 0, "name"), "count", "state: tensors must have different names"),
    (("state", 0, "name"), "", "state: tensors must have different names, none of them empty"),
    (("state", 0, "name"), "other", "step '.*': must use tensors of the state"),
    (("state",), [], "must use tensors of the state"),
    (("steps", "learn", "state_in"), ["sum", "mood"], "step 'learn': must use tensors of the state"),
    (("steps", "learn", "state_out"), ["sum", "sum"], "step 'learn': must use tensors of the state, each once"),
    (("steps", "learn", "inputs", 0, "shape"), [1, 10**13], "step 'learn': sizes of 'z'"),
    (("target",), "class", "target: expected an object"),
    (("target", "kind"), "box", "target must be one of class, vector"),
    (("target", "shape"), [5], "target must be one of"),
    (("target", "ignore"), 2, "target must be one of"),
    (("target", "threshold"), 0.5, "target must be one of"),
    (("target",), {"kind": "vector", "shape": [1, 5], "dtype": "float64"}, "target must be one of"),
    (("target",), {"kind": "map", "shape": [1, 0, 2]}, "target must be one of"),
    (("target",), {"kind": "map", "shape": [1, 2, 2]}, "step '.*': the loop cannot feed .*'target'"),
    (("max_classes",), 0, "max_classes in"),
    (("max_classes",), 10**30, "max_classes in"),
    (("pending_capacity",), -1, "pending_capacity at least 0"),
    (("learning_rate",), -1.0, "manifest: learning_rate: must be finite"),
    (("learning_rate",), 1e39, "manifest: learning_rate: must be finite"),
    (("learning_rate",), float("nan"), "learning_rate: expected a finite number, got nan"),
    (("learning_rate",), 10**310, "learning_rate: expected a finite number, got 1000"),
]


@pytest.mark.parametrize(("path", "value", "message"), MANIFEST_CHANGES, ids=range(len(MANIFEST_CHANGES)))
def test_a_manifest_of_absurd_values_is_refused_before_any_graph(means, load, monkeypatch, path, value, message):
    data = json.loads((means / "manifest.json").read_text())
    changed(data, path, value)
    (means / "manifest.json").write_text(json.dumps(sealed(data)))
    monkeypatch.setattr("edgecl_device.learner.ENGINES", {"onnx": lambda *args: 1 / 0})
    with pytest.raises(BundleError, match=message):
        load(means)


def test_sizes_that_the_files_do_not_have_are_refused_before_anything_is_allocated(means, load, monkeypatch):
    data = json.loads((means / "manifest.json").read_text())
    data["state"][0]["shape"] = [1 << 39]
    (means / "manifest.json").write_text(json.dumps(sealed(data)))
    monkeypatch.setattr(OnnxEngine, "_allocate", lambda *args: 1 / 0)
    with pytest.raises(BundleError, match=r"state: sum: shape must be \[549755813888\], got \[5, 8\]"):
        load(means)
    with pytest.raises(BundleError, match=r"encode\.onnx: input 'x' must be .*549755813888.*, got .*; export the bundle again"):
        OnnxEngine(means, dataclasses.replace(read_manifest(means), steps=huge(read_manifest(means))))
    monkeypatch.undo()
    with pytest.raises(BundleError, match=r"input 'state\.sum' must be .*549755813888"):
        OnnxEngine(means, read_manifest(means))


def huge(manifest):
    return {"encode": dataclasses.replace(manifest.steps["encode"], inputs=(TensorSpec("x", (1 << 39,), "uint8"),))}


def test_a_machine_without_memory_for_a_tensor_is_a_typed_error(means, monkeypatch):
    engine = OnnxEngine(means, read_manifest(means))

    class NoMemory:
        class OrtValue:
            @staticmethod
            def ortvalue_from_shape_and_type(shape, dtype):
                raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(engine, "_ort", NoMemory)
    with pytest.raises(BundleError, match="z: this machine has no memory for its 4096 bytes; use a smaller model"):
        engine._allocate(TensorSpec("z", (1024,), "float32"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": -40}, "replay: seen: must be at least the 3 rows kept"),
        ({"seen": 2}, "replay: seen: must be at least the 3 rows kept"),
        ({"seen": 10**30}, "replay: seen: must be"),
        ({"counter": 1 << 65}, "replay: seen: .* counter below"),
        ({"counter": -1}, "replay: counter: must be in"),
        ({"seed": 1 << 64}, "replay: seed: must be in"),
        ({"capacity_bytes": 10**15}, "replay: capacity_bytes: must be at most"),
        ({"capacity_bytes": 10**30}, "replay: capacity_bytes: must be at most"),
        ({"rows_per_step": 10**30}, "sizes of|rows_per_step|cannot feed"),
    ],
)
def test_a_replay_memory_of_absurd_values_is_refused(head, load, edit_manifest, change, message):
    data = json.loads((head / "manifest.json").read_text())
    edit_manifest(head, replay={**data["replay"], **change})
    with pytest.raises(BundleError, match=message):
        load(head)


OUTSIDE = ["../outside", "/etc/hostname", "a\0b", "a" * 5000, "sub/learn.onnx", "..", ".hidden", "", "a\\b"]


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_names_that_leave_the_folder_are_refused(means, load, name):
    data = json.loads((means / "manifest.json").read_text())
    data["files"][name] = {"sha256": "0", "bytes": 1}
    (means / "manifest.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(BundleError, match=r"manifest\.json: files: names must be of letters, digits, .*, at most 200, got") as found:
        load(means)
    assert len(str(found.value)) < 250


@pytest.mark.parametrize("name", ["weights.bin", "sub/weights.bin"])
def test_a_file_that_the_manifest_does_not_name_is_refused(means, load, name):
    (means / name).parent.mkdir(exist_ok=True)
    (means / name).write_bytes(b"what a graph may read")
    with pytest.raises(BundleError, match=rf"'{name}' has no entry in files, .*; move it elsewhere, or copy the bundle again"):
        load(means)
    (means / name).unlink()
    (means / ".DS_Store").write_bytes(b"left by a file manager")
    load(means)


def test_a_store_inside_of_the_bundle_is_refused_at_once(means, load):
    with pytest.raises(InputError, match="store: must be outside of the bundle"):
        load(means, store=means / "l.db")
    assert not (means / "l.db").exists()


def test_a_state_of_types_that_numpy_lacks_is_named(means, load, edit_manifest):
    content = save(load_file(means / "state.safetensors"))
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for entry in header.values():
        entry.update(dtype="BF16", shape=[*entry["shape"], 2])
    text = json.dumps(header).encode()
    (means / "state.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])
    edit_manifest(means)
    # where another package has taught numpy the type, it is the check of the state that refuses it
    with pytest.raises(BundleError, match=r"state\.safetensors: cannot be read|state: sum: "):
        load(means)


def test_a_memory_goes_on_beyond_what_the_generator_can_draw_from(head, load, stream, edit_manifest):
    data = json.loads((head / "manifest.json").read_text())
    edit_manifest(head, replay={**data["replay"], "seen": (1 << 32) - 1})
    learner = load(head)
    for i in range(20):
        learner.learn(stream[0][i], int(stream[1][i]))
    assert learner._core.memory.seen == (1 << 32) + 19
    assert len(learner.rows()["replay.target"]) == learner._core.memory.rows == 11
    assert np.isfinite(learner.state()["weight"]).all()
