import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from edgecl_device import Learner
from edgecl_device.manifest import sealed

BUNDLES = Path(__file__).resolve().parent / "bundles"


@pytest.fixture
def means(tmp_path):
    """A copy of the bundle that keeps class sums: learn, forget, relabel."""
    return Path(shutil.copytree(BUNDLES / "means", tmp_path / "means"))


@pytest.fixture
def head(tmp_path):
    """A copy of the bundle that trains a softmax head with replay."""
    return Path(shutil.copytree(BUNDLES / "head", tmp_path / "head"))


@pytest.fixture
def stream():
    """120 samples uint8 [4, 4], each class brighter in its own place, and their labels, 0 to 3."""
    rng = np.random.default_rng(5)
    y = rng.integers(0, 4, 120)
    x = rng.integers(0, 120, (120, 4, 4), dtype=np.uint8)
    x.reshape(120, 16)[np.arange(120), 3 * y] += 135
    return x, y


@pytest.fixture
def loud():
    """A sample whose features go beyond the guard of ``means``: every pixel that raises the third feature is bright."""
    with Learner.load(BUNDLES / "means") as learner:
        one_bright = np.eye(16, dtype=np.uint8).reshape(16, 4, 4) * 255
        third = [learner._encode(x)["z"][0, 2] for x in [np.zeros((4, 4), np.uint8), *one_bright]]
    return (np.array(third[1:] > third[0]) * 255).astype(np.uint8).reshape(4, 4)


@pytest.fixture
def edit_manifest():
    """Change fields of a bundle's manifest.json, hashes of altered files and its own included."""

    def edit(bundle, **fields):
        path = bundle / "manifest.json"
        data = json.loads(path.read_text())
        data.update(fields)
        for name, entry in data["files"].items():
            if (bundle / name).exists():
                content = (bundle / name).read_bytes()
                entry.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        path.write_text(json.dumps(sealed(data)))
        return data

    return edit


@pytest.fixture
def facts():
    """Everything a learner knows, as plain bytes: state, rows, generator, classes, waiting samples, and the store's tables."""

    def find(learner):
        snapshot = learner._core.capture()
        found = {name: array.tobytes() for name, array in snapshot.tensors.items()}
        found["meta"] = json.dumps(snapshot.meta, sort_keys=True)
        found["pending"] = {k: {n: a.tobytes() for n, a in z.items()} for k, z in learner._pending.samples.items()}
        found["health"] = dict(learner._core.health)
        tables = learner._store._db
        for table in ("events", "snapshots"):
            found[table] = tables.execute(f"SELECT * FROM {table}").fetchall()
        found["log_bytes"] = learner._store.log_bytes
        return found

    return find


@pytest.fixture
def load(request):
    """Load a bundle; every learner is closed at the end, without a last snapshot."""

    def make(*args, **kwargs):
        learner = Learner.load(*args, **kwargs)
        request.addfinalizer(learner._store.close)
        return learner

    return make


@pytest.fixture
def crash():
    """Drop a learner as a killed process does: nothing is written any more, the lock is free."""

    def drop(learner):
        learner._store.close()

    return drop


@pytest.fixture
def fill_disk():
    """Let a store grow no more; call what it returns to make space again."""

    def fill(learner):
        db: sqlite3.Connection = learner._store._db
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        return lambda: db.execute("PRAGMA max_page_count = 1000000")

    return fill
