"""Signal handlers that use the learner in the middle of a call of its own."""

import signal
import sqlite3
import threading
from contextlib import contextmanager

import pytest

from edgecl_device import BusyError, ClosedError, Learner, StoreError

VERBS = {
    "save": lambda a, x: a.save(),
    "predict": lambda a, x: a.predict(x),
    "learn": lambda a, x: a.learn(x, 1),
    "forget": lambda a, x: a.forget(0),
    "rollback": lambda a, x: a.rollback(),
    "report": lambda a, x: a.report(),
}


@contextmanager
def handler(call):
    """What the process does on SIGUSR1."""
    before = signal.signal(signal.SIGUSR1, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def learn(learner, stream, start, stop):
    return [learner.learn(stream[0][i], int(stream[1][i])) for i in range(start, stop)]


def signal_behind_the_commit(learner, monkeypatch):
    """A signal comes when the log has the next update, and the state not yet."""
    keep = learner._core.keep

    def late(event, outputs):
        signal.raise_signal(signal.SIGUSR1)
        return keep(event, outputs)

    monkeypatch.setattr(learner._core, "keep", late)


def same_as_uninterrupted(bundle, stream, n, tmp_path):
    learner, other = Learner.load(bundle, store=tmp_path / "l.db"), Learner.load(bundle)
    learn(other, stream, 0, n)
    assert learner.report()["learned"] == learner._store.seq == n
    one, two = learner._core.capture(), other._core.capture()
    assert one.meta == two.meta
    assert all(one.tensors[name].tobytes() == array.tobytes() for name, array in two.tensors.items() if name != "memory.sample_id")
    learner.close()
    return True


@pytest.mark.parametrize("name", ["means", "head"])
def test_close_in_a_handler_lets_the_update_end_and_closes_then(request, name, load, stream, monkeypatch, tmp_path):
    bundle = request.getfixturevalue(name)
    learner = load(bundle, store=tmp_path / "l.db")
    learn(learner, stream, 0, 5)
    waiting = learner.predict(stream[0][50]).sample_id
    signal_behind_the_commit(learner, monkeypatch)
    open_then = []
    with handler(lambda: (learner.close(), open_then.append(learner._closed == ""), learner.close())):
        assert learner.learn(stream[0][5], int(stream[1][5])).label == stream[1][5]
    assert open_then == [True]
    with pytest.raises(ClosedError, match="learner: is closed"):
        learner.report()
    learner.close()
    assert not (tmp_path / "l.db-wal").exists()
    with load(bundle, store=tmp_path / "l.db") as again:
        assert list(again._pending.samples) == [waiting]  # it was closed as always, with a snapshot
    assert same_as_uninterrupted(bundle, stream, 6, tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_any_other_call_in_a_handler_is_refused_and_the_update_goes_on(head, load, stream, monkeypatch, tmp_path, verb):
    learner, found = load(head, store=tmp_path / "l.db"), []

    def call():
        with pytest.raises(BusyError, match=r"running in this thread, and a signal handler may call nothing but close\(\); wait") as error:
            VERBS[verb](learner, stream[0][50])
        found.append(error.type)

    learn(learner, stream, 0, 5)
    signal_behind_the_commit(learner, monkeypatch)
    with handler(call):
        learn(learner, stream, 5, 6)
    monkeypatch.undo()
    assert found == [BusyError]
    learn(learner, stream, 6, 8)
    learner.close()
    assert same_as_uninterrupted(head, stream, 8, tmp_path)


@pytest.mark.parametrize("verb", ["save", "predict"])
def test_a_handler_that_lets_the_refusal_through_closes_the_learner_and_the_next_start_is_whole(
    head, load, stream, monkeypatch, tmp_path, verb
):
    learner = load(head, store=tmp_path / "l.db")
    learn(learner, stream, 0, 5)
    signal_behind_the_commit(learner, monkeypatch)
    with handler(lambda: VERBS[verb](learner, stream[0][50])), pytest.raises(BusyError):
        learn(learner, stream, 5, 6)
    with pytest.raises(ClosedError, match="was closed, as an interrupt came while its store was written"):
        learner.report()
    assert same_as_uninterrupted(head, stream, 6, tmp_path)


class Raising:
    """A database before or after whose next commit a signal handler raises an error."""

    def __init__(self, db, when):
        self.db, self.when = db, when

    def __getattr__(self, name):
        return getattr(self.db, name)

    def execute(self, sql, *values):
        if sql != "COMMIT" or self.when is None:
            return self.db.execute(sql, *values)
        when, self.when = self.when, None
        if when == "after":
            self.db.execute(sql)
        signal.raise_signal(signal.SIGUSR1)
        raise AssertionError


CHANGES = {
    "learn": lambda a, x: a.learn(x, 1),
    "forget": lambda a, x: a.forget(2),
    "relabel": lambda a, x: a.relabel(2, 4),
    "rollback": lambda a, x: a.rollback("three"),
    "add_class": lambda a, x: a.add_class("mug"),
}


@pytest.mark.parametrize("verb", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_that_a_handler_raises_around_the_commit_never_parts_state_and_store(means, load, stream, tmp_path, verb, when):
    def known(a):
        return a.report()["class_counts"], list(a._core.names), {name: array.tobytes() for name, array in a.state().items()}

    def made(store):
        learner = load(means, store=tmp_path / store)
        learn(learner, stream, 0, 3)
        learner.save("three")
        learn(learner, stream, 3, 6)
        return learner

    def fail():
        raise TimeoutError("a watchdog")

    done = made("done.db")
    undone = known(done)
    CHANGES[verb](done, stream[0][6])
    learner = made("l.db")
    learner._store._db = Raising(learner._store._db, when)
    with handler(fail), pytest.raises(TimeoutError):
        CHANGES[verb](learner, stream[0][6])
    if when == "before":  # rolled back as a whole, and the learner goes on
        assert known(learner) == undone
        CHANGES[verb](learner, stream[0][6])
        learner.close()
    else:
        with pytest.raises(ClosedError, match="was closed, as an interrupt came"):
            learner.report()
    assert known(load(means, store=tmp_path / "l.db")) == known(done)


def test_an_error_that_keeps_a_transaction_from_its_end_closes_the_learner(means, load, stream, monkeypatch, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)

    @contextmanager
    def unended(sync=False):
        learner._store._db.execute("BEGIN IMMEDIATE")
        yield
        raise TimeoutError("a watchdog")

    monkeypatch.setattr(learner._store, "transaction", unended)
    with pytest.raises(TimeoutError):
        learner.save()
    with pytest.raises(ClosedError, match="was closed, as an interrupt came"):
        learner.report()
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 3


def test_a_close_that_fails_behind_a_call_leaves_the_calls_result(means, load, stream, monkeypatch, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)
    learner._store._db.execute("CREATE TRIGGER full BEFORE INSERT ON snapshots BEGIN SELECT RAISE(ABORT, 'full'); END")
    signal_behind_the_commit(learner, monkeypatch)
    with handler(learner.close):
        assert learner.learn(stream[0][3], 1).label == 1
    with pytest.raises(ClosedError, match="is closed"):
        learner.report()
    db = sqlite3.connect(tmp_path / "l.db")
    db.execute("DROP TRIGGER full")
    db.close()
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 4


def test_a_second_thread_cannot_close_what_the_first_uses_but_a_handler_of_the_first_can(means, load, stream, monkeypatch, tmp_path):
    learner, found = load(means, store=tmp_path / "l.db"), []

    def close():
        try:
            learner.close()
        except BusyError as error:
            found.append(str(error))

    def in_a_handler():
        other = threading.Thread(target=close)
        other.start()
        other.join(20)
        close()

    signal_behind_the_commit(learner, monkeypatch)
    with handler(in_a_handler):
        learner.learn(stream[0][0], 1)
    assert len(found) == 1 and "another thread is using it" in found[0]
    with pytest.raises(ClosedError):
        learner.report()


def test_a_close_whose_snapshot_fails_outside_of_a_handler_still_says_so(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 1)
    learner._store._db.execute("CREATE TRIGGER full BEFORE INSERT ON snapshots BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(StoreError):
        learner.close()
