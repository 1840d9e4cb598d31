"""Interrupts, threads and refusals in the middle of an update."""

import threading

import numpy as np
import pytest

from edgecl_device import BusyError, ClosedError, PredictionError, StoreFullError, UpdateRefusedError


def learn(learner, stream, start, stop):
    return [learner.learn(stream[0][i], int(stream[1][i])).sample_id for i in range(start, stop)]


def once(monkeypatch, owner, name, when, error=KeyboardInterrupt):
    """Raise an error before or after the next call of a method."""
    real = getattr(owner, name)

    def interrupted(*args, **options):
        if when == "before":
            raise error
        real(*args, **options)
        raise error

    monkeypatch.setattr(owner, name, interrupted)


def same(one, other):
    return all(one[name].tobytes() == array.tobytes() for name, array in other.items() if name != "memory.sample_id")


@pytest.mark.parametrize("store", [None, "l.db"])
def test_an_interrupt_in_the_graph_changes_nothing(head, load, stream, facts, monkeypatch, tmp_path, store):
    learner, other = load(head, store=store and tmp_path / store), load(head)
    for each in (learner, other):
        learn(each, stream, 0, 12)
    before = facts(learner)
    once(monkeypatch, learner._engine, "run", "after")
    with pytest.raises(KeyboardInterrupt):
        learner.predict(stream[0][12])
    run = learner._engine.run
    monkeypatch.undo()
    z = learner.predict(stream[0][12]).sample_id
    monkeypatch.setattr(learner._engine, "run", run)
    with pytest.raises(KeyboardInterrupt):
        learner.learn(z, 1)
    monkeypatch.undo()
    learner._pending.discard(z)
    assert facts(learner) == before
    for each in (learner, other):
        learn(each, stream, 13, 20)
    assert same(learner._core.capture().tensors, other._core.capture().tensors)


# The first three lie behind the commit: the sample is in the log. What is before it is not.
PLACES = {
    "memory": (lambda a: (a._core.memory, "offer", "before"), 4),
    "commit": (lambda a: (a._engine, "commit", "after"), 4),
    "waiting": (lambda a: (a._pending, "discard", "before"), 4),
    "log": (lambda a: (a._store, "append", "after"), 3),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_while_the_store_is_written_closes_the_learner_and_the_next_start_is_whole(
    head, load, stream, monkeypatch, tmp_path, place, error
):
    learner = load(head, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)
    target, expected = PLACES[place]
    once(monkeypatch, *target(learner), error=error)
    with pytest.raises(error):
        learner.learn(stream[0][3], int(stream[1][3]))
    monkeypatch.undo()
    if place == "log" and error is MemoryError:  # rolled back as a whole: it goes on
        learn(learner, stream, 4, 5)
        learner.close()
        assert load(head, store=tmp_path / "l.db").report()["learned"] == 4
        return
    with pytest.raises(ClosedError, match="learner: was closed, as an interrupt came while its store was written; load the bundle"):
        learner.learn(stream[0][4], 1)
    learner.close()
    learner, other = load(head, store=tmp_path / "l.db"), load(head)
    assert learner.report()["learned"] == expected
    learn(other, stream, 0, expected)
    assert same(learner._core.capture().tensors, other._core.capture().tensors)


@pytest.mark.parametrize("verb", ["forget", "relabel", "rollback", "add_class"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_around_the_commit_of_any_change_leaves_a_whole_store(means, load, stream, monkeypatch, tmp_path, verb, when):
    calls = {
        "forget": lambda a: a.forget(2),
        "relabel": lambda a: a.relabel(2, 4),
        "rollback": lambda a: a.rollback("three"),
        "add_class": lambda a: a.add_class("mug"),
    }

    def known(a):
        return a.report()["class_counts"], list(a._core.names), {name: array.tobytes() for name, array in a.state().items()}

    def made(store):
        learner = load(means, store=tmp_path / store)
        learn(learner, stream, 0, 3)
        learner.save("three")
        learn(learner, stream, 3, 6)
        return learner

    done = made("done.db")
    undone = known(done)
    calls[verb](done)
    learner = made("l.db")

    class Interrupting:
        """A database after or before whose commit the user presses Ctrl-C."""

        def __init__(self, db):
            self.db = db

        def __getattr__(self, name):
            return getattr(self.db, name)

        def execute(self, sql, *values):
            if sql == "COMMIT" and when == "before":
                raise KeyboardInterrupt
            result = self.db.execute(sql, *values)
            if sql == "COMMIT":
                raise KeyboardInterrupt
            return result

    learner._store._db = Interrupting(learner._store._db)
    with pytest.raises(KeyboardInterrupt):
        calls[verb](learner)
    with pytest.raises(ClosedError, match="was closed, as an interrupt came"):
        learner.report()
    learner = load(means, store=tmp_path / "l.db")
    assert known(learner) == (known(done) if when == "after" else undone)
    learn(learner, stream, 7, 8)


def test_a_refused_sample_does_not_renew_the_automatic_snapshot_of_a_full_log(means, load, stream, loud, facts, edit_manifest, tmp_path):
    edit_manifest(means, log_capacity_bytes=96 * 10)
    learner = load(means, store=tmp_path / "l.db")
    learner.save()
    learn(learner, stream, 0, 10)  # the log is full now
    before = facts(learner)
    with pytest.raises(UpdateRefusedError):
        learner.learn(loud, 1)
    assert facts(learner) == before
    assert learner.report()["snapshots"] == {"": 0}
    learn(learner, stream, 10, 11)
    assert learner.report()["snapshots"] == {"": 10}  # the log had to drop what came before
    learner.rollback()
    assert learner.report()["learned"] == 10


def test_a_full_disk_under_a_full_log_changes_nothing(head, load, stream, facts, edit_manifest, fill_disk, monkeypatch, tmp_path):
    edit_manifest(head, log_capacity_bytes=96 * 10)
    learner, other = load(head, store=tmp_path / "l.db"), load(head)
    for each in (learner, other):
        learn(each, stream, 0, 10)
    before, pack = facts(learner), type(learner._core.capture()).pack
    monkeypatch.setattr("edgecl_device.snapshot.Snapshot.pack", lambda self: pack(self) + bytes(100_000))
    make_space = fill_disk(learner)
    with pytest.raises(StoreFullError):
        learn(learner, stream, 10, 11)
    assert facts(learner) == before
    make_space()
    monkeypatch.undo()
    for each in (learner, other):
        learn(each, stream, 11, 20)
    assert same(learner._core.capture().tensors, other._core.capture().tensors)


def test_a_call_from_a_second_thread_is_refused_while_the_first_runs(means, load, stream, monkeypatch):
    learner = load(means)
    run, inside, go_on, found = learner._engine.run, threading.Event(), threading.Event(), []

    def slow(step, inputs):
        inside.set()
        assert go_on.wait(20)
        return run(step, inputs)

    monkeypatch.setattr(learner._engine, "run", slow)
    first = threading.Thread(target=lambda: found.append(learner.learn(stream[0][0], 1).label))
    first.start()
    assert inside.wait(20)
    for call in (lambda: learner.learn(stream[0][1], 1), learner.report, learner.close):
        with pytest.raises(BusyError, match="another thread is using it; call it from one thread at a time"):
            call()
    go_on.set()
    first.join(20)
    assert found == [1]
    monkeypatch.undo()
    assert learner.learn(stream[0][1], 1).predicted == 1  # from another thread than the first sample, one after the other
    assert learner.report()["learned"] == 2


def test_scores_that_are_not_finite_are_no_prediction(head, load, stream, facts):
    learner = load(head)
    z = learner._encode(stream[0][0])["z"][0]
    learner._engine.load({**learner.state(), "weight": np.repeat(3e38 * np.sign(z)[:, None], 5, 1).astype(np.float32)})
    before = facts(learner)
    with pytest.raises(PredictionError, match=r"scores: must be finite, got \[.*; the state has grown too large: roll back"):
        learner.predict(stream[0][0])
    assert facts(learner) == before
    with pytest.raises(UpdateRefusedError, match="not finite"):
        learner.learn(stream[0][0], 1, lr=0)
    assert facts(learner)["state.weight"] == before["state.weight"]


def test_scores_below_the_unseen_one_are_still_of_classes_that_were_learned(means, load, stream, monkeypatch):
    learner = load(means)
    run = learner._engine.run

    def low(step, inputs):
        scores = np.array([[-1e30, -3e35, -2e35, -1e30, -1e30]], np.float32)
        return run(step, inputs) | ({"scores": scores} if step != "encode" else {})

    monkeypatch.setattr(learner._engine, "run", low)
    assert learner.predict(stream[0][0]).label == 2
    assert learner.learn(stream[0][0], 1).predicted == 2


def test_a_name_that_reads_as_another_index_is_counted_by_itself(means, load, stream):
    learner = load(means)
    assert learner.add_class("4") == 2
    learner.learn(stream[0][0], 4)
    learner.learn(stream[0][1], "4")
    learner.learn(stream[0][2], "4")
    learner.learn(stream[0][3], 3)
    assert learner.report()["class_counts"] == {"4": 2, "4 (no name)": 1, "3": 1}
