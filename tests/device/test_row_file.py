"""Replay rows in a file: the same rows, draws and updates as in memory, through crashes at any moment, and no copy of all of them."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from mmap import PAGESIZE

import numpy as np
import pytest

from edgecl_device import InputError, StoreError, StoreFullError, TensorSpec
from edgecl_device.cli import main
from edgecl_device.manifest import ReplaySpec, read_manifest
from edgecl_device.memory import ReplayMemory, memory_bytes, memory_layout
from edgecl_device.rows import HEADER_BYTES, RowFile
from edgecl_device.snapshot import Snapshot
from edgecl_device.store import Store

FIELDS = (TensorSpec("z", (3,), "uint8"), TensorSpec("scale", (), "float32"))


@pytest.fixture
def filed(head, edit_manifest):
    """The bundle with replay, its rows in a file. Its log has room for 24 samples."""
    replay = json.loads((head / "manifest.json").read_text())["replay"]
    edit_manifest(head, replay={**replay, "in_file": True}, log_capacity_bytes=24 * 96)
    return head


@pytest.fixture
def plain(head, tmp_path, edit_manifest):
    """The same bundle with its rows in memory."""
    folder = shutil.copytree(head, tmp_path / "plain")
    edit_manifest(folder, replay={**json.loads((folder / "manifest.json").read_text())["replay"], "in_file": False})
    return folder


@pytest.fixture
def start(filed, load, tmp_path):
    return lambda: load(filed, store=tmp_path / "l.db", rows=tmp_path / "rows.bin")


def learn(learner, stream, begin, end):
    for i in range(begin, end):
        learner.learn(stream[0][i % 120], int(stream[1][i % 120]))


def knows(learner):
    """State, rows with their order, counters and classes; not the ids, as a crash uses up reserved ones."""
    rows = {name: a.tobytes() for name, a in learner.rows().items() if name != "replay.sample_id"}
    state = {name: a.tobytes() for name, a in learner.state().items()}
    memory = learner._core.memory
    bookkeeping = memory._slots.tobytes(), memory._starts.tobytes(), memory.seen, memory.generator.counter
    return state, rows, bookkeeping, learner._core.counts.tolist(), learner._core.totals


@pytest.mark.parametrize("how", ["crash", "close", "neither"])
def test_it_learns_bit_for_bit_as_with_rows_in_memory(start, plain, load, stream, crash, how):
    """Over several snapshots that a full log forces, and restarts between and on them."""
    other, learner = load(plain), start()
    for begin, end in ((0, 1), (1, 23), (23, 25), (25, 70), (70, 120)):
        learn(other, stream, begin, end)
        learn(learner, stream, begin, end)
        assert knows(learner) == knows(other)
        if how != "neither":
            crash(learner) if how == "crash" else learner.close()
            learner = start()
            assert knows(learner) == knows(other)


def test_a_snapshot_holds_the_rows_that_changed_and_no_others(start, stream, tmp_path):
    learner = start()
    full = learner._core.memory.rows
    sizes = []
    for end in (10, 11, 11):
        learn(learner, stream, learner.report()["learned"], end)
        learner.save()
        snapshot = Snapshot.unpack(learner._store.snapshot(""))
        sizes.append(len(snapshot.tensors["memory.changed"]))
        assert snapshot.tensors["memory.row.z"].shape == (sizes[-1], 8)
        assert learner.report()["replay"]["rows_waiting"] == 0
    assert 5 <= sizes[0] <= full and sizes[1] <= 1 and sizes[2] == 0
    content = np.fromfile(tmp_path / "rows.bin", np.uint8)[HEADER_BYTES:].reshape(full, 8)
    memory = learner._core.memory
    assert np.array_equal(content[memory._slots[: len(memory)]], learner.rows()["replay.z"])


def test_what_is_written_into_the_file_counts(start, stream):
    def written():
        return learner.report()["session"]["bytes_written"] - learner._store.written

    learner = start()
    assert written() == HEADER_BYTES + 3 * 8 + PAGESIZE, "the bundle's rows, and the number of the first snapshot"
    told = sum(learner.learn(stream[0][i], int(stream[1][i])).bytes_written for i in range(30))
    assert written() == HEADER_BYTES + 3 * 8 + 2 * PAGESIZE, "the log was full once"
    assert told < learner.report()["session"]["bytes_written"]


def test_the_command_knows_such_a_bundle(filed, capsys):
    assert main(["verify", str(filed)]) == 0 and "files unchanged" in capsys.readouterr().out
    assert main(["info", str(filed)]) == 0 and "rows in a file" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["rows", "header", "done"])
def test_a_process_that_dies_while_the_file_is_written_loses_nothing(start, plain, load, stream, crash, monkeypatch, moment):
    """The snapshot is in the store; of its rows one, or all, or all but the header's number are in the file."""
    learner, other = start(), load(plain)
    learn(other, stream, 0, 30)
    learn(learner, stream, 0, 20)

    def dies(self):
        written = list(self._changed.items())
        for slot, record in written[: 1 if moment == "rows" else None]:
            self._rows[slot] = record
        if moment == "done":
            self._header["epoch"] = self._epoch + 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "settle", dies)
        with pytest.raises(KeyboardInterrupt):
            learner.save()
    crash(learner)
    learner = start()
    learn(learner, stream, 20, 30)
    assert knows(learner) == knows(other)


def test_a_disk_that_fails_leaves_the_rows_to_the_next_snapshot(start, plain, load, stream, crash, monkeypatch):
    learner, other = start(), load(plain)
    learn(other, stream, 0, 120)
    learn(learner, stream, 0, 20)

    class Broken:
        def __setitem__(self, slot, record):
            raise OSError("no medium")

    file = learner._core.memory.file
    with monkeypatch.context() as patch:
        real = file._rows
        patch.setattr(file, "_rows", Broken())
        learner.save()
        assert learner.forget(learner.predict(stream[0][0]).sample_id) is False, "what is gone may be in the file"
        patch.setattr(file, "_rows", real)
        assert learner.report()["replay"]["rows_waiting"] > 0
    learn(learner, stream, 20, 40)
    learner.save()
    assert learner.report()["replay"]["rows_waiting"] == 0
    learn(learner, stream, 40, 70)
    crash(learner)
    learner = start()
    learn(learner, stream, 70, 120)
    assert knows(learner) == knows(other)


def test_a_process_killed_in_the_middle_of_a_stream_loses_nothing(filed, plain, start, load, stream, tmp_path):
    code = """
import sys, numpy as np
from edgecl_device import Learner
learner = Learner.load(sys.argv[1], store=sys.argv[2], rows=sys.argv[3])
data = np.load(sys.argv[4])
while True:
    for x, y in zip(data["x"], data["y"]):
        print(learner.learn(x, int(y)).sample_id, flush=True)
"""
    np.savez(tmp_path / "stream.npz", x=stream[0], y=stream[1])
    paths = [filed, tmp_path / "l.db", tmp_path / "rows.bin", tmp_path / "stream.npz"]
    done = 0
    for count in (30, 77):
        with subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], stdout=subprocess.PIPE, text=True) as process:
            for _ in range(count):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
        learner = start()
        learned, begin = learner.report()["learned"], done
        assert learned >= done + count
        other = load(plain)
        for i in [*range(begin), *range(learned - begin)] if begin else range(learned):
            other.learn(stream[0][i % 120], int(stream[1][i % 120]))
        assert knows(learner) == knows(other)
        done = learned
        learner._store.close()


def test_rollback_goes_to_the_last_save_and_named_snapshots_are_refused(start, plain, load, stream, crash):
    learner, other = start(), load(plain)
    learn(other, stream, 0, 10)
    learn(learner, stream, 0, 10)
    learner.save()
    learn(learner, stream, 10, 20)
    learner.rollback()
    assert knows(learner) == knows(other)
    with pytest.raises(InputError, match=r"^name: must be left out where replay rows lie in a file.*, got 'mine'; save\(\) without one"):
        learner.save("mine")
    learn(learner, stream, 20, 30)
    learn(other, stream, 20, 30)
    crash(learner)
    assert knows(start()) == knows(other)


def test_a_start_that_dies_before_its_first_snapshot_begins_anew(start, stream, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("edgecl_device.journal.Journal.save", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start()
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.bin-new"]
    learner = start()
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.bin"]
    assert len(learner.rows()["replay.target"]) == 3, "the bundle's own"


def test_a_start_whose_first_snapshot_does_not_fit_leaves_no_file_of_rows(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("edgecl_device.journal.Journal.save", lambda self, name: (_ for _ in ()).throw(StoreFullError("disk is full")))
        with pytest.raises(StoreFullError, match="disk is full"):
            start()
    assert not [*tmp_path.glob("rows*")]
    start().close()
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.bin"]


def test_a_start_that_dies_before_the_file_is_in_its_place_goes_on(start, stream, plain, load, crash, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "settle", lambda self: None)
        crash(start())
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.bin-new"]
    crash(start())
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.bin"], "a start that goes on moves it, before its next snapshot"
    learner, other = start(), load(plain)
    learn(learner, stream, 0, 40)
    learn(other, stream, 0, 40)
    assert knows(learner) == knows(other)
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.bin"]


def test_a_file_that_does_not_go_with_the_store_is_refused(filed, start, load, stream, tmp_path):
    learner = start()
    learn(learner, stream, 0, 5)
    learner.close()
    shutil.copy(tmp_path / "rows.bin", tmp_path / "early.bin")
    shutil.copy(tmp_path / "l.db", tmp_path / "early.db")
    for end in (10, 15):
        learner = start()
        learn(learner, stream, end - 5, end)
        learner.close()
    load(filed, store=tmp_path / "other.db", rows=tmp_path / "other.bin").close()

    def refused(message, store="l.db", rows="rows.bin"):
        before = {p.name: p.read_bytes() for p in tmp_path.glob("*.*")}
        with pytest.raises(StoreError, match=message):
            load(filed, store=tmp_path / store, rows=tmp_path / rows)
        assert {p.name: p.read_bytes() for p in tmp_path.glob("*.*")} == before

    refused("is of another time than the store", rows="early.bin")
    refused("is of another time than the store", store="early.db")
    refused("belongs to another store", rows="other.bin")
    refused("the store's row file is missing", rows="none.bin")
    for size in (-1, 10, 0):
        (tmp_path / "cut.bin").write_bytes((tmp_path / "rows.bin").read_bytes()[:size])
        refused("is damaged or no row file", rows="cut.bin")
    (tmp_path / "junk.bin").write_bytes(b"x" * (tmp_path / "rows.bin").stat().st_size)
    refused("is damaged or no row file", rows="junk.bin")
    load(filed, store=tmp_path / "early.db", rows=tmp_path / "early.bin").close()
    with pytest.raises(StoreError, match=r"rows\.bin: exists, but the store is new; "):
        load(filed, store=tmp_path / "new.db", rows=tmp_path / "rows.bin")


UNSETTLED = r"rows\.bin-new: exists, and is not of this store, which is new; start the store that it was made with.*, or pass another path"


@pytest.fixture
def unsettled(start, stream, monkeypatch):
    """A learner of 10 samples whose disk failed when its first snapshot was to be written into the file; it works again now."""
    with monkeypatch.context() as patch:
        patch.setattr(np.memmap, "flush", lambda self: (_ for _ in ()).throw(OSError("no medium")))
        patch.setattr(RowFile, "fill", lambda self, values: self._rows["z"].__setitem__(slice(3), values["z"]))
        learner = start()
    learn(learner, stream, 0, 10)
    return learner


@pytest.mark.parametrize("owner", ["lives", "died", "died twice"])
def test_a_new_store_leaves_the_unsettled_file_of_another_one_alone(unsettled, filed, start, plain, load, stream, crash, tmp_path, owner):
    """All rows of a store may be in it, where the process died behind the first snapshot, or the disk failed since."""
    learner, other = unsettled, load(plain)
    if owner != "lives":
        crash(learner)
    if owner == "died twice":  # the second time before the start has got so far as to move the file
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RowFile, "place", lambda self: None)
            crash(start())
    before = (tmp_path / "rows.bin-new").read_bytes()
    for _ in range(2):  # the refused store is there behind the first
        with pytest.raises(StoreError, match=UNSETTLED):
            load(filed, store=tmp_path / "other.db", rows=tmp_path / "rows.bin")
        assert (tmp_path / "rows.bin-new").read_bytes() == before and not (tmp_path / "rows.bin").exists()
    if owner != "lives":
        learner = start()
    learn(learner, stream, 10, 40)
    learn(other, stream, 0, 40)
    assert knows(learner) == knows(other)
    learner.save()
    crash(learner)
    assert knows(start()) == knows(other) and [p.name for p in tmp_path.glob("rows*")] == ["rows.bin"]


@pytest.mark.parametrize(
    "content", [b"a user's own notes" * 9, b"brief", bytes(64) + b"an image", bytes(5000)], ids=["long", "brief", "zeros first", "zeros"]
)
def test_a_new_store_leaves_a_users_file_alone(start, tmp_path, content):
    (tmp_path / "rows.bin-new").write_bytes(content)
    with pytest.raises(StoreError, match=UNSETTLED):
        start()
    assert (tmp_path / "rows.bin-new").read_bytes() == content and not (tmp_path / "rows.bin").exists()


@pytest.mark.parametrize("place", ["rows.bin-new", "rows.bin"])
def test_a_file_that_came_there_meanwhile_is_neither_moved_nor_replaced(unsettled, filed, load, tmp_path, place):
    load(filed, store=tmp_path / "other.db", rows=tmp_path / "other.bin").close()
    (tmp_path / "other.bin").replace(tmp_path / place)
    files = {p.name: p.read_bytes() for p in tmp_path.glob("rows*")}
    unsettled.save()
    assert unsettled.report()["replay"]["rows_waiting"] > 0
    found = {p.name: p.read_bytes() for p in tmp_path.glob("rows*")}
    assert found.keys() == files.keys() and found[place] == files[place]


def test_a_start_that_fails_deletes_no_file_of_another_store(filed, start, load, tmp_path, monkeypatch):
    load(filed, store=tmp_path / "other.db", rows=tmp_path / "other.bin").close()
    content = (tmp_path / "other.bin").read_bytes()

    def fails(self, name):
        (tmp_path / "other.bin").replace(tmp_path / "rows.bin-new")
        raise StoreFullError("disk is full")

    monkeypatch.setattr("edgecl_device.journal.Journal.save", fails)
    with pytest.raises(StoreFullError, match="disk is full"):
        start()
    assert (tmp_path / "rows.bin-new").read_bytes() == content


def test_a_store_that_lost_its_snapshot_leaves_its_unsettled_file_alone(unsettled, start, crash, tmp_path):
    """A copy of the store needs it."""
    crash(unsettled)
    before = (tmp_path / "rows.bin-new").read_bytes()
    with sqlite3.connect(tmp_path / "l.db") as db:
        db.execute("DELETE FROM snapshots")
    db.close()
    with pytest.raises(StoreError, match=r"l\.db: is damaged \(the automatic snapshot is missing\)"):
        start()
    assert (tmp_path / "rows.bin-new").read_bytes() == before


def test_a_file_that_holds_a_snapshot_is_not_made_anew(tmp_path):
    """As a copy of the store would, taken before its first snapshot."""
    RowFile(tmp_path / "r.bin", FIELDS, 9, b"t" * 16)
    file = RowFile(tmp_path / "r.bin", FIELDS, 9, b"t" * 16)
    (tmp_path / "r.bin").mkdir()
    file.settle()
    (tmp_path / "r.bin").rmdir()
    with pytest.raises(StoreError, match=r"r\.bin-new: exists, and is not of this store"):
        RowFile(tmp_path / "r.bin", FIELDS, 9, b"t" * 16)


@pytest.mark.parametrize("size", [0, 80])
def test_a_start_that_dies_while_the_file_is_made_begins_anew(start, tmp_path, size):
    """Its room is there, its header not yet: no snapshot can tell of it."""
    (tmp_path / "rows.bin-new").write_bytes(bytes(size))
    start()
    assert sorted(p.name for p in tmp_path.glob("rows*")) == ["rows.bin"]


def test_a_new_store_whose_token_is_damaged_is_refused(filed, start, tmp_path):
    Store(tmp_path / "l.db", read_manifest(filed).bundle_id, 1 << 20).close()
    with sqlite3.connect(tmp_path / "l.db") as db:
        db.execute("UPDATE meta SET value = 'abc' WHERE key = 'token'")
    db.close()
    with pytest.raises(StoreError, match=r"l\.db: is damaged \(token is 'abc'\); "):
        start()


def test_arguments_are_checked(filed, plain, load, tmp_path):
    for bundle, store, rows, message in (
        (filed, tmp_path / "l.db", None, "^rows: is needed, this bundle keeps its replay rows in a file"),
        (filed, None, tmp_path / "r", "^rows: a file of rows goes with a store"),
        (filed, tmp_path / "l.db", tmp_path / "l.db", "^rows: must be a file of its own"),
        (filed, tmp_path / "l.db", filed / "rows.bin", "^rows: must be a file of its own"),
        *(
            (filed, tmp_path / "l.db", tmp_path / f"B.db{end}", "^rows: must not end in -wal, ")
            for end in ("-wal", "-journal", "-SHM", "-new")
        ),
        (plain, tmp_path / "l.db", tmp_path / "r", "^rows: this bundle keeps no replay rows in a file"),
    ):
        with pytest.raises(InputError, match=message):
            load(bundle, store=store, rows=rows)
    with pytest.raises(StoreError, match=r"^rows: .* cannot be made with \d+ bytes .*; make room or pass another path"):
        load(filed, store=tmp_path / "l.db", rows=tmp_path / "no" / "rows.bin")


def test_a_file_for_which_there_is_no_room_leaves_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(StoreError, match=r"cannot be made with .*no space left"):
        start()
    assert not [*tmp_path.glob("rows*")]


@pytest.mark.parametrize("policy", ["reservoir", "largest-class"])
def test_both_memories_are_one_in_everything(tmp_path, policy):
    """Offers, removals, relabels, draws and snapshots at random, two fields a row, among them scalars."""
    spec = ReplaySpec(FIELDS, 4, 4 * 19 + 4 * 7 + 9 * 19, policy, 3, in_file=True)
    count, _ = memory_layout(spec, 5)
    ram, filed = ReplayMemory(spec, 5), ReplayMemory(spec, 5, RowFile(tmp_path / "r.bin", FIELDS, count, bytes(16)))
    rng = np.random.default_rng(0)
    for i in range(600):
        row = {"z": rng.integers(0, 256, 3).astype(np.uint8), "scale": np.float32(rng.normal())}
        label, old = int(rng.integers(5)), int(rng.integers(max(1, i)))
        for memory in (ram, filed):
            memory.offer(row, label, i)
            if i % 7 == 3:
                memory.relabel(old, label)
            if i % 11 == 5:
                memory.remove(old)
        if i % 13 == 0:
            filed.file.settle()
        drawn = [{k: a.tobytes() for k, a in memory.draw().items()} for memory in (ram, filed)]
        assert drawn[0] == drawn[1]
        kept = [{k: a.tobytes() for k, a in memory.rows_by_name().items()} for memory in (ram, filed)]
        assert kept[0] == kept[1]


def test_the_ledger_tells_memory_and_file_apart(tmp_path):
    spec = ReplaySpec(FIELDS, 4, 5000, "reservoir", 3, in_file=True)
    count, whole = memory_layout(spec, 5)
    memory = ReplayMemory(spec, 5, RowFile(tmp_path / "r.bin", FIELDS, count, bytes(16)))
    memory.file.settle()
    assert memory_bytes(spec, 5) == (memory.nbytes, (tmp_path / "r.bin").stat().st_size)
    assert memory.nbytes == whole - 7 * count
    assert memory.report() == {
        "rows": 0, "row_capacity": count, "bytes": memory.nbytes, "file_bytes": HEADER_BYTES + 7 * count, "rows_waiting": 0,
    }  # fmt: skip
