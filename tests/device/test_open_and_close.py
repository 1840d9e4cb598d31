"""Arguments of ``load``, and what is left of a learner after ``close``."""

import numpy as np
import pytest

from edgecl_device import ClosedError, InputError, Learner, StoreError

CALLS = {
    "predict": lambda a, x: a.predict(x),
    "learn": lambda a, x: a.learn(x, 1),
    "adapt": lambda a, x: a.adapt(x),
    "reset_adaptation": lambda a, x: a.reset_adaptation(),
    "learn by id": lambda a, x: a.learn(0, 1),
    "forget": lambda a, x: a.forget(0),
    "relabel": lambda a, x: a.relabel(0, 1),
    "add_class": lambda a, x: a.add_class("mug"),
    "save": lambda a, x: a.save(),
    "rollback": lambda a, x: a.rollback(),
    "state": lambda a, x: a.state(),
    "rows": lambda a, x: a.rows(),
    "reset_stream": lambda a, x: a.reset_stream(),
    "report": lambda a, x: a.report(),
}


@pytest.mark.parametrize("store", [None, "l.db"])
def test_a_closed_learner_says_so_and_stays_closed(means, load, stream, tmp_path, store):
    learner = load(means, store=store and tmp_path / store)
    learner.learn(stream[0][0], 1)
    for _ in range(2):
        learner.close()
        for call in CALLS.values():
            with pytest.raises(ClosedError, match="learner: is closed; load the bundle, with its store, again"):
                call(learner, stream[0][1])
    public = {name for name in vars(Learner) if not name.startswith("_")} - {"load", "close"}
    assert public == {name.split()[0] for name in CALLS}
    if store:
        assert load(means, store=tmp_path / store).report()["learned"] == 1


def test_a_learner_that_cannot_save_while_closing_is_closed_all_the_same(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    learner.learn(stream[0][0], 1)
    learner._store._db.execute("CREATE TRIGGER full BEFORE INSERT ON snapshots BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(StoreError, match="SQLite failed"):
        learner.close()
    learner.close()
    with pytest.raises(ClosedError):
        learner.report()


@pytest.mark.parametrize("threads", [0, -1, 65, 3000, 2**40, 10**500, 1.0, "2", True, None])
def test_threads_are_an_integer_from_1_to_64(means, load, threads):
    with pytest.raises(InputError, match=r"threads: must be (at least 1 and at most 64|an integer), got .{1,200}$"):
        load(means, threads=threads)


@pytest.mark.parametrize("memory", ["least", "", None, 3, ["fastest"]])
def test_a_setting_of_memory_is_one_of_three(means, load, memory):
    with pytest.raises(InputError, match=r"^memory: must be one of fastest, balanced, smallest, got .*; pass one of them$"):
        load(means, memory=memory)


def test_a_setting_of_memory_changes_no_result(means, load, stream):
    found = []
    for memory in ("fastest", "balanced", "smallest"):
        with load(means, memory=memory) as learner:
            for x, y in zip(stream[0][:20], stream[1][:20], strict=True):
                learner.learn(x, int(y))
            found.append((learner.state(), learner.predict(stream[0][0]).scores))
    for state, scores in found[1:]:
        assert all(np.allclose(state[name], value, rtol=1e-6, atol=1e-6) for name, value in found[0][0].items())
        assert np.allclose(scores, found[0][1], rtol=1e-5, atol=1e-5)


def test_threads_may_be_numpys(means, load, stream):
    assert load(means, threads=np.int64(2)).predict(stream[0][0]).sample_id == 0


WRONG = {"bundle": (None, 5, "a\0b", "x" * 5000), "store": (5, "a\0b", "x" * 5000), "engine": ([], 5), "durability": ([], None)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_arguments_of_load_are_typed(means, load, name, value):
    with pytest.raises(InputError, match=f"{name}: must be .{{1,250}}$"):
        load(**{"bundle": means, name: value})


def test_a_store_is_the_file_that_it_was_called_by_links_and_folders_notwithstanding(means, load, stream, monkeypatch, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "l.db")
    assert load(means, store=tmp_path / "link.db").learn(stream[0][0], 1).bytes_written > 1000
    monkeypatch.chdir(tmp_path)
    learner = load(means, store=":memory:")
    monkeypatch.chdir("/")
    assert learner.learn(stream[0][0], 1).bytes_written > 1000
    assert (tmp_path / ":memory:").stat().st_size > 0
