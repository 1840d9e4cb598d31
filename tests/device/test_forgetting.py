"""Forgetting and relabelling: as if never learned, and nothing left on the disk, or a word about it."""

import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from edgecl_device import ForgetRefusedError, InputError, StepMissingError, StoreError, StoreFullError, UpdateRefusedError


def learn(learner, stream, start, stop):
    return [learner.learn(stream[0][i], int(stream[1][i])).sample_id for i in range(start, stop)]


def core(found, *without):
    """The parts of a learner's facts that do not depend on when snapshots were taken."""
    return {k: v for k, v in found.items() if k not in ("events", "snapshots", "log_bytes", "health", "pending", *without)}


@pytest.mark.parametrize("store", [None, "l.db"])
def test_forgetting_equals_never_having_learned(means, load, stream, facts, crash, tmp_path, store):
    learner = load(means, store=store and tmp_path / store)
    ids = learn(learner, stream, 0, 40)
    for i in (3, 17, 39):
        learner.forget(ids[i])
    other = load(means)
    for i in set(range(40)) - {3, 17, 39}:
        other.learn(stream[0][i], int(stream[1][i]))
    assert core(facts(learner), "meta") == core(facts(other), "meta")
    assert learner.report()["class_counts"] == other.report()["class_counts"]
    assert learner.report()["forgotten"] == 3
    if store:
        before = facts(learner)
        crash(learner)
        assert core(facts(load(means, store=tmp_path / store))) == core(before)


def test_named_snapshots_forget_too(means, load, stream, facts, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 10)
    learner.save("ten")
    learn(learner, stream, 10, 20)
    learner.save("twenty")
    learner.forget(ids[4])
    learner.rollback("ten")
    other = load(means)
    for i in set(range(10)) - {4}:
        other.learn(stream[0][i], int(stream[1][i]))
    assert core(facts(learner), "meta") == core(facts(other), "meta")
    with pytest.raises(ForgetRefusedError, match=f"forget: sample {ids[4]} was not learned, or is forgotten already"):
        learner.forget(ids[4])


def test_a_snapshot_from_before_the_sample_is_left_alone(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 5)
    learner.save("early")
    blob = learner._store.snapshot("early")
    later = learn(learner, stream, 5, 10)
    learner.forget(later[0])
    assert learner._store.snapshot("early") == blob


def test_relabelling_equals_having_learned_the_other_label(means, load, stream, facts, crash, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 20)
    learner.save("twenty")
    learner.relabel(ids[6], "dog")
    learner.relabel(ids[6], 4)
    learner.relabel(ids[7], int(stream[1][7]))
    other = load(means)
    labels = stream[1].copy()
    labels[6] = 4
    learn(other, (stream[0], labels), 0, 20)
    assert core(facts(learner), "meta") == core(facts(other), "meta")
    assert learner.report()["class_counts"] == other.report()["class_counts"]
    learner.rollback("twenty")
    assert core(facts(learner), "meta") == core(facts(other), "meta")
    crash(learner)
    learner = load(means, store=tmp_path / "l.db")
    learner.forget(ids[6])  # with the label it has now
    assert learner.report()["class_counts"].get("4", 0) == int((labels[:20] == 4).sum()) - 1


def test_relabel_refuses_bad_labels_and_unknown_samples(means, load, stream, facts):
    learner = load(means)
    ids = learn(learner, stream, 0, 3)
    before = facts(learner)
    with pytest.raises(InputError, match=r"y: must be in \[0, 5\)"):
        learner.relabel(ids[0], 5)
    with pytest.raises(ForgetRefusedError, match="relabel: sample 77 was never handed out"):
        learner.relabel(77, 1)
    assert facts(learner) == before


@pytest.mark.parametrize("store", [None, "l.db"])
def test_what_the_log_dropped_cannot_be_forgotten(means, load, stream, facts, edit_manifest, tmp_path, store):
    edit_manifest(means, log_capacity_bytes=96 * 10)
    learner = load(means, store=store and tmp_path / store)
    ids = learn(learner, stream, 0, 40)
    before = facts(learner)
    with pytest.raises(ForgetRefusedError, match=f"sample {ids[0]} is not in the log any more: its cap of 960 bytes dropped it"):
        learner.forget(ids[0])
    for wrong, message in (
        (ids[-1] + 1, "was never handed out"),
        (-1, "was never handed out"),
        (2**70, "was never handed out"),
    ):
        with pytest.raises(ForgetRefusedError, match=message):
            learner.forget(wrong)
    with pytest.raises(InputError, match="sample_id: must be an integer"):
        learner.forget("3")
    assert facts(learner) == before
    learner.forget(ids[-1])


def test_a_refused_forget_changes_nothing_not_even_a_snapshot(means, load, stream, facts, monkeypatch, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 6)
    learner.save("six")
    learn(learner, stream, 6, 9)
    before, run, runs = facts(learner), learner._engine.run, []

    def refuse_the_second(step, inputs):
        runs.append(step)
        return run(step, inputs) | ({"guard": np.False_} if len(runs) == 2 else {})

    monkeypatch.setattr(learner._engine, "run", refuse_the_second)
    with pytest.raises(UpdateRefusedError, match=f"forget: refused for sample {ids[0]}: the method's guard failed"):
        learner.forget(ids[0])
    assert runs == ["forget", "forget"]
    assert facts(learner) == before
    monkeypatch.setattr(learner._engine, "run", lambda step, inputs: run(step, inputs) | {"guard": np.False_})
    with pytest.raises(UpdateRefusedError, match=f"sample {ids[0]} in snapshot 'six'"):
        learner.forget(ids[0])
    assert facts(learner) == before


def test_forget_needs_a_method_that_forgets_exactly(means, load, stream, edit_manifest):
    edit_manifest(means, forgets=False)
    learner = load(means)
    ids = learn(learner, stream, 0, 1)
    with pytest.raises(StepMissingError, match="means does not forget exactly"):
        learner.forget(ids[0])


def on_disk(folder, data):
    return data in b"".join(path.read_bytes() for path in folder.glob("l.db*"))


def test_a_forgotten_samples_features_are_in_no_file(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 5)
    waiting = learner.predict(stream[0][7]).sample_id
    learner.save("middle")
    features = learner._pending.pack(learner._encode(stream[0][2]))

    assert on_disk(tmp_path, features)
    assert learner.forget(ids[2]) is True
    assert not on_disk(tmp_path, features)
    later = learner._pending.pack(learner._pending.get(waiting))
    assert on_disk(tmp_path, later)
    learner.learn(waiting, 1)
    assert learner.forget(waiting) is True
    assert not on_disk(tmp_path, later)


@pytest.mark.parametrize("saved", [False, True])
def test_predict_then_learn_then_forget_leaves_no_features(means, load, stream, crash, tmp_path, saved):
    learner = load(means, store=tmp_path / "l.db")
    seen = learner.predict(stream[0][0])
    again = learner.predict(stream[0][0])
    other = learner.predict(stream[0][1])
    features = learner._pending.pack(learner._pending.get(seen.sample_id))
    if saved:
        learner.save()
        assert on_disk(tmp_path, features)
    report = learner.learn(stream[0][0], int(stream[1][0]))
    assert learner.forget(report.sample_id) is True
    assert not on_disk(tmp_path, features)
    assert list(learner._pending.samples) == [other.sample_id]
    for waited in (seen, again):
        with pytest.raises(InputError, match="does not wait"):
            learner.learn(waited.sample_id, 1)
        with pytest.raises(ForgetRefusedError, match=r"was not learned, .*; what a file may still hold of it goes with the next save"):
            learner.forget(waited.sample_id)
    crash(learner)
    learner = load(means, store=tmp_path / "l.db")
    assert list(learner._pending.samples) == [other.sample_id]
    learner.learn(other.sample_id, 1)
    learner.close()
    assert not on_disk(tmp_path, features)


@pytest.mark.parametrize("name", ["means", "head"])
@pytest.mark.parametrize("store", [None, "l.db"])
def test_a_sample_that_only_waits_is_discarded_whatever_the_method(request, name, store, load, stream, facts, crash, tmp_path):
    bundle = request.getfixturevalue(name)
    learner = load(bundle, store=store and tmp_path / store)
    learn(learner, stream, 0, 3)
    seen, _alike, other = (learner.predict(stream[0][i]) for i in (10, 10, 11))
    learner.save()
    features = learner._pending.pack(learner._pending.get(seen.sample_id))
    before = core(facts(learner))
    assert learner.forget(seen.sample_id) is True
    assert core(facts(learner)) == before
    assert list(learner._pending.samples) == [other.sample_id]
    assert features not in learner._store.snapshot("")
    if store:
        assert not on_disk(tmp_path, features)
        crash(learner)
        learner = load(bundle, store=tmp_path / store)
        assert core(facts(learner)) == before and list(learner._pending.samples) == [other.sample_id]


def test_a_sample_that_waits_stays_when_its_discarding_fails(means, load, stream, facts, fill_disk, monkeypatch, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 3)
    seen = learner.predict(stream[0][0])
    learner.save()
    before, pack = facts(learner), type(learner._core.capture()).pack
    make_space = fill_disk(learner)
    monkeypatch.setattr("edgecl_device.snapshot.Snapshot.pack", lambda self: pack(self) + bytes(100_000))
    for sample_id in (seen.sample_id, ids[0]):
        with pytest.raises(StoreFullError):
            learner.forget(sample_id)
        assert facts(learner) == before and learner.report()["log"]["erased"] is True
    monkeypatch.undo()
    make_space()
    assert learner.forget(ids[0]) is True
    assert not learner._pending.samples


def test_what_was_rolled_back_is_in_no_file(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)
    learner.save("three")
    ids = learn(learner, stream, 3, 9)
    learner.save("nine")
    dropped = [learner._store.sample(i).features for i in ids]
    assert all(on_disk(tmp_path, features) for features in dropped)
    learner.rollback("three")
    assert learner.report()["log"]["erased"] is True
    assert not any(on_disk(tmp_path, features) for features in dropped)
    with pytest.raises(ForgetRefusedError, match="or was rolled back: there is nothing to change"):
        learner.forget(ids[0])


def test_a_rollback_that_cannot_erase_says_so_until_it_can(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learner.save("empty")
    features = learner._store.sample(learn(learner, stream, 0, 1)[0]).features
    learner._store._db = failing = FoldsFail(learner._store._db, sqlite3.SQLITE_FULL)
    learner.rollback("empty")
    assert learner.report()["log"]["erased"] is False and on_disk(tmp_path, features)
    failing.code = None
    learn(learner, stream, 1, 2)
    assert learner.report()["log"]["erased"] is True and not on_disk(tmp_path, features)


def test_what_the_cap_dropped_leaves_the_files_with_the_next_save(means, load, stream, edit_manifest, tmp_path):
    edit_manifest(means, log_capacity_bytes=96 * 9)
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 1)
    features = learner._store.sample(ids[0]).features
    learn(learner, stream, 1, 40)
    assert on_disk(tmp_path, features)
    with pytest.raises(
        ForgetRefusedError, match=r"its cap of 864 bytes dropped it .*, so that it stays learned; .* next save\(\)\. Export"
    ):
        learner.forget(ids[0])
    learner.save()
    assert not on_disk(tmp_path, features)


def test_a_process_killed_after_forgetting_leaves_no_features_behind_the_next_start(means, load, stream, tmp_path):
    code = """
import os, signal, sys, numpy as np
from edgecl_device import Learner
from edgecl_device.store import Store
learner = Learner.load(sys.argv[1], store=sys.argv[2])
data, fold = np.load(sys.argv[3]), Store.fold
ids = [learner.learn(x, int(y)).sample_id for x, y in zip(data["x"][:5], data["y"])]
Store.fold = lambda store, force=False: os.kill(os.getpid(), signal.SIGKILL) if force else fold(store)
learner.forget(ids[2])
"""
    np.savez(tmp_path / "stream.npz", x=stream[0], y=stream[1])
    arguments = [sys.executable, "-c", code, str(means), str(tmp_path / "l.db"), str(tmp_path / "stream.npz")]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    other = load(means)
    features = other._pending.pack(other._encode(stream[0][2]))
    assert on_disk(tmp_path, features)  # in the write-ahead log
    learner = load(means, store=tmp_path / "l.db")
    assert not on_disk(tmp_path, features)
    assert learner.report()["log"]["erased"] is True
    for i in (0, 1, 3, 4):
        other.learn(stream[0][i], int(stream[1][i]))
    assert learner.report()["class_counts"] == other.report()["class_counts"]
    assert all((learner.state()[name] == array).all() for name, array in other.state().items())
    assert learner.report()["forgotten"] == 1


class FoldsFail:
    """A database whose write-ahead log cannot be moved into the file."""

    def __init__(self, db, code):
        self.db, self.code = db, code

    def __getattr__(self, name):
        return getattr(self.db, name)

    def execute(self, sql, *values):
        if "wal_checkpoint" in sql and self.code == sqlite3.SQLITE_BUSY:
            return self.db.execute("SELECT 1, -1, -1")  # that is how SQLite says it; no error
        if "wal_checkpoint" in sql and self.code is not None:
            error = sqlite3.OperationalError("it failed")
            error.sqlite_errorcode = self.code
            raise error
        return self.db.execute(sql, *values)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR])
def test_forget_tells_when_the_disk_still_holds_the_sample(means, load, stream, facts, tmp_path, code):
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 5)
    features = learner._pending.pack(learner._encode(stream[0][2]))
    learner._store._db = failing = FoldsFail(learner._store._db, code)
    assert learner.forget(ids[2]) is False
    assert learner.report()["forgotten"] == 1
    assert learner.report()["log"]["erased"] is False and on_disk(tmp_path, features)
    before = facts(learner)
    if code != sqlite3.SQLITE_IOERR:
        learn(learner, stream, 5, 6)  # goes on, and tries again
    else:
        with pytest.raises(StoreError, match="SQLite failed"):
            learn(learner, stream, 5, 6)
        assert facts(learner) == before
    assert learner.report()["log"]["erased"] is False
    failing.code = None
    learn(learner, stream, 6, 7)
    assert learner.report()["log"]["erased"] is True and not on_disk(tmp_path, features)
    assert learner.forget(ids[3]) is True


def test_a_start_on_a_full_disk_goes_on_and_tells_that_something_may_be_left(means, load, stream, crash, tmp_path, monkeypatch):
    learner = load(means, store=tmp_path / "l.db")
    ids = learn(learner, stream, 0, 5)
    features = learner._pending.pack(learner._encode(stream[0][2]))
    monkeypatch.setattr("edgecl_device.store.Store.fold", lambda store, force=False: None)
    learner.forget(ids[2])
    for path in tmp_path.glob("l.db*"):  # as a process that died leaves them
        (tmp_path / path.name.replace("l.db", "left.db")).write_bytes(path.read_bytes())
    learner.close()
    monkeypatch.undo()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: FoldsFail(connect(*args, **options), sqlite3.SQLITE_FULL))
    learner = load(means, store=tmp_path / "left.db")
    assert learner.report()["forgotten"] == 1 and learner.report()["log"]["erased"] is False
    learner._store._db.code = None
    learner.save()
    assert learner.report()["log"]["erased"] is True
    assert features not in b"".join(path.read_bytes() for path in tmp_path.glob("left.db*"))
