"""A trail is gone on with only where every line follows from those before it and the store has what it says."""

import json
import os
import resource
import zlib
from contextlib import contextmanager

import pytest
import torch

from edgecl.runs.files import save_network
from edgecl.runs.trail import Trail
from edgecl.tally import ClassTally
from edgecl_device.errors import InputError

POINTS = [0, 3, 6]
"""Tests of a stream of 6 samples, of 11 test samples each."""
FORM = ClassTally(None, [(None, range(7)), (None, range(4))])


def written(path):
    """The lines of a whole trail: 6 samples, the update of the third one refused."""
    with Trail(path, FORM) as trail:
        learned = 0
        for n in range(6):
            if n in POINTS:
                trail.add({"tested": n, "found": "a560"})
            trail.add({"sample": n, "predicted": None if n == 0 else n % 3, "before": learned})
            trail.add({"learned": n, "kept": False} if n == 2 else {"learned": n, "kept": True, "seconds": 0.5, "bytes": 7})
            learned += n != 2
        trail.add({"tested": 6, "found": "a560"})
    return path.read_text().splitlines()


def fits(path, learned):
    with Trail(path, FORM) as trail:
        return trail.fit(learned, POINTS)


@pytest.mark.parametrize(("learned", "left"), [(5, 6), (4, 5), (2, 3), (0, 0)])
def test_what_the_store_lacks_is_dropped(tmp_path, learned, left):
    path = tmp_path / "trail.jsonl"
    written(path)
    path.write_text(path.read_text() + '{"tes')  # torn
    assert fits(path, learned)
    with Trail(path, FORM) as trail:
        assert len(trail.predicted) == left and sorted(trail.tests) == [n for n in POINTS if n <= left]
    assert not fits(path, learned + 1)


def test_no_line_may_be_missing_doubled_or_out_of_its_place(tmp_path):
    path = tmp_path / "trail.jsonl"
    lines = written(path)
    for n, line in enumerate(lines):
        kind = next(key for key in ("predicted", "learned", "tested") if key in line)
        changes = {"doubled": [*lines[:n], line, *lines[n:]], "missing": lines[:n] + lines[n + 1 :]}
        if n + 1 < len(lines) and kind != "tested" and "tested" not in lines[n + 1]:
            changes["swapped"] = [*lines[:n], lines[n + 1], line, *lines[n + 2 :]]
        for change, changed in changes.items():
            path.write_text("".join(f"{text}\n" for text in changed))
            # Lines that a kill may leave out, and a test said twice
            harmless = change == "doubled" and kind == "tested"
            harmless |= change == "missing" and ('"kept": true' in line or (kind == "tested" and n == len(lines) - 1))
            harmless |= change == "missing" and n == len(lines) - 2 and kind == "learned"
            assert fits(path, 5) == harmless, (change, line)


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40, b"[]", b"{}", b"3", b"\xff\xfe", b"[" * 100_000, b"9" * 5000,
        b'{"tested": 3, "found": "a5"}', b'{"tested": 3, "found": "a56000"}', b'{"tested": 3, "found": "a5 60"}',
        b'{"tested": 3, "found": "zz60"}', b'{"tested": 3, "found": "a57f"}', b'{"tested": 3, "found": ""}',
        b'{"tested": "3", "found": "a560"}',
        b'{"predicted": 1, "before": 2}', b'{"sample": 3, "predicted": "1", "before": 2}', b'{"sample": 3, "predicted": 1, "before": 3}',
        b'{"learned": 2, "kept": 0}', b'{"learned": 2, "kept": true}', b'{"learned": 0, "kept": false}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_the_trails_is_not_gone_on_with(tmp_path, line):
    path = tmp_path / "trail.jsonl"
    lines = [text.encode() for text in written(path)]
    if line[:2] == b'{"':  # whose checksum is right
        line = json.dumps({**json.loads(line), "crc32": zlib.crc32(line)}).encode()
    at = next(n for n, text in enumerate(lines) if b'"sample": 3' in text)
    path.write_bytes(b"".join(text + b"\n" for text in [*lines[:at], line, *lines[at:]]))
    assert not fits(path, 5)


def test_a_changed_value_is_not_gone_on_with(tmp_path):
    path = tmp_path / "trail.jsonl"
    text = "".join(f"{line}\n" for line in written(path))
    for old, new in (('"predicted": 2', '"predicted": 1'), ("a560", "a540"), ('"bytes": 7', '"bytes": 8'), ('"crc32": 1', '"crc32": 2')):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert not fits(path, 5), new
    path.write_text(text)
    assert fits(path, 5)


@contextmanager
def small_disk():
    """While inside, no file can grow beyond 500 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path):
    save_network(tmp_path / "network.pth", {"weight": torch.zeros(1)})
    before = (tmp_path / "network.pth").read_bytes()
    said = r"\.(pth|jsonl): must be writable, got an error \(File too large\); make room or mend its permissions"
    with small_disk(), pytest.raises(InputError, match=said):
        save_network(tmp_path / "network.pth", {"weight": torch.zeros(1000)})
    with small_disk(), pytest.raises(InputError, match=said):
        written(tmp_path / "trail.jsonl")
    assert (tmp_path / "network.pth").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    with Trail(tmp_path / "trail.jsonl", FORM) as trail:
        assert 0 < len(trail.predicted) < 6


def test_a_test_is_on_the_disk_before_the_stream_goes_on(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(json.loads((tmp_path / "trail.jsonl").read_text().splitlines()[-1])))
    written(tmp_path / "trail.jsonl")
    assert [entry["tested"] for entry in synced] == POINTS
