"""Every scenario on data sets whose samples are their own index, against the properties that define it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from edgecl.runs.registry import make_stream
from edgecl.streams import Blurry, ClassIncremental, Dataset, DomainIncremental, Recurring, Stream, TaskIncremental
from edgecl_device.errors import InputError


def tiny(cells, groups=True):
    """``cells[k][g]`` samples of class k and group g, mixed; the test set is as large, its samples go on counting."""
    pairs = [(k, g) for k, row in enumerate(cells) for g, count in enumerate(row) for _ in range(count)]
    pairs = np.array(pairs, np.int64).reshape(-1, 2)[np.random.default_rng(0).permutation(len(pairs))]
    y, group = pairs[:, 0].copy(), pairs[:, 1].copy()
    grouped = (group, group, tuple(f"group {g}" for g in range(len(cells[0])))) if groups else ()
    return Dataset(np.arange(len(y)), y, len(y) + np.arange(len(y)), y, tuple(f"class {k}" for k in range(len(cells))), *grouped)


def check(stream: Stream, data: Dataset, classes_or_groups, expected_tests, everything=True):
    """What holds for every stream; returns the samples' indices by task, base set first."""
    samples = list(stream)
    base_x, base_y = stream.base
    first = 1 if len(base_x) else 0
    by_task = [base_x.tolist()] * first + [[int(s.x) for s in samples if s.task == task] for task in range(first, stream.tasks)]
    seen = [i for part in by_task for i in part]
    assert len(set(seen)) == len(seen)  # each sample at most once
    assert not everything or sorted(seen) == np.flatnonzero(np.isin(classes_or_groups, [*expected_tests])).tolist()
    assert np.array_equal(data.y[base_x], base_y) and all(data.y[s.x] == s.y for s in samples)
    assert [s.task for s in samples] == sorted(s.task for s in samples) and all(by_task)
    assert len(stream) == len(samples)
    assert [int(s.x) for s in stream] == [int(s.x) for s in samples]
    for task in range(stream.tasks):
        x, y = stream.test(task)
        assert np.array_equal(data.y_test[x - len(data.y)], y)
    for task in (-1, stream.tasks):
        for ask in (stream.test, stream.choices):
            with pytest.raises(InputError, match=rf"task: must be in 0\.\.{stream.tasks - 1}, got {task}"):
                ask(task)
    return by_task


def drawn_parts(data, count):
    """A split of some of 0..count-1 in a base part, that may be empty, and at least one more."""
    place = data.draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count))
    parts = [[k for k in range(count) if place[k] == part] for part in range(4)]
    steps = [part for part in parts[1:] if part]
    return (parts[0], steps) if steps else ([], [list(range(count))])


@given(st.data())
def test_class_and_task_incremental(data):
    cells = data.draw(st.lists(st.tuples(st.integers(1, 4)), min_size=2, max_size=6))
    dataset = tiny(cells, groups=False)
    base, steps = drawn_parts(data, len(cells))
    groups = [*([base] if base else []), *steps]
    for scenario in (ClassIncremental, TaskIncremental):
        stream = scenario(dataset, base, steps, data.draw(st.integers(0, 9)))
        by_task = check(stream, dataset, dataset.y, [k for group in groups for k in group])
        for task, group in enumerate(groups):
            assert set(dataset.y[by_task[task]].tolist()) == set(group)
            assert set(stream.test(task)[1].tolist()) == set(group)
            assert stream.choices(task) == (group if scenario is TaskIncremental else None)


@given(st.data())
def test_domain_incremental(data):
    classes, domains = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 5))
    cells = data.draw(st.lists(st.lists(st.integers(1, 3), min_size=domains, max_size=domains), min_size=classes, max_size=classes))
    dataset = tiny(cells)
    base, steps = drawn_parts(data, domains)
    in_order = data.draw(st.booleans())
    stream = DomainIncremental(dataset, base, steps, data.draw(st.integers(0, 9)), in_order)
    groups = [*([base] if base else []), *steps]
    by_task = check(stream, dataset, dataset.group, [g for part in groups for g in part])
    for task, part in enumerate(groups):
        assert set(dataset.group[by_task[task]].tolist()) == set(part)
        assert stream.test(task)[0].tolist() == (len(dataset.y) + np.flatnonzero(np.isin(dataset.group_test, part))).tolist()
        assert not in_order or (base and task == 0) or by_task[task] == sorted(by_task[task])


@given(st.data())
def test_blurry(data):
    classes = data.draw(st.integers(2, 8))
    dataset = tiny([[data.draw(st.integers(3, 6))] for _ in range(classes)], groups=False)
    base = data.draw(st.sampled_from([[], [0]]))
    rest = classes - len(base)
    disjoint, seed = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])), data.draw(st.integers(0, 9))
    splits = data.draw(st.integers(1, rest))
    try:
        stream = Blurry(dataset, splits, disjoint, 0.25, base, seed)
    except InputError as error:  # all samples of a small task may be dealt to others, and none to it
        assert disjoint < 1 and splits > 1 and str(error).startswith("blurred: every task must keep a sample, got none in [")
        reject()
    by_task = check(stream, dataset, dataset.y, range(classes))
    homes = [*([tuple(base)] if base else []), *stream.home_classes]
    assert sorted(k for home in homes for k in home) == list(range(classes)) and all(homes)
    assert len(set(stream.disjoint_classes)) == len(stream.disjoint_classes) == round(disjoint * rest)
    assert not set(base) & set(stream.disjoint_classes)
    away = [dataset.y[i] for task, part in enumerate(by_task) for i in part if dataset.y[i] not in homes[task]]
    assert not set(away) & {*base, *stream.disjoint_classes}
    blurry = int(np.isin(dataset.y, [*base, *stream.disjoint_classes], invert=True).sum())
    assert len(away) <= round(0.25 * blurry)
    for task, home in enumerate(homes):
        assert set(stream.test(task)[1].tolist()) == set(home)
    again = Blurry(dataset, stream.splits, disjoint, 0.25, base, seed)
    assert [int(s.x) for s in again] == [int(s.x) for s in stream] and again.home_classes == stream.home_classes


def test_blurry_shares_are_the_papers():
    data = tiny([[100]] * 40, groups=False)
    outside, sizes = [], []
    for seed in range(20):
        stream = Blurry(data, splits=5, seed=seed)
        assert len(stream.disjoint_classes) == 20
        home = {k: task for task, classes in enumerate(stream.home_classes) for k in classes}
        outside.append(sum(home[s.y] != s.task for s in stream))
        sizes += [len(classes) for classes in stream.home_classes]
    # 200 of the 2,000 blurry samples are dealt anew; four in five of them leave home, when all tasks are alike.
    assert max(outside) <= 200 and 100 < np.mean(outside) < 190
    assert len(set(sizes)) > 8  # split sizes are random


def test_blurry_without_blur_and_all_blur():
    data = tiny([[50]] * 6, groups=False)
    plain = Blurry(data, splits=3, blurred=0.0, seed=1)
    assert all(s.y in plain.home_classes[s.task] for s in plain)
    mixed = Blurry(data, splits=3, disjoint=0.0, blurred=1.0, seed=1)
    assert len({(s.task, s.y) for s in mixed}) > 6 and mixed.disjoint_classes == ()


@given(st.data())
def test_recurring(data):
    by = data.draw(st.sampled_from(["class", "group"]))
    dataset = tiny([[4, 5, 6], [7, 8, 9], [5, 5, 4]])
    values = dataset.y if by == "class" else dataset.group
    part = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
    base, visits = data.draw(st.just([]) | part), data.draw(st.lists(part, min_size=1, max_size=4))
    stream = Recurring(dataset, base, visits, by, data.draw(st.integers(0, 9)))
    parts = [*([base] if base else []), *visits]
    by_task = check(stream, dataset, values, {value for part in parts for value in part})
    for value in range(3):
        shares = [Counter(values[mine].tolist())[value] for mine, part in zip(by_task, parts, strict=True) if value in part]
        assert not shares or max(shares) - min(shares) <= 1
    for task, part in enumerate(parts):
        assert set(values[by_task[task]].tolist()) == set(part)
        assert stream.test(task)[0].tolist() == (len(values) + np.flatnonzero(np.isin(values, part))).tolist()


def test_the_shares_of_visits_are_drawn_at_random():
    stream = Recurring(tiny([[100]]), [], [[0], [0]])
    early = [int(s.x) for s in stream if s.task == 0]
    assert len(early) == 50 and 10 < sum(i < 50 for i in early) < 40


@pytest.mark.parametrize(
    "make",
    [
        lambda data, seed: ClassIncremental(data, [0], [[1, 2]], seed),
        lambda data, seed: DomainIncremental(data, [0], [[1, 2]], seed),
        lambda data, seed: Blurry(data, 2, base_classes=[0], seed=seed),
        lambda data, seed: Recurring(data, [0], [[1], [0, 2]], seed=seed),
    ],
)
def test_the_seed_alone_decides_the_order(make):
    data = tiny([[9, 9, 9]] * 3)

    def order(seed):
        return [*make(data, seed).base[0].tolist(), *(int(s.x) for s in make(data, seed))]

    assert order(3) == order(3)
    assert order(3) != order(4) and sorted(order(3)) == sorted(order(4))


DATA = tiny([[2, 2], [2, 1], [1, 0]])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DomainIncremental(tiny([[3]] * 2, groups=False), [], [[0]]), "dataset: must have groups"),
        (lambda: DomainIncremental(DATA, [0], [[2]]), r"base_groups, steps: .*training samples of each group, got none of \[2\]"),
        (lambda: DomainIncremental(DATA, [0], [[1], [0]]), "each group may be listed once"),
        (lambda: DomainIncremental(DATA, [0], [[]]), "every task needs a group"),
        (
            lambda: make_stream("domain-incremental", {"base_groups": [0], "steps": []}, DATA, 0),
            "scenario: .*at least one sample.* got none",
        ),
        (lambda: make_stream("recurring", {"base_values": [0], "visits": []}, DATA, 0), "scenario: .*at least one sample"),
        (lambda: Blurry(DATA, 2, disjoint=50), "disjoint: must be a share from 0 to 1, got 50; divide percents"),
        (lambda: Blurry(DATA, 2, blurred=-0.1), "blurred: must be a share"),
        (lambda: Blurry(DATA, 4), "splits: must be from 1 to 3, the classes of the stream, got 4"),
        (lambda: Blurry(DATA, 0), "got 0"),
        (lambda: Blurry(DATA, 2, base_classes=[3]), r"base_classes: .*got none of \[3\]"),
        (lambda: [Blurry(DATA, 3, 0.0, 1.0, seed=seed) for seed in range(20)], r"every task must keep a sample, got none in \["),
        (lambda: Recurring(DATA, [], [[0], []]), "every visit needs values"),
        (lambda: Recurring(DATA, [], [[0, 0]]), "each listed once in it"),
        (lambda: Recurring(DATA, [3], [[0]]), r"training samples of each class, got none of \[3\]"),
        (lambda: Recurring(DATA, [2], [[2]]), "visits: class 2 must have a sample for each of 2 visits, got 1"),
        (lambda: Recurring(DATA, [], [[0]], by="user"), "by: must be 'class' or 'group', got 'user'"),
        (lambda: Recurring(tiny([[3]], groups=False), [], [[0]], by="group"), "dataset: must have groups"),
    ],
)
def test_what_cannot_be_streamed_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
