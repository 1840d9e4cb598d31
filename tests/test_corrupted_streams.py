"""Streams of corrupted images: their order, their resets, what the images are; and the publisher's files."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from edgecl.evaluate import evaluation_set
from edgecl.streams import CORRUPTIONS, Corrupted, Dataset, corrupt, load_corrupted
from edgecl.streams.shifts import in_runs, in_slots
from edgecl_device.errors import InputError

RNG = np.random.default_rng(0)
CLEAN = RNG.integers(0, 256, (24, 3, 8, 8), np.uint8)
LABELS = np.arange(24) % 3
DATA = Dataset(CLEAN[:5], LABELS[:5], CLEAN, LABELS, ("a", "b", "c"))
NO_BASE = Dataset(CLEAN[:0], LABELS[:0], CLEAN, LABELS, ("a", "b", "c"))
THREE = ["fog", "contrast", "saturate"]


def refused(words):
    return pytest.raises(InputError, match=words)


def visits(stream):
    """Corruption, severity, index and whether a reset comes in front, sample by sample."""
    return [
        (name, part.severity, i, part.reset and k == 0)
        for part in stream.stretches
        for k, (name, i) in enumerate(zip(part.corruption.tolist(), part.index.tolist(), strict=True))
    ]


@pytest.mark.parametrize(
    ("setting", "options"),
    [("reset_each_shift", {}), ("continual", {}), ("mixed", {}), ("correlated", {"run": 4}), ("correlated", {"dirichlet": 0.1})],
)
def test_each_image_meets_each_corruption_once(setting, options):
    stream = Corrupted(DATA, setting, THREE, 4, **options)
    seen = visits(stream)
    assert Counter((name, i) for name, _, i, _ in seen) == {(name, i): 1 for name in THREE for i in range(24)}
    assert {severity for _, severity, _, _ in seen} == {4} and len(stream) == len(seen) == 72
    names = [name for name, _ in groupby(name for name, *_ in seen)]
    assert names == THREE if setting != "mixed" else len(names) > 20
    starts = [k for k, (*_, reset) in enumerate(seen) if reset]
    assert starts == ([0, 24, 48] if setting == "reset_each_shift" else [0])


@pytest.mark.parametrize(("severity", "levels"), [(5, [1, 2, 3, 4, 5, 4, 3, 2, 1]), (2, [1, 2, 1]), (1, [1])])
def test_gradual_rises_and_falls(severity, levels):
    stream = Corrupted(DATA, "gradual", THREE, severity)
    order = [(part.corruption[0], part.severity) for part in stream.stretches]
    assert order == [(name, level) for name in THREE for level in levels]
    assert all(sorted(part.index.tolist()) == list(range(24)) for part in stream.stretches)
    assert [part.reset for part in stream.stretches] == [True] + [False] * (3 * len(levels) - 1)
    assert [part.task for part in stream.stretches] == [task for task in range(3) for _ in levels]
    assert len(stream) == 72 * len(levels) and stream.tasks == 4


def test_the_common_ones_at_the_highest_severity_by_default():
    stream = Corrupted(DATA)
    assert [part.corruption[0] for part in stream.stretches] == list(CORRUPTIONS)
    assert {part.severity for part in stream.stretches} == {5}


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("setting", ["continual", "mixed", "gradual"])
def test_samples_are_the_images_of_their_stretch(layout, setting):
    images = CLEAN if layout == "CHW" else CLEAN.transpose(0, 2, 3, 1)
    stream = Corrupted(Dataset(images[:5], LABELS[:5], images, LABELS, ("a", "b", "c")), setting, THREE, 2, seed=4)
    samples = list(stream)
    assert len(samples) == len(stream)
    for sample, (name, severity, i, _) in zip(samples, visits(stream), strict=True):
        expected = corrupt(CLEAN[i : i + 1].transpose(0, 2, 3, 1), name, severity, seed=4, index=np.array([i]))[0]
        assert np.array_equal(sample.x if layout == "HWC" else sample.x.transpose(1, 2, 0), expected)
        assert sample.y == LABELS[i] and isinstance(sample.y, int)
        assert sample.task == (1 if setting == "mixed" else 1 + THREE.index(name))
    part = stream.stretches[-1]
    some = stream.images(part, slice(3, 9))
    assert some.flags.c_contiguous and np.array_equal(some, stream.images(part)[3:9])


def test_the_seed_alone_decides():
    def made(seed):
        stream = Corrupted(DATA, "mixed", ["gaussian_noise", "fog"], seed=seed)
        return b"".join(sample.x.tobytes() for sample in stream)

    assert made(1) == made(1) != made(2)


def test_tasks_and_their_tests():
    stream = Corrupted(DATA, corruptions=THREE, severity=3)
    x, y = stream.base
    assert stream.tasks == 4 and sorted(x[:, 0, 0, 0].tolist()) == sorted(CLEAN[:5, 0, 0, 0].tolist()) and len(y) == 5
    assert np.array_equal(stream.test(0)[0], CLEAN) and stream.choices(2) is None
    for task, name in enumerate(THREE, start=1):
        images, labels = stream.test(task)
        expected = corrupt(CLEAN.transpose(0, 2, 3, 1), name, 3).transpose(0, 3, 1, 2)
        assert np.array_equal(images, expected) and np.array_equal(labels, LABELS)
    with refused(r"task: must be in 0\.\.3, got 4"):
        stream.test(4)
    alone = Corrupted(NO_BASE, corruptions=THREE, severity=3)
    assert alone.tasks == 3 and len(alone.base[0]) == 0 and next(iter(alone)).task == 0
    assert np.array_equal(alone.test(0)[0], stream.test(1)[0])
    assert [len(y) for _, y in evaluation_set(stream, per_task=6)] == [6] * 4


def test_mixed_is_tested_with_each_corruption_alike():
    stream = Corrupted(NO_BASE, "mixed", THREE, 3)
    images, labels = stream.test(0)
    assert stream.tasks == 1 and np.array_equal(labels, LABELS)
    for k, name in enumerate(THREE):
        mine = np.arange(24) % 3 == k
        expected = corrupt(CLEAN.transpose(0, 2, 3, 1), name, 3).transpose(0, 3, 1, 2)
        assert np.array_equal(images[mine], expected[mine])


def test_values_and_labels_pass_as_they_are():
    y = RNG.normal(size=(24, 2)).astype(np.float32)
    stream = Corrupted(Dataset(CLEAN, y, CLEAN, y, ("u", "v"), kind="vector"), corruptions=["fog"])
    assert all(np.array_equal(sample.y, y[i]) for sample, i in zip(stream, stream.stretches[0].index, strict=True))


# --- orders ----------------------------------------------------------------------------------------------------------


def lengths(labels):
    """How often each class comes in a row."""
    return [(label, len(list(group))) for label, group in groupby(labels.tolist())]


@pytest.mark.parametrize(("counts", "run"), [([100] * 10, 16), ([100] * 10, 100), ([50, 31, 90], 30), ([7, 9], 1)])
def test_runs_last(counts, run):
    y = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    for seed in range(5):
        order = in_runs(y, run, np.random.default_rng(seed))
        assert sorted(order.tolist()) == list(range(len(y)))
        found = lengths(y[order])
        assert min(length for _, length in found) >= run
        assert len(found) >= len(counts)
        if len(set(counts)) == 1:  # every class has as many runs, and none follows itself
            assert len(found) == sum(count // run for count in counts) and max(length for _, length in found) < 2 * run
    assert not np.array_equal(order, in_runs(y, run, np.random.default_rng(99))) or run == 1


def test_the_stream_has_long_runs():
    y = np.repeat(np.arange(3), 40)
    x = np.zeros((120, 3, 8, 8), np.uint8)
    stream = Corrupted(Dataset(x, y, x, y, ("a", "b", "c")), "correlated", THREE, run=20)
    for part in stream.stretches:
        assert [length for _, length in lengths(y[part.index])] == [20] * 6
    assert not np.array_equal(stream.stretches[0].index, stream.stretches[1].index)


def test_slots_of_a_dirichlet_distribution():
    y = np.random.default_rng(2).permutation(np.repeat(np.arange(10), 200))
    mean_length = {}
    for concentration in (0.001, 0.1, 1000.0):
        orders = [in_slots(y, concentration, np.random.default_rng(seed)) for seed in range(5)]
        assert all(sorted(order.tolist()) == list(range(2000)) for order in orders)
        mean_length[concentration] = 5 * 2000 / sum(len(lengths(y[order])) for order in orders)
    # A class lies in one slot, but for one draw in twenty; in a few; in all ten alike.
    assert 150 < mean_length[0.001] <= 210 and 30 < mean_length[0.1] < 60 and 19 < mean_length[1000.0] < 24
    even = in_slots(y, 1e6, np.random.default_rng(3))
    assert all(abs(count - 20) <= 2 for count in Counter(y[even][:200].tolist()).values())


# --- files -----------------------------------------------------------------------------------------------------------

IMAGES = RNG.integers(0, 256, (2, 30, 8, 8, 3), np.uint8)


def write(folder, labels=None, **images):
    np.save(folder / "labels.npy", np.tile(np.arange(6, dtype=np.uint8) % 3, 5) if labels is None else labels)
    for name, array in ({"fog": IMAGES[0], "spatter": IMAGES[1]} | images).items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_files(tmp_path):
    files = load_corrupted(write(tmp_path))
    assert files.labels.tolist() == [0, 1, 2, 0, 1, 2] and files.labels.dtype == np.int64 and list(files.arrays) == ["fog", "spatter"]
    for k, name in enumerate(files.arrays):
        for severity in range(1, 6):
            got = files.images(name, severity, np.array([5, 0]))
            assert np.array_equal(got, IMAGES[k][[6 * (severity - 1) + 5, 6 * (severity - 1)]]) and type(got) is np.ndarray
    with refused(r"corruption: must be one of those in .*, fog, spatter, got 'frost'; put frost\.npy there"):
        files.images("frost", 1, np.array([0]))
    with refused("severity: must be from 1 to 5, got 0"):
        files.images("fog", 0, np.array([0]))
    with refused(r"index: must be in 0\.\.5, got 2\.\.6"):
        files.images("fog", 1, np.array([2, 6]))


def test_a_stream_from_files(tmp_path):
    files = load_corrupted(write(tmp_path))
    x, y = np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 2, 0])  # the first four of six test images
    stream = Corrupted(Dataset(x, y, x, y, ("a", "b", "c")), "gradual", ["spatter", "fog"], 3, files=files)
    for sample, (name, severity, i, _) in zip(stream, visits(stream), strict=True):
        expected = IMAGES[["fog", "spatter"].index(name)][6 * (severity - 1) + i]
        assert np.array_equal(sample.x.transpose(1, 2, 0), expected) and sample.y == y[i]
    assert np.array_equal(stream.test(2)[0].transpose(0, 2, 3, 1), IMAGES[0][12:16])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.arange(12)}, r"labels\.npy: must be integers, five times as many as .*, got int64 \[12\]; the file is damaged"),
        ({"labels": np.zeros((5, 6), int)}, r"got int64 \[5, 6\]"),
        ({"labels": np.zeros(30)}, r"got float64 \[30\]"),
        ({"labels": np.zeros(0, int)}, r"got int64 \[0\]"),
        ({"labels": np.arange(30)}, r"labels\.npy: must have the same labels from 0 for each of the five severities"),
        ({"labels": np.full(30, -1)}, "the same labels from 0"),
        ({"fog": IMAGES[0].astype(np.float32)}, r"fog\.npy: must be uint8 \[30, H, W, 3\], an image for each label, got float32"),
        ({"fog": IMAGES[0][:29]}, r"got uint8 \[29, 8, 8, 3\]"),
        ({"fog": IMAGES[0].transpose(0, 3, 1, 2)}, r"got uint8 \[30, 3, 8, 8\]"),
        ({"fog": np.array([{}], object)}, r"fog\.npy: must be an npy file of a plain array, got .*; the file is damaged"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, change, words):
    with refused(words):
        load_corrupted(write(tmp_path, **change))


def test_missing_and_cut_files_are_refused(tmp_path):
    with refused("folder: must be a folder"):
        load_corrupted(tmp_path / "none")
    with refused(r"labels\.npy: must be there, got no such file"):
        load_corrupted(tmp_path)
    np.save(tmp_path / "labels.npy", np.zeros(30, int))
    with refused(r"must have gaussian_noise\.npy and the like or some of them, got none; unpack the archive there"):
        load_corrupted(tmp_path)
    write(tmp_path)
    whole = (tmp_path / "fog.npy").read_bytes()
    for content in (whole[:-100], whole[:20], b"", b"nothing"):
        (tmp_path / "fog.npy").write_bytes(content)
        with refused(r"fog\.npy: must be an npy file of a plain array"):
            load_corrupted(tmp_path)


# --- what does not fit -----------------------------------------------------------------------------------------------

GREY = np.zeros((6, 28, 28), np.uint8)
ONES = np.zeros((3, 1), np.uint8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Corrupted(Dataset(GREY, LABELS[:6], GREY, LABELS[:6], ("a", "b", "c"))), r"dataset: .*got uint8 \[6, 28, 28\]"),
        (lambda: Corrupted(Dataset(CLEAN / 255, LABELS, CLEAN / 255, LABELS, ("a", "b", "c"))), "got float64"),
        (lambda: Corrupted(Dataset(CLEAN, LABELS, CLEAN[:0], LABELS[:0], ("a", "b", "c"))), r"got uint8 \[0, 3, 8, 8\]"),
        (lambda: Corrupted(DATA, "sudden"), "setting: must be one of reset_each_shift, .*correlated, got 'sudden'; name one"),
        (lambda: Corrupted(DATA, corruptions=[]), r"corruptions: must be different names, one at least, got \[\]"),
        (lambda: Corrupted(DATA, corruptions="fog"), "got 'fog'; pass a list"),
        (lambda: Corrupted(DATA, corruptions=["fog", "fog"]), "must be different names"),
        (lambda: Corrupted(DATA, corruptions=["rain"]), "corruptions: must be one of gaussian_noise, .*got 'rain'"),
        (lambda: Corrupted(DATA, severity=7), "severity: must be from 1 to 5, got 7"),
        (lambda: Corrupted(DATA, seed=-2), "seed: must be at least 0, got -2"),
        (lambda: Corrupted(DATA, "correlated"), r"run, dirichlet: one of them must be given for the setting correlated, .*got \{\}"),
        (lambda: Corrupted(DATA, "correlated", run=2, dirichlet=0.1), r"got \{'run': 2, 'dirichlet': 0.1\} for correlated"),
        (lambda: Corrupted(DATA, run=2), r"none for others, got \{'run': 2\} for continual"),
        (lambda: Corrupted(DATA, "correlated", run=0), "run: must be at least 1 image, got 0"),
        (lambda: Corrupted(DATA, "correlated", run=9), "run: must be at most 8, the test images of class 0, got 9; take shorter"),
        (lambda: Corrupted(DATA, "correlated", dirichlet=0.0), "dirichlet: must be finite in float32 and above 0, got 0.0"),
        (lambda: Corrupted(DATA, "correlated", dirichlet=1e-6), "dirichlet: must be at least 0.001, got 1e-06"),
        (
            lambda: Corrupted(Dataset(CLEAN[:3], ONES, CLEAN[:3], ONES, ("a",), kind="multilabel"), "correlated", run=1),
            "correlated needs one class a sample",
        ),
    ],
)
def test_streams_that_do_not_fit_are_refused(make, words):
    with refused(words):
        make()


def test_files_that_do_not_fit_are_refused(tmp_path):
    files = load_corrupted(write(tmp_path))

    def stream(x, y, **options):
        return Corrupted(Dataset(x, y, x, y, ("a", "b", "c")), corruptions=["fog"], **{"files": files} | options)

    with refused(r"files: must have the labels of the data set's 4 test images in their order, got 6 that differ"):
        stream(CLEAN[:4], np.array([0, 1, 2, 1]))
    with refused("the data set's 24 test images"):
        stream(CLEAN, LABELS)
    with refused(r"files: images must be 16 x 8 as in the data set, got \(8, 8\) of fog; take the files of this set"):
        stream(np.zeros((4, 3, 16, 8), np.uint8), LABELS[:4])
    with refused(r"corruptions: must be among fog, spatter in .*, got 'frost'; leave it out"):
        Corrupted(Dataset(CLEAN[:4], LABELS[:4], CLEAN[:4], LABELS[:4], ("a", "b", "c")), corruptions=["frost"], files=files)
