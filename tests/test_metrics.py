import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecl.metrics import (
    FORGETTING_VARIANTS,
    AccuracyMatrix,
    Prequential,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
)
from edgecl_device.errors import InputError

# Worked by hand. Best before the last row: 0.9, 0.9; with the last row: 0.9, 0.95; first: 0.9, 0.8; last: 0.6, 0.95.
HAND = [[0.9], [0.8, 0.8], [0.7, 0.9, 0.6], [0.6, 0.95, 0.5, 1.0]]


def test_hand_worked_matrix():
    matrix = AccuracyMatrix.from_rows(HAND)
    assert average_accuracy(matrix) == pytest.approx((0.6 + 0.95 + 0.5 + 1.0) / 4)
    assert average_incremental_accuracy(matrix) == pytest.approx((0.9 + 0.8 + 2.2 / 3 + 3.05 / 4) / 4)
    assert backward_transfer(matrix) == pytest.approx((-0.3 + 0.15 - 0.1) / 3)
    assert forgetting(matrix, "max_before_last") == pytest.approx((0.3 - 0.05 + 0.1) / 3)
    assert forgetting(matrix, "max_including_last") == pytest.approx((0.3 + 0.0 + 0.1) / 3)
    assert forgetting(matrix, "first_minus_last") == pytest.approx((0.3 - 0.15 + 0.1) / 3)


def test_accuracy_before_a_task_counts_where_it_was_evaluated():
    known_before = AccuracyMatrix.from_rows([[0.9, 0.95, math.nan], [0.8, 0.7], [0.8, 0.6, 1.0]])
    assert forgetting(known_before, "max_before_last") == pytest.approx((0.1 + 0.35) / 2)
    assert forgetting(known_before, "first_minus_last") == pytest.approx((0.1 + 0.1) / 2)


@st.composite
def matrices(draw):
    tasks = draw(st.integers(2, 6))
    accuracy = st.floats(0, 1)
    return [[draw(accuracy) if j <= i or draw(st.booleans()) else math.nan for j in range(tasks)] for i in range(tasks)]


@given(matrices())
def test_matrix_figures_equal_loops_over_the_definitions(rows):
    tasks, last = len(rows), rows[-1]
    matrix = AccuracyMatrix.from_rows(rows)

    def mean_lost(best):
        return sum(best(j) - last[j] for j in range(tasks - 1)) / (tasks - 1)

    def best_of(j, upto):
        return max(rows[i][j] for i in range(upto) if not math.isnan(rows[i][j]))

    assert average_accuracy(matrix) == pytest.approx(sum(last) / tasks)
    assert average_incremental_accuracy(matrix) == pytest.approx(sum(sum(rows[i][: i + 1]) / (i + 1) for i in range(tasks)) / tasks)
    assert forgetting(matrix) == pytest.approx(mean_lost(lambda j: best_of(j, tasks - 1)))
    assert forgetting(matrix, "max_including_last") == pytest.approx(mean_lost(lambda j: best_of(j, tasks)))
    assert forgetting(matrix, "first_minus_last") == pytest.approx(mean_lost(lambda j: rows[j][j]))
    assert backward_transfer(matrix) == pytest.approx(-mean_lost(lambda j: rows[j][j]))
    assert forgetting(matrix, "max_including_last") >= max(0.0, forgetting(matrix)) - 1e-12


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "square"),
        ([[0.9], [0.8]], "diagonal"),
        ([[0.9], [math.nan, 0.8]], "diagonal"),
        ([[90.0], [80.0, 70.0]], "divide percents"),
        ([[0.9], [-0.1, 0.7]], "0 to 1"),
        ([[0.9], [math.inf, 0.7]], "0 to 1"),
        ([[0.9, 0.8, 0.7], [0.9, 0.8]], "row 0 must have at most 2"),
    ],
)
def test_bad_matrix_is_refused(rows, words):
    with pytest.raises(InputError, match=words):
        AccuracyMatrix.from_rows(rows)


def test_matrix_not_square_is_refused():
    with pytest.raises(InputError, match=r"square.*\[2, 3\]"):
        AccuracyMatrix(np.zeros((2, 3)))


def test_matrix_is_a_read_only_copy():
    values = np.eye(2)
    matrix = AccuracyMatrix(values)
    values[0, 0] = 0.5
    assert matrix.values[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 0


def test_one_task_has_no_forgetting():
    single = AccuracyMatrix.from_rows([[0.9]])
    assert average_accuracy(single) == average_incremental_accuracy(single) == 0.9
    for figure in (forgetting, backward_transfer):
        with pytest.raises(InputError, match="at least 2 tasks, got 1"):
            figure(single)


def test_unknown_variant_lists_the_known():
    with pytest.raises(InputError, match=r"max_before_last.*'best'"):
        forgetting(AccuracyMatrix.from_rows(HAND), "best")
    assert set(FORGETTING_VARIANTS) == {"max_before_last", "max_including_last", "first_minus_last"}


def test_hand_worked_prequential():
    running = Prequential(window=3)
    # labels      2  2  1  1  1  2      predictions 2 1 1 1 2 2: right at 1, 3, 4, 6
    # last label  -  2  2  1  1  1      right at 2, 4, 5
    # majority    -  2  2  2  1  1      right at 2, 5 (before the 4th: 2 2 1; before the 5th: 2 1 1)
    for label, predicted in zip([2, 2, 1, 1, 1, 2], [2, 1, 1, 1, 2, 2], strict=True):
        running.update(label, predicted)
    assert running.samples == 6
    assert running.accuracy == pytest.approx(4 / 6)
    assert running.windowed == pytest.approx(2 / 3)
    assert running.last_label == pytest.approx(3 / 6)
    assert running.majority == pytest.approx(2 / 6)


def test_a_sorted_stream_flatters_the_last_label_baseline():
    running = Prequential()
    for label in [0] * 50 + [1] * 50:
        running.update(label, 0)
    assert running.accuracy == 0.5
    assert running.last_label == 0.98


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 8))
def test_prequential_equals_the_definitions(pairs, window):
    running = Prequential(window)
    for label, predicted in pairs:
        running.update(label, predicted)
    labels = [label for label, _ in pairs]
    hits = [label == predicted for label, predicted in pairs]
    majority = 0
    for n in range(1, len(labels)):
        past = labels[max(0, n - window) : n]
        top = max(past.count(label) for label in past)
        newest = next(label for label in past[::-1] if past.count(label) == top)
        majority += labels[n] == newest
    assert running.accuracy == sum(hits) / len(hits)
    assert running.windowed == sum(hits[-window:]) / len(hits[-window:])
    assert running.last_label == sum(a == b for a, b in itertools.pairwise(labels)) / len(labels)
    assert running.majority == majority / len(labels)


def test_prequential_refuses_bad_use():
    with pytest.raises(InputError, match="window: must be at least 1, got 0"):
        Prequential(0)
    for name in ("accuracy", "windowed", "last_label", "majority"):
        with pytest.raises(InputError, match="call update first"):
            getattr(Prequential(), name)
