"""A first start that dies or fails at any point leaves what the next one starts from; two at once do not destroy each other's."""

import subprocess
import sys

import pytest

from edgecl_device import StoreError

# Each start is a forked process. `attempt` is one that is to die or fail: it gets its number, from 0, until one succeeds.
DRIVER = """
import os, pathlib, resource, signal, sqlite3, sys, time
import numpy as np
import onnxruntime
from edgecl_device import Learner, StoreError
bundle, folder = sys.argv[1], pathlib.Path(sys.argv[2])

def forked(call):
    pid = os.fork()
    if pid == 0:
        try:
            call()
        except StoreError as error:
            assert "; " in str(error)
            os._exit(3)
        except BaseException as error:
            print("!!!", repr(error), flush=True)
            os._exit(4)
        os._exit(0)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def start(path):
    learner = Learner.load(bundle, store=path)
    learner.predict(np.zeros((4, 4), np.uint8))
    return learner

def starts_again(path):
    learner = start(path)
    assert learner.report()["learned"] == 0
    learner.learn(np.zeros((4, 4), np.uint8), 1)
    assert sorted(p.name for p in path.parent.iterdir()) == ["l.db", "l.db-wal"]
    learner.close()

def sweep(attempt):
    for n in range(1000):
        path = folder / f"{n}" / "l.db"
        path.parent.mkdir()
        code = ended(forked(lambda: attempt(n, path)))
        assert ended(forked(lambda: starts_again(path))) == 0, (n, code)
        if code == 0:
            return print("attempts", n)

def small_files(n, path, action):
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 * n, 300 * n))
    start(path)

def kill_by_size(n, path):
    small_files(n, path, signal.SIG_DFL)

def fail_by_size(n, path):
    small_files(n, path, signal.SIG_IGN)

def kill_by_call(n, path):
    left = [n]

    def counted(call):
        def run(*args, **options):
            left[0] -= 1
            if left[0] < 0:  # before the n-th, which is behind the one before it
                os._exit(9)
            return call(*args, **options)
        return run

    class Counting(sqlite3.Connection):
        execute = counted(sqlite3.Connection.execute)
        close = counted(sqlite3.Connection.close)

    connect = sqlite3.connect
    sqlite3.connect = counted(lambda *args, **options: connect(*args, **options, factory=Counting))
    for name in ("replace", "unlink"):
        setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
    os.fsync = counted(os.fsync)
    start(path)

def together():
    good = 0
    for n in range(25):
        path = folder / f"{n}" / "l.db"
        path.parent.mkdir()
        if n % 2:  # with what a process that died has left
            pathlib.Path(f"{path}-new").touch()
        at = time.time() + 0.05

        def one():
            while time.time() < at:
                pass
            learner = start(path)
            learner.learn(np.zeros((4, 4), np.uint8), 1)
            learner.close()

        codes = [ended(pid) for pid in [forked(one) for _ in range(4)]]
        assert set(codes) <= {0, 3}, codes  # done, or refused as in use
        good += codes.count(0)
        assert Learner.load(bundle, store=path).report()["learned"] == codes.count(0), codes
    print("attempts", good)

sweep(globals()[sys.argv[3]]) if sys.argv[3] != "together" else together()
"""


@pytest.mark.parametrize("how", ["kill_by_size", "fail_by_size", "kill_by_call", "together"])
def test_a_first_start_that_does_not_end_leaves_what_the_next_one_starts_from(means, tmp_path, how):
    (tmp_path / "stores").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(means), str(tmp_path / "stores"), how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 15


def test_a_new_store_takes_nothing_from_a_deleted_one(means, load, stream, crash, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    for i in range(30):
        learner.learn(stream[0][i], int(stream[1][i]))
    wal = (tmp_path / "l.db-wal").read_bytes()
    crash(learner)
    (tmp_path / "l.db").unlink()
    (tmp_path / "l.db-wal").write_bytes(wal)
    (tmp_path / "l.db-journal").write_bytes(wal)
    learner = load(means, store=tmp_path / "l.db")
    assert learner.report()["learned"] == 0 and learner.predict(stream[0][0]).sample_id == 0
    learner.close()
    assert [path.name for path in tmp_path.glob("l.db*")] == ["l.db"]


def test_what_another_bundles_first_start_has_left_is_made_anew(means, head, load, stream, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(means, store=tmp_path / "l.db")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("l.db*")] == ["l.db-new"]
    assert load(head, store=tmp_path / "l.db").report()["learned"] == 0
    assert not (tmp_path / "l.db-new").exists()


def test_a_folder_that_cannot_take_the_new_store_is_named(means, load, tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("not here")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(StoreError, match=r"l\.db: cannot be made \(not here\); check its folder and try again"):
        load(means, store=tmp_path / "l.db")
