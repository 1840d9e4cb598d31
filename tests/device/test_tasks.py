"""Tasks: each its own blob, crash-safe, and none ever touched by what happens to another."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from edgecl_device import BundleError, ClosedError, InputError, Learner, StepMissingError, StoreError, StoreFullError, cli
from edgecl_device.snapshot import Snapshot

TASKS = {"first": "base", "fresh": ["bias"]}
HIDDEN = ("events", "snapshots", "log_bytes", "health", "pending", "memory.sample_id")
"""What depends on when snapshots were taken, or on ids that a crash has used up."""


@pytest.fixture
def tasks(head, edit_manifest):
    """The bundle that trains a softmax head with replay, its state said to be one task's."""
    edit_manifest(head, tasks=TASKS)
    return head


def learn(learner, stream, start, stop):
    for i in range(start, stop):
        learner.learn(stream[0][i], int(stream[1][i]))


def present(facts, learner):
    """All that a learner knows, the tasks that are not in use among it."""
    own = {name: learner._journal.task(name) for name in learner.tasks()}
    return {**{key: value for key, value in facts(learner).items() if key not in HIDDEN}, "tasks": own}


def blobs(path):
    """The bytes of every version of every task in a store's file."""
    with closing(sqlite3.connect(path)) as db:
        return {(name, seq): blob for name, seq, blob in db.execute("SELECT name, seq, blob FROM task_blobs")}


def play(learner, stream, part=slice(None)):
    """A life with three tasks: parts that can be interrupted between any two."""
    steps = [
        lambda: learn(learner, stream, 0, 5),
        lambda: learner.add_task("two"),
        lambda: learn(learner, stream, 5, 8),
        lambda: learner.switch_task("two"),
        lambda: learner.add_class("mug"),
        lambda: learn(learner, stream, 8, 20),
        lambda: learner.add_task("three", like="two"),
        lambda: learner.switch_task("base"),
        lambda: learn(learner, stream, 20, 24),
        lambda: learner.switch_task("three"),
        lambda: learn(learner, stream, 24, 30),
        lambda: learner.switch_task("two"),
        lambda: learn(learner, stream, 30, 33),
        lambda: learner.drop_task("three"),
        lambda: learner.add_task("three", like="base"),
        lambda: learner.switch_task("three"),
        lambda: learn(learner, stream, 33, 36),
    ]
    for step in steps[part]:
        step()
    return len(steps)


def test_a_task_is_what_it_was_when_it_was_left(tasks, load, stream):
    learner, other = load(tasks), load(tasks)
    learn(learner, stream, 0, 10)
    left = learner.state()
    learner.add_task("two")
    assert learner.task == "base" and list(learner.tasks()) == ["base", "two"]
    learner.switch_task("two")
    start = other.state()
    assert learner.state()["weight"].tobytes() == start["weight"].tobytes()
    assert not learner.state()["bias"].any(), "fresh"
    assert learner.predict(stream[0][0]).class_name is None, "names of classes are a task's own"
    assert learner.report()["class_counts"] == {} and learner.rows()["replay.target"].size == 0
    learn(learner, stream, 10, 20)
    assert learner.tasks()["two"].class_counts == learner.report()["class_counts"]
    learner.switch_task("base")
    assert {name: array.tobytes() for name, array in learner.state().items()} == {name: array.tobytes() for name, array in left.items()}
    assert learner.predict(stream[0][0]).class_name in ("cat", "dog", None)
    assert learner.report()["task"] == "base" and learner.report()["tasks"] == ["base", "two"]
    before = learner.report()["log"]["last_event"]
    learner.switch_task("base")
    assert learner.report()["log"]["last_event"] == before, "nothing to do"


def test_a_copy_is_the_other_task_with_its_classes(tasks, load, stream):
    learner = load(tasks)
    learn(learner, stream, 0, 10)
    learner.add_class("mug")
    learner.add_task("copy", like="base")
    learn(learner, stream, 10, 12)
    learner.switch_task("copy")
    other = load(tasks)
    learn(other, stream, 0, 10)
    assert learner.state()["weight"].tobytes() == other.state()["weight"].tobytes()
    assert learner._core.names == ["cat", "dog", None, None, "mug"]
    assert (learner._core.counts == other._core.counts).all()


def test_what_happens_to_one_task_leaves_the_bytes_of_all_others(tasks, load, stream, tmp_path):
    path = tmp_path / "l.db"
    learner = load(tasks, store=path)
    for name in ("two", "three", "four"):
        learner.add_task(name)
        learner.switch_task(name)
        learn(learner, stream, 0, 7)
    learner.switch_task("base")
    learner.save()
    learner._store.close()
    kept = {key: blob for key, blob in blobs(path).items() if key[0] in ("two", "three")}
    assert len(kept) == 2
    for change in (
        lambda a: learn(a, stream, 20, 30),
        lambda a: a.add_task("five", like="four"),
        lambda a: (a.switch_task("four"), learn(a, stream, 30, 34), a.switch_task("base")),
        lambda a: a.drop_task("five"),
        lambda a: (a.switch_task("two"), a.switch_task("base")),  # nothing was learned in it: it is not written either
    ):
        learner = load(tasks, store=path)
        change(learner)
        learner._store.close()
        assert {key: blob for key, blob in blobs(path).items() if key[0] in ("two", "three")} == kept


def test_versions_that_nothing_needs_are_deleted(tasks, load, stream, tmp_path):
    path = tmp_path / "l.db"
    learner = load(tasks, store=path)
    learner.add_task("two")
    for i in range(12):
        learner.switch_task("two" if i % 2 == 0 else "base")
        learn(learner, stream, 3 * i, 3 * i + 3)
        learner.save()
    assert len(learner._store._db.execute("SELECT * FROM task_blobs").fetchall()) == 2
    learner.drop_task("two")
    learner.save()
    assert learner._store._db.execute("SELECT name FROM task_blobs").fetchall() == [("base",)]
    learner.close()
    assert b"state.weight" in path.read_bytes()


@pytest.mark.parametrize("how", ["crash", "close", "small log"])
def test_a_resumed_run_over_switches_equals_an_uninterrupted_one(tasks, load, stream, facts, crash, edit_manifest, how, tmp_path):
    if how == "small log":  # automatic snapshots fall between any two events
        edit_manifest(tasks, log_capacity_bytes=110 * 3)
    whole = load(tasks, store=tmp_path / "whole.db")
    steps = play(whole, stream)
    part = load(tasks, store=tmp_path / "part.db")
    for i in range(steps):
        play(part, stream, slice(i, i + 1))
        part.close() if how == "close" else crash(part)
        part = load(tasks, store=tmp_path / "part.db")
    assert present(facts, part) == present(facts, whole)
    crash(whole)
    assert present(facts, load(tasks, store=tmp_path / "whole.db")) == present(facts, part), "all events at once"


def test_a_process_killed_between_switches_loses_nothing(tasks, load, stream, facts, tmp_path):
    code = """
import sys, numpy as np
from edgecl_device import Learner
learner = Learner.load(sys.argv[1], store=sys.argv[2])
data = np.load(sys.argv[3])
learner.add_task("two")
print("added", flush=True)
for i in range(10**9):
    learner.switch_task("two" if i % 2 == 0 else "base")
    for j in range(3):
        learner.learn(data["x"][(3 * i + j) % 120], int(data["y"][(3 * i + j) % 120]))
        print("learned", flush=True)
"""
    np.savez(tmp_path / "stream.npz", x=stream[0], y=stream[1])
    arguments = [sys.executable, "-c", code, str(tasks), str(tmp_path / "l.db"), str(tmp_path / "stream.npz")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(100):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.read()
    learner = load(tasks, store=tmp_path / "l.db")
    done, other = learner.report()["learned"], load(tasks)
    assert done >= 99
    other.add_task("two")
    for i in range(done):
        if i % 3 == 0:
            other.switch_task("two" if i % 6 == 0 else "base")
        other.learn(stream[0][i % 120], int(stream[1][i % 120]))
    if learner.task != other.task:  # killed right behind a switch
        other.switch_task(learner.task)
    assert present(facts, learner) == present(facts, other)


@pytest.mark.parametrize("store", [None, "l.db"])
def test_a_rollback_brings_back_the_tasks_as_they_were(tasks, load, stream, facts, crash, store, tmp_path):
    path = store and tmp_path / store
    learner = load(tasks, store=path)
    learner.add_task("two")
    learn(learner, stream, 0, 5)
    learner.switch_task("two")
    learn(learner, stream, 5, 9)
    learner.save("then")
    then = present(facts, learner)
    for name in ("base", "two", "base"):
        learner.switch_task(name)
        learn(learner, stream, 9, 14)
    learner.add_task("three", like="base")
    learner.drop_task("two")
    learner.save("later")
    assert list(learner.tasks()) == ["base", "three"]
    learner.rollback("then")
    assert present(facts, learner) == then
    if path:
        crash(learner)
        learner = load(tasks, store=path)
        assert present(facts, learner) == then
    learner.switch_task("base")
    learner.drop_task("two")
    learner.rollback("then")
    assert present(facts, learner) == then


def test_another_task_predicts_without_being_switched_to(tasks, load, stream, facts):
    learner = load(tasks)
    learn(learner, stream, 0, 10)
    own = learner.predict(stream[0][50])
    learner.add_task("two")
    learner.switch_task("two")
    learn(learner, stream, 10, 40)
    before = facts(learner)
    seen = learner.predict(stream[0][50], task="base")
    assert seen.scores.tobytes() == own.scores.tobytes() and seen.class_name == own.class_name
    learner._pending.discard(seen.sample_id)
    assert facts(learner) == before and learner.task == "two"
    assert learner.predict(stream[0][50], task="two").scores.tobytes() == learner.predict(stream[0][50]).scores.tobytes()


def test_what_does_not_fit_is_refused_and_changes_nothing(tasks, means, load, stream, facts):
    learner = load(tasks)
    learner.add_task("two")
    before = facts(learner)
    for call, match in (
        (lambda: learner.add_task("two"), r"^name: task 'two' exists; switch to it"),
        (lambda: learner.add_task("base"), r"^name: task 'base' exists"),
        (lambda: learner.add_task(""), r"^name: must be a string of 1 to 200"),
        (lambda: learner.add_task("three", like="four"), r"^like: no task 'four', there are \['base', 'two'\]; add it first"),
        (lambda: learner.switch_task("four"), r"^name: no task 'four'"),
        (lambda: learner.drop_task("four"), r"^name: no task 'four'"),
        (lambda: learner.drop_task("base"), r"^name: must not be the task in use, got 'base'; switch to another one first"),
        (lambda: learner.predict(stream[0][0], task="four"), r"^task: no task 'four'"),
    ):
        with pytest.raises(InputError, match=match):
            call()
    with pytest.raises(StepMissingError, match="identify: head has no such step"):
        learner.identify(stream[0][0])
    assert facts(learner) == before
    plain = load(means)
    assert plain.task == "" and "task" not in plain.report()
    for call in (
        lambda: plain.add_task("two"),
        lambda: plain.switch_task("two"),
        lambda: plain.drop_task("two"),
        lambda: plain.tasks(),
        lambda: plain.identify(stream[0][0]),
        lambda: plain.predict(stream[0][0], task="two"),
    ):
        with pytest.raises(StepMissingError, match="means keeps one state for everything, it has no tasks; export clr, which has"):
            call()


@pytest.mark.parametrize(
    ("name", "spec", "match"),
    [
        ("head", {"first": "base", "fresh": ["depth"]}, "tasks: fresh must name state tensors"),
        ("head", {"first": "base", "fresh": ["bias", "bias"]}, "tasks: fresh must name state tensors, each once"),
        ("head", {"first": "", "fresh": []}, "tasks: first: name: must be a string of 1 to 200"),
        ("means", {"first": "base", "fresh": []}, "tasks: must be null for a method that forgets, relabels, refreshes or adapts"),
    ],
)
def test_a_manifest_with_such_tasks_is_refused(request, load, edit_manifest, name, spec, match):
    bundle = request.getfixturevalue(name)
    edit_manifest(bundle, tasks=spec)
    with pytest.raises(BundleError, match=match):
        load(bundle)


def test_a_full_disk_leaves_the_task_in_use(tasks, load, stream, facts, crash, fill_disk, monkeypatch, tmp_path):
    learner = load(tasks, store=tmp_path / "l.db")
    learner.add_task("two")
    learn(learner, stream, 0, 5)
    pack = type(learner._core.capture()).pack
    monkeypatch.setattr("edgecl_device.snapshot.Snapshot.pack", lambda self: pack(self) + bytes(100_000))
    make_space = fill_disk(learner)
    before = facts(learner)
    for call in (lambda: learner.switch_task("two"), lambda: learner.add_task("three")):
        with pytest.raises(StoreFullError, match="no space left"):
            call()
        assert facts(learner) == before and learner.task == "base" and learner._journal.tasks() == ["base", "two"]
    make_space()
    monkeypatch.undo()
    learner.switch_task("two")
    crash(learner)
    assert load(tasks, store=tmp_path / "l.db").task == "two"


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("verb", ["add_task", "switch_task", "drop_task"])
def test_an_interrupt_around_the_commit_leaves_a_whole_store(tasks, load, stream, facts, monkeypatch, verb, place, tmp_path):
    calls = {
        "add_task": lambda a: a.add_task("three", like="two"),
        "switch_task": lambda a: a.switch_task("two"),
        "drop_task": lambda a: a.drop_task("two"),
    }

    def made(store):
        learner = load(tasks, store=tmp_path / store)
        learner.add_task("two")
        learn(learner, stream, 0, 5)
        return learner

    reached = []
    for name in ("undone.db", "done.db"):
        learner = made(name)
        if name == "done.db":
            calls[verb](learner)
        reached.append(present(facts, learner))
    learner = made("l.db")
    real = learner._store.append

    def interrupted(event):
        if place == "before":
            raise KeyboardInterrupt
        real(event)
        raise KeyboardInterrupt

    monkeypatch.setattr(learner._store, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calls[verb](learner)
    monkeypatch.undo()
    with pytest.raises(ClosedError, match="was closed, as an interrupt came"):
        learner.tasks()
    assert present(facts, load(tasks, store=tmp_path / "l.db")) == reached[0]
    learner = made("m.db")
    monkeypatch.setattr(learner._core, "enter", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    if verb == "switch_task":  # behind the commit: the next start has it
        with pytest.raises(KeyboardInterrupt):
            calls[verb](learner)
        monkeypatch.undo()
        assert present(facts, load(tasks, store=tmp_path / "m.db")) == reached[1]


def test_a_damaged_task_is_named(tasks, load, stream, tmp_path):
    learner = load(tasks, store=tmp_path / "l.db")
    learner.add_task("two")
    learner.close()
    with closing(sqlite3.connect(tmp_path / "l.db")) as db, db:
        blob = bytearray(db.execute("SELECT blob FROM task_blobs WHERE name = 'two'").fetchone()[0])
        blob[-1] ^= 1
        db.execute("UPDATE task_blobs SET blob = ? WHERE name = 'two'", (bytes(blob),))
    learner = load(tasks, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)
    with pytest.raises(StoreError, match=r"l\.db: is damaged \(task 'two' differs from its CRC-32\)"):
        learner.switch_task("two")
    assert learner.task == "base"


def test_names_of_other_string_types_are_plain_text_in_the_store(tasks, load, stream, crash, tmp_path):
    learner = load(tasks, tmp_path / "l.db")
    learner.add_task(np.str_("two"), like=np.str_("base"))
    learner.switch_task(np.str_("two"))
    learn(learner, stream, 0, 4)
    seen = [learner.predict(stream[0][0], task=name).scores for name in (np.str_("base"), "base")]
    assert np.array_equal(*seen)
    learner.switch_task(np.str_("base"))
    crash(learner)
    again = load(tasks, tmp_path / "l.db")
    assert again.task == "base"
    again.switch_task("two")
    assert sum(again.tasks()["two"].class_counts.values()) == 4
    again.switch_task("base")
    again.drop_task(np.str_("two"))
    assert list(again.tasks()) == ["base"]


@pytest.mark.parametrize("wrong", [{"health": [1]}, {"health": {"a": "b"}}, {"class_names": ["a", "a", None, None, None]}])
def test_a_task_from_a_file_is_checked_whole(tasks, load, tmp_path, wrong):
    learner = load(tasks)
    own = Snapshot.unpack(learner._journal.task("base"))
    (tmp_path / "task").write_bytes(Snapshot(own.tensors, {**own.meta, **wrong}).pack())
    with pytest.raises(InputError, match=r"^file: .* must be a task of this bundle, is not"):
        learner.add_task("two", file=tmp_path / "task")
    assert list(learner.tasks()) == ["base"]


def test_the_command_shows_and_changes_tasks(tasks, means, stream, capsys, tmp_path):
    def call(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    store = ("--store", tmp_path / "l.db")
    code, out, _ = call("tasks", tasks, *store, "--add", "kitchen", "--switch", "kitchen")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[-2:]] == [["base", "no"], ["kitchen", "yes"]]
    np.savez(tmp_path / "stream.npz", x=stream[0], y=stream[1])
    assert call("run", tasks, "--data", tmp_path / "stream.npz", "--limit", 6, *store)[0] == 0
    code, out, _ = call("tasks", tasks, *store, "--add", "garden", "--like", "kitchen", "--switch", "base", "--json")
    assert code == 0 and '"samples": 6' in out and out.count('"task"') == 4
    code, out, _ = call("tasks", tasks, *store, "--drop", "kitchen")
    assert code == 0 and "kitchen" not in out
    with Learner.load(tasks, tmp_path / "l.db") as learner:
        assert learner.task == "base" and learner.tasks()["garden"].class_counts
    code, _, err = call("tasks", tasks, *store, "--like", "base")
    assert code == 2 and "--like: is for a task that --add adds" in err
    code, _, err = call("tasks", means, "--store", tmp_path / "m.db")
    assert code == 2 and "it has no tasks" in err and not (tmp_path / "m.db").exists()
