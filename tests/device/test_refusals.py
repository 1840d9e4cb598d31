"""A store that is refused stays byte for byte as it was, its write-ahead log too; and the mend that the error names works."""

import enum
import os
import shutil
import sqlite3
from collections import namedtuple

import numpy as np
import pytest

from edgecl_device import BundleError, ClosedError, EdgeclError, StoreError, StoreMismatchError


def learn(learner, stream, start, stop):
    for i in range(start, stop):
        learner.learn(stream[0][i], int(stream[1][i]))


def files(folder, name):
    return {path.name: path.read_bytes() for path in folder.glob(f"{name}*")}


@pytest.fixture
def killed(means, load, stream, tmp_path):
    """What a killed process leaves: 20 samples in the file, the last 10 in its write-ahead log. Before that `change` is made to it."""

    def make(change=lambda learner: None):
        learner = load(means, store=tmp_path / "live.db")
        learn(learner, stream, 0, 20)
        learner.save()
        learn(learner, stream, 20, 30)
        change(learner)
        for name, content in files(tmp_path, "live.db").items():
            (tmp_path / name.replace("live", "l")).write_bytes(content)
        learner._store.close()
        before = files(tmp_path, "l.db")
        assert set(before) == {"l.db", "l.db-wal"} and len(before["l.db-wal"]) > 10_000
        return before

    return make


def sql(statement):
    return lambda learner: learner._store._db.execute(statement)


REFUSALS = {
    "other program": (sql("PRAGMA application_id = 1"), StoreError, "another program"),
    "other schema": (sql("PRAGMA user_version = 9"), StoreError, "schema is 9"),
    "no ids": (sql("DELETE FROM meta WHERE key = 'reserved_ids'"), StoreError, "reserved_ids is missing"),
    "no snapshot": (sql("DELETE FROM snapshots"), StoreError, "automatic snapshot is missing"),
    "snapshot": (sql("UPDATE snapshots SET crc = x'00000000'"), StoreError, "automatic snapshot differs"),
    "event": (sql("UPDATE events SET label = label + 1 WHERE seq = 25"), StoreError, "event 25 differs"),
    "gap": (sql("DELETE FROM events WHERE seq = 25"), StoreError, r"event 25 is missing\); delete the file \*-wal beside the store"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_damaged_store_stays_as_it_is(means, load, killed, tmp_path, case):
    change, kind, message = REFUSALS[case]
    before = killed(change)
    for _ in range(2):
        with pytest.raises(kind, match=message):
            load(means, store=tmp_path / "l.db")
        assert files(tmp_path, "l.db") == before


def test_another_bundles_store_stays_as_it_is(means, head, load, killed, tmp_path):
    before = killed()
    with pytest.raises(StoreMismatchError, match="belongs to bundle"):
        load(head, store=tmp_path / "l.db")
    assert files(tmp_path, "l.db") == before
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 30


@pytest.mark.parametrize("error", [BundleError, KeyboardInterrupt])
def test_a_store_stays_as_it_is_when_the_rest_of_the_start_fails(means, load, killed, tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error("stopped")

    before = killed()
    monkeypatch.setattr("edgecl_device.learner.Core", fail)
    with pytest.raises(error):
        load(means, store=tmp_path / "l.db")
    assert files(tmp_path, "l.db") == before


def test_a_log_cap_that_is_too_small_leaves_the_store(means, load, killed, edit_manifest, tmp_path):
    before = killed()
    edit_manifest(means, log_capacity_bytes=95)
    with pytest.raises(StoreError, match="log_capacity_bytes: must be at least 96"):
        load(means, store=tmp_path / "l.db")
    assert files(tmp_path, "l.db") == before


def test_a_write_ahead_log_without_a_whole_frame_is_left_too(head, load, killed, tmp_path):
    killed()
    (tmp_path / "l.db-wal").write_bytes(b"garbage" * 1000)
    before = files(tmp_path, "l.db")
    with pytest.raises(StoreMismatchError):
        load(head, store=tmp_path / "l.db")
    assert files(tmp_path, "l.db") == before


def test_a_copy_put_over_a_killed_sessions_store_is_refused_and_the_named_mend_restores_it(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 10)
    learner.close()
    good = (tmp_path / "l.db").read_bytes()
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 10, 60)
    learner.close()
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 60, 70)
    wal = (tmp_path / "l.db-wal").read_bytes()
    learner._store.close()
    (tmp_path / "l.db").write_bytes(good)
    (tmp_path / "l.db-wal").write_bytes(wal)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"damaged.*; delete the file \*-wal beside the store, .* then restore the store from a copy"):
            load(means, store=tmp_path / "l.db")
        assert files(tmp_path, "l.db") == {"l.db": good, "l.db-wal": wal}
    (tmp_path / "l.db-wal").unlink()
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 10


def test_a_refused_store_is_free_for_the_right_bundle_at_once(means, head, load, killed, tmp_path):
    killed()
    with pytest.raises(StoreMismatchError):
        load(head, store=tmp_path / "l.db")
    learner = load(means, store=tmp_path / "l.db")
    with pytest.raises(StoreError, match="another learner has it open"):
        load(head, store=tmp_path / "l.db")
    assert learner.report()["learned"] == 30
    learner.close()
    db = sqlite3.connect(tmp_path / "l.db")
    assert db.execute("PRAGMA quick_check").fetchone() == ("ok",)
    db.close()


@pytest.mark.parametrize("content", [b"holiday photos" * 100, np.arange(900).tobytes()])
def test_a_file_of_another_kind_is_not_called_a_damaged_store(means, load, tmp_path, content):
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(StoreError, match=r"mine: is no store, but a file of another kind; pass another path$"):
        load(means, store=tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == content and files(tmp_path, "mine").keys() == {"mine"}


@pytest.mark.parametrize("path", [os.devnull, "/"])
def test_a_device_or_a_folder_is_no_store(means, load, path):
    with pytest.raises(StoreError, match="must be a file, is a folder or a device; pass another path"):
        load(means, store=path)


class Label(enum.StrEnum):
    MUG = "mug"


@pytest.mark.parametrize("name", [np.array(["mug"])[0], Label.MUG])
def test_a_name_of_a_subclass_of_str_is_its_characters(means, load, stream, crash, tmp_path, name):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 5)
    free = learner.add_class(name)
    sample = learner.learn(stream[0][6], name).sample_id
    learner.save(name)
    crash(learner)
    learner = load(means, store=tmp_path / "l.db")
    assert learner._core.names[free] == "mug" and type(learner._core.names[free]) is str
    assert learner.forget(sample) is True
    learner.rollback("mug")
    assert learner.report()["class_counts"].get("mug", 0) == 0


def test_the_write_ahead_log_leaves_room_for_itself_on_a_small_disk(means, load, stream, tmp_path, monkeypatch):
    """It repeats pages: a disk that it fills has no room left to move it into the database."""
    disk = 400 << 10
    usage = namedtuple("usage", "total used free")

    def left(folder):
        used = sum(len(content) for content in files(tmp_path, "l.db").values())
        return usage(disk, used, disk - used)

    monkeypatch.setattr(shutil, "disk_usage", left)
    learner = load(means, store=tmp_path / "l.db")
    for _ in range(5):
        for i in range(120):
            learner.learn(stream[0][i], int(stream[1][i]))
            assert learner._store.wal_bytes() <= left(tmp_path).free
    assert learner.report()["learned"] == 600


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads
def test_a_fork_leaves_the_store_to_the_first_process(means, load, stream, facts, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 3)
    before = facts(learner)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            learner.learn(stream[0][4], 1)
        except ClosedError as error:
            code = 0 if "a fork does not take its store's lock along" in str(error) else 2
            learner.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert facts(learner) == before
    learn(learner, stream, 3, 6)
    learner.close()
    assert load(means, store=tmp_path / "l.db").report()["learned"] == 6


def test_an_event_whose_id_was_damaged_is_not_called_never_learned(means, load, stream, crash, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learn(learner, stream, 0, 8)
    learner.save()
    learner._store._db.execute("UPDATE events SET sample_id = 69 WHERE sample_id = 5")
    with pytest.raises(StoreError, match=r"is damaged \(event 6 differs from its CRC-32\)"):
        learner.forget(5)


def test_numbers_of_thousands_of_digits_are_refused(means, load, stream):
    learner, x = load(means), stream[0][0]
    for call in (
        lambda n: learner.learn(x, n),
        learner.forget,
        learner.save,
        lambda n: learner.learn(x, 1, weight=n),
    ):
        with pytest.raises(EdgeclError):
            call(10**5000)
