import itertools
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.streams import ClassIncremental, Dataset, Stream, fashion_mnist_subset
from edgecl_device.errors import InputError

STEPS = [[6], [7], [8], [9]]


def tiny(counts, test_counts=None) -> Dataset:
    """A data set whose samples are their own index; the test samples go on where the training samples end."""
    y = np.repeat(np.arange(len(counts)), counts)
    y_test = np.repeat(np.arange(len(counts)), test_counts or counts)
    x = np.arange(len(y))
    names = tuple(f"class {k}" for k in range(len(counts)))
    return Dataset(x, y, len(y) + np.arange(len(y_test)), y_test, names)


def test_the_subset_is_balanced_and_bears_its_notice():
    data = fashion_mnist_subset()
    assert (data.x.shape, data.x_test.shape) == ((2000, 28, 28), (500, 28, 28))
    assert data.x.dtype == data.x_test.dtype == np.uint8
    assert np.bincount(data.y).tolist() == [200] * 10 and np.bincount(data.y_test).tolist() == [50] * 10
    assert len(data.class_names) == 10 and data.class_names[9] == "Ankle boot"
    train = {image.tobytes() for image in data.x}
    assert len(train) == 2000 and not any(image.tobytes() in train for image in data.x_test)
    # Labels and images belong together: the nearest class mean of raw pixels is right far more often than 10 %.
    mean = np.stack([data.x[data.y == k].mean(0) for k in range(10)])
    distance = ((data.x_test[:, None].astype(np.float64) - mean) ** 2).sum((2, 3))
    assert (distance.argmin(1) == data.y_test).mean() > 0.6
    notice = files("edgecl.streams").joinpath("data/FASHION_MNIST_LICENSE.txt").read_text(encoding="utf-8")
    for words in ("Copyright © 2017 Zalando SE", "Permission is hereby granted, free of charge", "WITHOUT WARRANTY OF ANY KIND"):
        assert words in notice


def test_epochs_repeat_a_group_before_the_next_comes():
    once, stream = (ClassIncremental(tiny([1, 6, 3, 4]), [0], [[1, 2], [3]], seed=5, epochs=epochs) for epochs in (1, 3))
    samples = [(s.task, int(s.x.reshape(-1)[0])) for s in stream]
    assert len(stream) == len(samples) == 3 * len(once) and [task for task, _ in samples] == [1] * 27 + [2] * 12
    passes = [[x for _, x in samples[9 * i : 9 * i + 9]] for i in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) and len({*map(tuple, passes)}) == 3
    assert passes[0] == [int(s.x.reshape(-1)[0]) for s in once if s.task == 1], "one epoch draws as it did"
    with pytest.raises(InputError, match=r"^epochs: must be at least 1, got 0; 1 shows each sample once"):
        ClassIncremental(tiny([2, 2]), [0], [[1]], epochs=0)


def test_class_incremental_on_the_subset():
    data = fashion_mnist_subset()
    stream: Stream = ClassIncremental(data, range(6), STEPS, seed=3)
    x, y = stream.base
    assert Counter(y.tolist()) == dict.fromkeys(range(6), 200)
    assert Counter(image.tobytes() for image in x) == Counter(image.tobytes() for image in data.x[data.y < 6])
    assert not np.array_equal(y, data.y[data.y < 6])
    samples = list(stream)
    assert len(samples) == len(stream) == 800 and stream.tasks == 5
    assert [s.y for s in samples] == [6] * 200 + [7] * 200 + [8] * 200 + [9] * 200
    assert [s.task for s in samples] == [1] * 200 + [2] * 200 + [3] * 200 + [4] * 200
    x_test, y_test = stream.test(0)
    assert len(x_test) == 300 and set(y_test.tolist()) == set(range(6))
    assert np.array_equal(stream.test(2)[0], data.x_test[data.y_test == 7])


@given(st.data())
def test_every_sample_comes_once_with_its_label_and_task(data):
    classes = data.draw(st.integers(2, 6))
    counts = data.draw(st.lists(st.integers(1, 5), min_size=classes, max_size=classes))
    task_of = data.draw(st.lists(st.integers(0, 3), min_size=classes, max_size=classes))
    groups = [[k for k in range(classes) if task_of[k] == task] for task in range(4)]
    groups = [group for group in groups if group]
    dataset = tiny(counts)
    stream = ClassIncremental(dataset, groups[0], groups[1:], seed=data.draw(st.integers(0, 99)))
    samples = list(stream)
    base_x, base_y = stream.base
    assert sorted([*base_x.tolist(), *(int(s.x) for s in samples)]) == list(range(sum(counts)))
    assert np.array_equal(dataset.y[base_x], base_y)
    assert all(dataset.y[s.x] == s.y and s.y in groups[s.task] for s in samples)
    assert [s.task for s in samples] == sorted(s.task for s in samples)
    assert len(stream) == len(samples) and stream.tasks == len(groups)
    tests = [stream.test(task) for task in range(stream.tasks)]
    assert sorted(np.concatenate([x for x, _ in tests]).tolist()) == dataset.x_test.tolist()
    assert all(set(y.tolist()) == set(group) for (_, y), group in zip(tests, groups, strict=True))


def test_order_depends_on_the_seed_alone():
    def order(seed):
        stream = ClassIncremental(tiny([20] * 4), [0], [[1, 2], [3]], seed)
        return [int(s.x) for s in stream], [int(s.x) for s in stream], stream.base[0].tolist()

    first = order(7)
    assert order(7) == first
    assert first[0] == first[1]
    other = order(8)
    assert other[0] != first[0] and other[2] != first[2]


def test_classes_of_a_group_are_mixed():
    labels = [s.y for s in ClassIncremental(tiny([1, 50, 50]), [0], [[1, 2]], seed=0)]
    assert 20 < sum(a != b for a, b in itertools.pairwise(labels)) < 80


def test_orders_are_uniform():
    # Three samples, six orders, each a sixth of 1,200 seeds: chi-squared with 5 degrees of freedom, 1e-4 quantile 25.7.
    data = tiny([1, 3])
    seen = Counter(tuple(int(s.x) for s in ClassIncremental(data, [0], [[1]], seed)) for seed in range(1200))
    assert len(seen) == 6
    assert sum((n - 200) ** 2 / 200 for n in seen.values()) < 25.7


@pytest.mark.parametrize(
    ("base", "steps", "words"),
    [
        ([0], [[]], "every task needs a class"),
        ([0], [[1], [0]], "may be listed once"),
        ([0, 0], [[1]], "may be listed once"),
        ([0], [[1, 5]], r"training samples of each class, got none of \[5\]"),
        ([0], [[2]], r"got none of \[2\]"),
    ],
)
def test_bad_groups_are_refused(base, steps, words):
    with pytest.raises(InputError, match=words):
        ClassIncremental(tiny([2, 2, 0]), base, steps)


@pytest.mark.parametrize("task", [-1, 2])
def test_unknown_task_is_refused(task):
    with pytest.raises(InputError, match=r"task: must be in 0\.\.1, got"):
        ClassIncremental(tiny([2, 2]), [0], [[1]]).test(task)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": np.zeros(3, np.int32)}, r"y: must be int64 \[3\].*got int32"),
        ({"y": np.zeros(2, np.int64)}, r"y: must be int64 \[3\].*got int64 \[2\]"),
        ({"y_test": np.zeros((2, 1), np.int64)}, r"y_test: must be int64 \[2\]"),
        ({"y": np.array([0, 1, 2])}, r"y: labels must be in 0\.\.1, got 0\.\.2"),
        ({"y_test": np.array([0, -1])}, r"y_test: labels must be in 0\.\.1, got -1\.\.0"),
        ({"x_test": np.zeros((2, 5), np.uint8)}, r"x_test: samples must be uint8 \[4\].*got uint8 \[5\]"),
        ({"x_test": np.zeros((2, 4), np.float32)}, "got float32"),
    ],
)
def test_bad_data_set_is_refused(change, words):
    good = {
        "x": np.zeros((3, 4), np.uint8), "y": np.array([0, 1, 1]), "x_test": np.zeros((2, 4), np.uint8), "y_test": np.array([1, 0]),
        "class_names": ("a", "b"),
    }  # fmt: skip
    Dataset(**good)
    with pytest.raises(InputError, match=words):
        Dataset(**{**good, **change})
