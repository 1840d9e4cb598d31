"""What the reports say was written is what the process wrote."""

from pathlib import Path

import pytest

from edgecl_device import Learner


def wrote():
    """Bytes that this process has written to any file, as the kernel counts them."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])


@pytest.mark.parametrize(
    ("name", "cap", "first"),
    [
        pytest.param("means", 16 << 20, "predict", id="the log has room"),
        pytest.param("means", 96 * 40, "learn", id="a snapshot every 37 samples"),
        pytest.param("head", 96 * 300, "predict", id="replay"),
    ],
)
def test_a_sessions_bytes_are_the_processes(request, name, cap, first, load, stream, edit_manifest, tmp_path):
    bundle = request.getfixturevalue(name)
    edit_manifest(bundle, log_capacity_bytes=cap)
    load(bundle).close()  # what the runtime writes once
    before = wrote()
    learner, told = load(bundle, store=tmp_path / "l.db"), 0
    for i in range(3000):
        x, y = stream[0][i % 120], int(stream[1][i % 120])
        told += learner.learn(learner.predict(x).sample_id if first == "predict" else x, y).bytes_written
        if name == "means" and i % 500 == 499:
            learner.forget(i)
        if i == 1000:
            learner.save("kept")
        if i == 1500:
            learner.rollback("kept")
    assert told <= learner.report()["session"]["bytes_written"]
    learner.save()
    assert learner.report()["session"]["bytes_written"] == pytest.approx(wrote() - before, rel=0.1)
    before = wrote()
    learner.close()
    assert wrote() == before  # as the docstring says: nothing is left to write


def test_a_call_counts_what_falls_on_it(means, load, stream, tmp_path):
    learner = load(means, store=tmp_path / "l.db")
    new = learner.report()["session"]["bytes_written"]
    assert new > (tmp_path / "l.db").stat().st_size  # the file, and its first snapshot once more
    usual = []
    for i in range(1100):
        before = wrote()
        written = learner.learn(stream[0][i % 120], 1).bytes_written
        assert written == wrote() - before
        usual.append(written)
    assert usual[0] > usual[1] and usual[1024] > usual[1023]  # a block of sample ids
    wal = (tmp_path / "l.db-wal").stat().st_size
    while (tmp_path / "l.db-wal").stat().st_size >= wal:
        wal = (tmp_path / "l.db-wal").stat().st_size
        before = wrote()
        written = learner.learn(stream[0][0], 1).bytes_written
    assert written == wrote() - before > 20 * usual[1]  # the write-ahead log was moved into the file


def test_a_store_in_memory_writes_nothing(means, stream):
    with Learner.load(means) as learner:
        assert learner.learn(stream[0][0], 1).bytes_written == 0
        learner.save()
        learner.forget(0)
        assert learner.report()["session"]["bytes_written"] == 0
