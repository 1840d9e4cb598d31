import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from edgecl_device import (
    ForgetRefusedError,
    InputError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
)


def learn(learner, stream, start, stop):
    return [learner.learn(stream[0][i], int(stream[1][i])).sample_id for i in range(start, stop)]


def core(found, *without):
    """The parts of a learner's facts that do not depend on when snapshots were taken."""
    return {k: v for k, v in found.items() if k not in ("events", "snapshots", "log_bytes", "health", "pending", *without)}


@pytest.mark.parametrize("name", ["means", "head"])
@pytest.mark.parametrize("how", ["crash", "close"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(request, name, how, load, stream, facts, crash, tmp_path):
    bundle = request.getfixturevalue(name)
    whole = load(bundle, store=tmp_path / "whole.db")
    learn(whole, stream, 0, 60)
    whole.add_class("mug")
    learn(whole, stream, 60, 120)
    part = load(bundle, store=tmp_path / "part.db")
    for start, stop in ((0, 1), (1, 37), (37, 60)):
        learn(part, stream, start, stop)
        crash(part) if how == "crash" else part.close()
        part = load(bundle, store=tmp_path / "part.db")
    part.add_class("mug")
    crash(part)
    part = load(bundle, store=tmp_path / "part.db")
    learn(part, stream, 60, 120)
    # Sample ids differ, as a crash uses up the reserved ones.
    assert core(facts(part), "memory.sample_id") == core(facts(whole), "memory.sample_id")
    assert part.report()["class_counts"] == whole.report()["class_counts"]


def test_a_process_killed_in_the_middle_of_a_stream_loses_nothing(head, load, stream, facts, tmp_path):
    code = """
import sys, numpy as np
from edgecl_device import Learner
learner = Learner.load(sys.argv[1], store=sys.argv[2])
data = np.load(sys.argv[3])
while True:
    for x, y in zip(data["x"], data["y"]):
        print(learner.learn(x, int(y)).sample_id, flush=True)
"""
    np.savez(tmp_path / "stream.npz", x=stream[0], y=stream[1])
    arguments = [sys.executable, "-c", code, str(head), str(tmp_path / "l.db"), str(tmp_path / "stream.npz")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(150)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    learner = load(head, store=tmp_path / "l.db")
    done = learner.report()["learned"]
    assert len(told) <= done <= len(told) + 1
    other = load(head)
    for i in range(done):
        other.learn(stream[0][i % 120], int(stream[1][i % 120]))
    assert core(facts(learner)) == core(facts(other))
    new = learner.learn(stream[0][0], 1).sample_id
    assert new > max(told)


def test_recovery_goes_over_snapshots_that_the_log_forced(means, load, stream, facts, crash, edit_manifest, tmp_path):
    edit_manifest(means, log_capacity_bytes=96 * 10)
    learner = load(means, store=tmp_path / "l.db")
    for stop in range(10, 121, 10):
        learn(learner, stream, stop - 10, stop)
        if stop % 30 == 0:
            crash(learner)
            learner = load(means, store=tmp_path / "l.db")
    other = load(means)
    learn(other, stream, 0, 120)
    assert core(facts(learner)) == core(facts(other))
    assert learner._store.log_bytes <= 960


def test_waiting_samples_outlive_a_close_but_not_a_crash(means, load, stream, crash, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    kept = learner.predict(stream[0][0]).sample_id
    learner.close()
    learner = load(means, store=tmp_path / "l.db")
    lost = learner.predict(stream[0][1]).sample_id
    crash(learner)
    learner = load(means, store=tmp_path / "l.db")
    later = learner.predict(stream[0][2]).sample_id
    assert len({kept, lost, later}) == 3
    with pytest.raises(InputError, match=f"{lost} does not wait"):
        learner.learn(lost, 1)
    learner.learn(kept, 1)
    other = load(means)
    other.learn(stream[0][0], 1)
    assert (learner.state()["sum"] == other.state()["sum"]).all()
    crash(learner)
    with pytest.raises(InputError, match=f"{kept} does not wait"):
        load(means, store=tmp_path / "l.db").learn(kept, 1)


def test_close_is_harmless_twice_and_writes_nothing_when_nothing_changed(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)
    learner.close()
    learner.close()
    before = (tmp_path / "l.db").read_bytes()
    with load(means, store=tmp_path / "l.db") as learner:
        assert learner.report()["learned"] == 3
    assert (tmp_path / "l.db").read_bytes() == before


def test_health_is_that_of_the_state(means, load, stream, crash, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learner.save("empty")
    first = learner.learn(stream[0][0], 0).health
    learner.save("one")
    second = learner.learn(stream[0][1], 1).health
    assert first != second and set(first) == {"size"}
    learner.save()
    learner.close()
    learner = load(means, store=tmp_path / "l.db")
    assert learner.report()["health"] == second
    crash(learner)
    learner = load(means, store=tmp_path / "l.db")
    assert learner.report()["health"] == second
    learner.rollback("one")
    assert learner.report()["health"] == first
    learner.rollback("empty")
    assert learner.report()["health"] == {}


def test_a_snapshot_without_health_figures_is_read(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 2)
    old = learner._core.capture()
    del old.meta["health"]
    with learner._store.transaction():
        learner._store.put_snapshot("old", 2, old.pack())
    learner.rollback("old")
    assert learner.report()["health"] == {} and learner.report()["learned"] == 2


@pytest.mark.parametrize("name", ["means", "head"])
@pytest.mark.parametrize("store", [None, "l.db"])
def test_rollback_goes_back_bit_for_bit_and_drops_what_came_later(request, name, store, load, stream, facts, crash, tmp_path):
    bundle = request.getfixturevalue(name)
    learner = load(bundle, store=store and tmp_path / store)
    learn(learner, stream, 0, 10)
    learner.save("ten")
    at_ten = core(facts(learner))
    dropped = learn(learner, stream, 10, 15)
    learner.add_class("mug")
    learner.save("fifteen")
    waiting = learner.predict(stream[0][50]).sample_id
    learner.rollback("ten")
    assert core(facts(learner)) == at_ten
    assert learner.report()["log"]["last_event"] == 10
    with pytest.raises(InputError, match="no snapshot 'fifteen'"):
        learner.rollback("fifteen")
    learner.learn(waiting, 1)
    assert learner.learn(stream[0][51], 1).sample_id > max(dropped)
    if store:
        before = core(facts(learner))
        crash(learner)
        learner = load(bundle, store=tmp_path / store)
        assert core(facts(learner)) == before
    learner.rollback("ten")
    assert core(facts(learner)) == at_ten


def test_rollback_without_a_name_goes_to_the_last_save(means, load, stream, facts):
    learner = load(means)
    with pytest.raises(InputError, match="no snapshot None, there are none; save one first"):
        learner.rollback()
    learn(learner, stream, 0, 5)
    learner.save()
    before = core(facts(learner))
    learn(learner, stream, 5, 9)
    learner.rollback()
    assert core(facts(learner)) == before


OPERATIONS = {
    "learn": lambda learner, x: [learner.learn(x, 1) for _ in range(2000)],
    "save": lambda learner, x: [learner.save(f"name {i}") for i in range(50)],
    "forget": lambda learner, x: [learner.forget(i) for i in range(5)],
    "relabel": lambda learner, x: [learner.relabel(i, 3) for i in range(5)],
    "add_class": lambda learner, x: [learner.add_class(chr(0x1F600 + i) * 200) for i in range(3)],
    "rollback": lambda learner, x: learner.rollback("five"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_full_disk_stops_every_operation_as_a_whole(means, load, stream, facts, crash, fill_disk, monkeypatch, operation, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 5)
    learner.save("five")
    learn(learner, stream, 5, 8)
    if operation in ("forget", "relabel", "rollback"):  # their snapshots take the pages of older ones: make them grow
        pack = type(learner._core.capture()).pack
        monkeypatch.setattr("edgecl_device.snapshot.Snapshot.pack", lambda self: pack(self) + bytes(100_000))
    make_space = fill_disk(learner)
    states = []
    propose = learner._store.transaction

    def noted(**options):
        states.append(facts(learner))
        return propose(**options)

    monkeypatch.setattr(learner._store, "transaction", noted)
    with pytest.raises(StoreFullError, match="no space left"):
        OPERATIONS[operation](learner, stream[0][20])
    assert facts(learner) == states[-1]
    monkeypatch.undo()
    before = core(facts(learner))
    make_space()
    learner.learn(stream[0][21], 2)
    learner.rollback("five")
    crash(learner)
    learner = load(means, store=tmp_path / "l.db")
    assert learner.report()["learned"] == 5
    assert before["state.sum"] != core(facts(learner))["state.sum"]


def test_a_store_of_another_bundle_is_refused_and_left_alone(means, head, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 5)
    learner.close()
    before = (tmp_path / "l.db").read_bytes()
    with pytest.raises(StoreMismatchError, match=r"l\.db: belongs to bundle .*, not to "):
        load(head, store=tmp_path / "l.db")
    assert (tmp_path / "l.db").read_bytes() == before
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 5


def test_a_store_in_use_is_refused_and_a_failed_load_frees_it(means, load, stream, tmp_path, monkeypatch):
    learner = load(means, store=tmp_path / "l.db")
    with pytest.raises(StoreError, match="another learner has it open"):
        load(means, store=tmp_path / "l.db")
    learner.close()
    monkeypatch.setattr("edgecl_device.learner.Core", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(means, store=tmp_path / "l.db")
    monkeypatch.undo()
    load(means, store=tmp_path / "l.db")


@pytest.mark.parametrize("blob", [b"", b"damaged", bytes(200)])
def test_a_damaged_snapshot_is_named(means, load, stream, crash, tmp_path, blob):
    learner = load(means, store=tmp_path / "l.db")
    with learner._store.transaction():
        learner._store.put_snapshot("", 0, blob)
    crash(learner)
    with pytest.raises(StoreError, match="snapshot: is damaged"):
        load(means, store=tmp_path / "l.db")


def test_a_snapshot_that_does_not_fit_is_refused_and_the_learner_goes_on(means, load, stream, facts, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)
    wrong = learner._core.capture()
    wrong.tensors["state.count"] = np.full(5, np.nan, np.float32)
    with learner._store.transaction():
        learner._store.put_snapshot("wrong", 2, wrong.pack())
    before = facts(learner)
    with pytest.raises(StoreError, match=r"snapshot: does not fit the bundle .*count: values must be finite"):
        learner.rollback("wrong")
    assert facts(learner) == before


def test_events_that_cannot_be_replayed_are_named(means, load, stream, loud, crash, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 2)
    event = learner._store.sample(1)
    with learner._store.transaction():
        learner._store.erase(event)
        learner._store.append(dataclasses.replace(event, features=learner._pending.pack(learner._encode(loud))))
    crash(learner)
    with pytest.raises(StoreError, match=r"store: event 2 cannot be replayed .*guard"):
        load(means, store=tmp_path / "l.db")


def test_a_log_too_small_for_one_sample_is_refused_at_load(means, load, edit_manifest, tmp_path):
    edit_manifest(means, log_capacity_bytes=95)
    with pytest.raises(StoreError, match="log_capacity_bytes: must be at least 96 for one sample, got 95"):
        load(means, store=tmp_path / "l.db")


def test_a_torn_write_ahead_log_loses_the_last_samples_and_nothing_else(head, load, stream, facts, tmp_path):
    learner = load(head, store=tmp_path / "l.db")
    learn(learner, stream, 0, 40)
    base, wal = (tmp_path / "l.db").read_bytes(), (tmp_path / "l.db-wal").read_bytes()
    whole, expected = load(head), {}
    for i in range(41):
        expected[i] = core(facts(whole))
        learn(whole, stream, i, i + 1)
    found = []
    for cut in [*range(len(wal) // 3, len(wal), 2_001), len(wal)]:
        (tmp_path / "torn.db").write_bytes(base)
        (tmp_path / "torn.db-wal").write_bytes(wal[:cut])
        torn = load(head, store=tmp_path / "torn.db")
        found.append(torn.report()["learned"])
        assert core(facts(torn)) == expected[found[-1]]
        torn._store.close()
    assert found == sorted(found) and found[-1] == 40 and len(set(found)) > 10


ACTIONS = ("learn", "late", "forget", "relabel", "save", "rollback", "crash", "close")


@pytest.mark.parametrize("seed", range(4))
def test_any_history_with_crashes_sums_up_the_samples_that_are_live(means, load, stream, crash, edit_manifest, seed, tmp_path):
    edit_manifest(means, log_capacity_bytes=96 * 15)
    rng, learner = np.random.default_rng(seed), load(means, store=tmp_path / "l.db")
    z = np.concatenate([learner._encode(x)["z"] for x in stream[0]]).astype(np.float64)
    live, saved, done = {}, {}, set()

    def check():
        total, count = np.zeros((5, 8)), np.zeros(5)
        for i, label, weight in live.values():
            total[label] += weight * z[i]
            count[label] += weight
        assert (learner.state()["sum"] == total).all()
        assert (learner.state()["count"] == count).all()
        labels = [label for _, label, _ in live.values()]
        assert (learner._core.counts == np.bincount(labels, minlength=5)).all()

    for i in range(120):
        action = rng.choice(ACTIONS, p=[0.4, 0.2, 0.1, 0.1, 0.06, 0.04, 0.05, 0.05])
        done.add(str(action))
        label, weight = int(rng.integers(5)), float(rng.integers(1, 4))
        if action in ("learn", "late"):
            source = stream[0][i] if action == "learn" else learner.predict(stream[0][i]).sample_id
            live[learner.learn(source, label, weight=weight).sample_id] = (i, label, weight)
        elif action in ("forget", "relabel") and live:
            sample_id = int(rng.choice(list(live)))
            try:
                learner.forget(sample_id) if action == "forget" else learner.relabel(sample_id, label)
            except ForgetRefusedError as error:
                assert "its cap of 1440 bytes dropped it" in str(error)
                continue
            for samples in (live, *(samples for _, samples in saved.values())):
                if sample_id in samples:
                    if action == "forget":
                        del samples[sample_id]
                    else:
                        samples[sample_id] = (samples[sample_id][0], label, samples[sample_id][2])
        elif action == "save":
            saved[name := f"s{rng.integers(3)}"] = (learner._store.seq, dict(live))
            learner.save(name)
        elif action == "rollback" and saved:
            name = str(rng.choice(list(saved)))
            learner.rollback(name)
            live = dict(saved[name][1])
            saved = {key: value for key, value in saved.items() if value[0] <= saved[name][0]}
        elif action in ("crash", "close"):
            crash(learner) if action == "crash" else learner.close()
            learner = load(means, store=tmp_path / "l.db")
        check()
    assert len(done) == len(ACTIONS) and live
