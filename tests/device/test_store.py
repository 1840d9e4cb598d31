import dataclasses
import os
import sqlite3
import subprocess
import sys

import pytest

from edgecl_device.errors import InputError, StoreError, StoreFullError, StoreMismatchError
from edgecl_device.store import AUTOMATIC, EVENT_OVERHEAD, Event, Store

SECRET = b"features that must go"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture
def open_store(path, request):
    def make(bundle="bundle-a", capacity=10_000, where=path, **options):
        store = Store(where, bundle, capacity, **options)
        request.addfinalizer(store.close)
        return store

    return make


def learned(store, size=100, content=None):
    event = Event(store.seq + 1, "learn", store.new_id(), 2, 0.5, 0.1, None, content or bytes(size))
    with store.transaction():
        assert store.has_room(event.nbytes)
        store.append(event)
    return event


def snapshot(store, name=AUTOMATIC, blob=b"blob"):
    with store.transaction():
        store.put_snapshot(name, store.seq, blob)


def test_events_and_snapshots_survive_a_close(open_store):
    store = open_store()
    snapshot(store)
    events = [learned(store) for _ in range(3)]
    with store.transaction():
        store.append(Event(store.seq + 1, "add_class", label=4, name="Tässchen"))
    snapshot(store, "before lunch", b"\x00\xff")
    store.close()
    store = open_store()
    found = list(store.events_after(0))
    assert found[:3] == events
    assert found[3] == Event(4, "add_class", label=4, name="Tässchen")
    assert list(store.events_after(3)) == found[3:]
    assert store.snapshots() == {"": 0, "before lunch": 4}
    assert store.snapshot("before lunch") == b"\x00\xff"
    assert store.seq == 4
    assert store.log_bytes == sum(event.nbytes for event in found) == 3 * 164 + EVENT_OVERHEAD + len("Tässchen".encode())


def test_a_transaction_is_whole_or_nothing(open_store):
    store = open_store()
    learned(store)
    with pytest.raises(KeyError), store.transaction():
        store.append(Event(2, "learn", 9, 1, 1.0, 0.0, None, b"x"))
        store.put_snapshot("name", 2, b"blob")
        raise KeyError
    assert (store.seq, store.log_bytes, store.snapshots()) == (1, 164, {})
    assert store.sample(9) is None


def test_ids_are_never_handed_out_twice_not_even_after_a_crash(open_store):
    seen = set()
    for _ in range(3):
        store = open_store()
        ids = [store.new_id() for _ in range(1030)]
        assert ids == sorted(set(ids) - seen)
        assert store.handed_out(ids[-1]) and not store.handed_out(ids[-1] + 1) and not store.handed_out(-1)
        seen.update(ids)
        store.close()


def test_the_log_keeps_its_cap_and_drops_the_oldest(open_store):
    store = open_store(capacity=10_000)
    snapshot(store)
    ids = []
    for _ in range(300):
        if not store.has_room(164):
            snapshot(store)
        ids.append(learned(store).sample_id)
        assert store.log_bytes <= 10_000
        kept = [event.sample_id for event in store.events_after(-1)]
        assert kept == ids[-len(kept) :]
        assert store.log_bytes == 164 * len(kept)
        assert store.evicted_before == (ids[-len(kept)] if len(kept) < len(ids) else 0)
        # What recovery needs is never dropped.
        assert len(list(store.events_after(store.snapshots()[""]))) == store.seq - store.snapshots()[""]
    assert len(kept) >= 10_000 * 15 // 16 // 164 - 1


def test_in_memory_the_log_needs_no_snapshots(open_store):
    store = open_store(capacity=1000, where=None)
    for _ in range(50):
        learned(store)
    assert store.log_bytes <= 1000
    assert store.wal_bytes() == 0


def test_an_event_beyond_the_cap_names_the_smallest_cap(open_store):
    store = open_store(capacity=1000)
    with pytest.raises(StoreError, match="at least 1001 for one sample, got 1000"):
        store.has_room(1001)


def test_files_stay_bounded(open_store, path):
    store, sizes = open_store(capacity=20_000), []
    snapshot(store)
    for i in range(2000):
        store.fold()
        if not store.has_room(164):
            snapshot(store, blob=bytes(5000))
        learned(store)
        if i in (999, 1999):
            store.fold(force=True)
            sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1]
    assert store.wal_bytes() == 0


def test_a_full_disk_is_typed_and_nothing_is_written(open_store):
    store = open_store()
    learned(store)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    before = store._db.execute("SELECT * FROM events").fetchall()
    event = Event(2, "learn", store.new_id(), 2, 0.5, 0.1, None, bytes(9000))
    with pytest.raises(StoreFullError, match=r"store\.db: no space left .* nothing was written"), store.transaction():
        store.append(event)
    assert store._db.execute("SELECT * FROM events").fetchall() == before
    assert (store.seq, store.log_bytes) == (1, 164)
    store._db.execute("PRAGMA max_page_count = 100000")
    with store.transaction():
        store.append(event)
    assert store.sample(event.sample_id) == event


def test_another_bundles_store_is_refused_by_both_names_and_stays_as_it_is(open_store, path):
    store = open_store("bundle-a")
    learned(store)
    store.close()
    before = path.read_bytes()
    with pytest.raises(StoreMismatchError, match="belongs to bundle bundle-a, not to bundle-b"):
        open_store("bundle-b")
    assert path.read_bytes() == before
    assert open_store("bundle-a").seq == 1


@pytest.mark.parametrize("content", [b"no database at all, but text of some length" * 30, b"SQLite format 3\0" + bytes(4000)])
def test_what_is_not_a_store_is_refused_and_stays_as_it_is(open_store, path, content):
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"store\.db: is (damaged or not a store|no store, but a file of another kind)"):
        open_store()
    assert path.read_bytes() == content


def test_damage_inside_is_found(open_store, path):
    store = open_store(capacity=1 << 20)
    for _ in range(60):
        learned(store, 900)
    store.close()
    content = bytearray(path.read_bytes())
    content[4096 * 4 : 4096 * 12] = os.urandom(4096 * 8)
    assert len(content) > 4096 * 12
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        open_store(capacity=1 << 20)


def test_another_programs_database_and_a_newer_store_are_refused(open_store, path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE notes (text)")
    db.close()
    with pytest.raises(StoreError, match="another program"):
        open_store()
    path.unlink()
    open_store().close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(StoreError, match="schema is 3, this package reads 2"):
        open_store()


def test_a_second_process_is_refused_and_the_first_goes_on(open_store, path):
    store = open_store()
    learned(store)
    code = "import sys; from edgecl_device.store import Store; Store(sys.argv[1], 'bundle-a', 10_000)"
    second = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "StoreError" in second.stderr and "another learner has it open" in second.stderr
    with pytest.raises(StoreError, match="another learner has it open"):
        open_store()
    learned(store)
    store.close()
    assert open_store().seq == 2


def test_a_missing_folder_and_a_wrong_durability_are_named(open_store, tmp_path):
    with pytest.raises(StoreError, match="check that its folder exists"):
        open_store(where=tmp_path / "none" / "store.db")
    with pytest.raises(InputError, match="durability: must be 'normal' or 'full', got 'fast'"):
        open_store(durability="fast")


@pytest.mark.parametrize(("durability", "level"), [("normal", 1), ("full", 2)])
def test_durability_sets_how_sqlite_syncs(open_store, durability, level):
    store = open_store(durability=durability)
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == level
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_what_must_not_be_lost_is_synced_at_any_durability(open_store):
    store, statements = open_store(), []
    store._db.set_trace_callback(statements.append)
    for sync in (False, True):
        with store.transaction(sync=sync):
            pass
    store.new_id()
    synced = ["PRAGMA synchronous = FULL", "BEGIN IMMEDIATE", "COMMIT", "PRAGMA synchronous = NORMAL"]
    assert statements[:6] == ["BEGIN IMMEDIATE", "COMMIT", *synced]
    assert [s for s in statements[6:] if not s.startswith("INSERT")] == synced
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 1


def test_erased_features_are_in_no_file(open_store, path):
    store = open_store()
    event = learned(store, content=SECRET)
    learned(store)
    assert SECRET in path.read_bytes() + path.with_name("store.db-wal").read_bytes()
    with store.transaction():
        store.erase(event)
    store.fold(force=True)
    files = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert SECRET not in files
    assert store.sample(event.sample_id) is None and store.log_bytes == 164


def test_the_label_of_a_sample_can_be_changed(open_store):
    store = open_store()
    event = learned(store)
    with store.transaction():
        store.replace(event, dataclasses.replace(event, label=4))
    assert store.sample(event.sample_id).label == 4


def test_history_after_a_number_is_dropped(open_store):
    store = open_store()
    first = learned(store)
    snapshot(store, "one")
    learned(store)
    snapshot(store, "two")
    with store.transaction():
        store.drop_after(1)
    assert store.snapshots() == {"one": 1}
    assert list(store.events_after(0)) == [first]
    assert (store.seq, store.log_bytes) == (1, 164)
