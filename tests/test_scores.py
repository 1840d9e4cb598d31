"""Scores of labels, values and maps against their definitions written out, and what an archive's arrays are taken for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecl.evaluate import run_stream
from edgecl.metrics import average_precision, mean_average_precision
from edgecl.scoring import SCORINGS
from edgecl.streams import Dataset, OneTask, TimeOrdered, load_arrays
from edgecl_device.errors import InputError


def totals(kind, outcomes, targets, ignore=None, outputs=3):
    scoring = SCORINGS[kind](outputs, ignore)
    sums = np.sum([scoring.sums(outcome, y) for outcome, y in zip(outcomes, targets, strict=True)], 0)
    reference = scoring.reference(targets)
    return scoring.score(sums, reference), scoring.figures(sums, reference, len(targets)), scoring.parts(sums, reference, len(targets))


def test_labels_by_hand():
    """Label 0: 2 hits of 3 present, none false. Label 1: one false. Label 2: never there, once predicted."""
    targets = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]], np.uint8)
    score, figures, parts = totals("multilabel", [(0,), (0, 1), (1, 2), np.array([1])], targets)
    assert score == figures["micro_f1"] == 2 * 4 / (2 * 4 + 2 + 1)
    assert parts["f1"] == [pytest.approx(4 / 5), pytest.approx(4 / 5), None] and figures["macro_f1"] == pytest.approx(4 / 5)
    assert figures["hamming_loss"] == 3 / 12 and figures["label_accuracy"] == 9 / 12 and figures["exact_match"] == 3 / 4
    assert parts["label_accuracy"] == [3 / 4, 3 / 4, 3 / 4]
    assert totals("multilabel", [(0,)], np.zeros((1, 3)))[0] is None


def test_values_by_hand():
    targets = np.array([[0, 1, 5], [2, 1, 7], [4, 1, 9]], np.float32)
    found = np.array([[1, 1, 5], [2, 0, 7], [3, 1, 9]], np.float32)
    score, figures, parts = totals("vector", found, targets)
    assert parts == {"r2": [1 - 2 / 8, None, 1.0], "mse": [2 / 3, 1 / 3, 0.0], "mae": [2 / 3, 1 / 3, 0.0]}
    assert score == figures["r2"] == (0.75 + 1) / 2 and figures["mse"] == figures["mae"] == pytest.approx(1 / 3)
    mean = np.tile(targets.mean(0), (3, 1))
    assert totals("vector", mean, targets)[0] == 0 and totals("vector", targets, targets)[0] == 1
    assert totals("vector", [np.zeros(3)], targets[:1])[0] is None


def test_maps_by_hand():
    """Class 2 is not there; an ignored pixel counts neither as hit nor as prediction."""
    targets = np.array([[[0, 0], [1, 9]], [[0, 1], [1, 9]]], np.uint8)
    found = [np.array([[0, 1], [1, 1]]), np.array([[0, 2], [1, 0]])]
    score, figures, parts = totals("map", found, targets, ignore=9)
    assert parts["iou"] == [pytest.approx(2 / 3), pytest.approx(2 / 4), None] and score == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert figures == {"mean_iou": score, "pixel_accuracy": pytest.approx(4 / 6)}
    nothing = totals("map", [None, found[1]], targets, ignore=9)
    assert nothing[1]["pixel_accuracy"] == pytest.approx(2 / 6) and nothing[2]["iou"][0] == pytest.approx(1 / 3)
    assert totals("map", [None], np.full((1, 2, 2), 9, np.uint8), ignore=9)[0] is None


@pytest.mark.parametrize("ignore", [255, -1, 0])
def test_a_repeated_map_predicts_nothing_where_it_was_ignored(ignore):
    """Ignored pixels lie elsewhere in every map, as they do in practice; of the three that count one is unknown, one right, one wrong."""
    before = np.array([[ignore, 1], [2, 1]], np.int16)
    sums = SCORINGS["map"](3, ignore).sums(before, np.array([[2, 1], [1, ignore]], np.int16))
    hits, predicted = sums[:3], sums[3:]
    assert hits.tolist() == [0, 1, 0] and predicted.tolist()[1:] == [1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
def test_average_precision_is_the_sum_over_thresholds(samples):
    """At every distinct score as threshold: what is at or above it is retrieved."""
    scores, present = np.array([s for s, _ in samples], float), np.array([p for _, p in samples])
    wanted, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        retrieved = scores >= threshold
        hits = sum(p for p, r in zip(present, retrieved, strict=True) if r)
        if present.any():
            recall = hits / present.sum()
            wanted += (recall - before) * hits / retrieved.sum()
            before = recall
    found = average_precision(scores, present)
    assert (found is None) == (not present.any())
    assert found is None or math.isclose(found, wanted)
    both = mean_average_precision(np.stack([scores, scores], 1), np.stack([present, np.zeros_like(present)], 1))
    assert both == found  # the label that no sample has does not count


X = np.zeros((10, 2, 3), np.float32)
PLACES = {"group": np.array(["a", "b"] * 5)}


@pytest.mark.parametrize(
    ("y", "options", "kind", "names"),
    [
        (np.arange(10) % 3, {}, "class", ("0", "1", "2")),
        (np.arange(10) % 2 == 0, {"target": "class"}, "class", ("0", "1")),
        (np.eye(10, 4, dtype=np.int64), {}, "multilabel", tuple("0123")),
        (np.eye(10, 4), {"target": "multilabel"}, "multilabel", tuple("0123")),
        (np.eye(10, 4), {"target": "vector"}, "vector", tuple("0123")),
        (np.arange(10) / 4, {}, "vector", ("0",)),
        (np.arange(10), {"target": "vector"}, "vector", ("0",)),
        (np.full((10, 4, 4), 2, np.int32), {}, "map", ("0", "1", "2")),
        (np.full((10, 4, 4), 255, np.uint8), {"ignore": 255}, "map", ("0", "1")),
    ],
)
def test_shape_and_type_say_what_a_target_is(tmp_path, y, options, kind, names):
    np.savez(tmp_path / "a.npz", x=X, y=y, **PLACES)
    data = load_arrays(tmp_path / "a.npz", **options)
    assert (data.kind, data.class_names, data.group_names) == (kind, names, ("a", "b"))
    assert len(data.y) == 8 and data.group_test.tolist() == [0, 1]
    assert np.array_equal(data.y_test.reshape(2, -1), y[[8, 9]].reshape(2, -1))  # the fifth of each place


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"y": np.eye(10, 4)}, {}, "data.target: must be said for floats that are all 0 or 1"),
        ({"y": np.full((10, 4), 2)}, {}, r"y: must be integers \[N\], .*got int64 \[8, 4\] beyond 0 and 1; convert it"),
        ({"y": np.full((10, 4), 2)}, {"target": "multilabel"}, "y: labels must be 0 or 1, got"),
        ({"y": np.full((10, 2), np.nan)}, {}, "y: values must be finite"),
        ({"y": np.zeros((10, 2, 2), int) - 1}, {}, r"y: pixels must be in 0\.\.1, got \[-1\]"),
        ({"y": np.zeros(10, int)}, {"ignore": 3}, "ignore: is for targets of kind map, got 3 for class"),
        ({"y": np.zeros(9)}, {}, "y: must have one entry for each of the 10 samples"),
        ({"y": np.zeros(10), "x": X.astype(np.float64)}, {}, r"x: must be float32 or uint8 \[N, \.\.\.\], got float64"),
        ({"y": np.zeros(10), "x_test": X}, {}, r"x_test, y_test: must be given together, it lacks \['y_test'\]"),
        ({"y": np.zeros(10)}, {"test_share": 0.0}, "test_share: must be a share above 0"),
        ({"y": np.zeros(10)}, {"test_share": 1e-320, "threshold": 0.3}, "data.threshold: is for targets of kind multilabel, got 0.3 for v"),
        (
            {"y": np.zeros(10), "x_test": X, "y_test": np.zeros(10)},
            {"test_share": 0.3},
            "data.test_share: is for a file without a test set",
        ),
        ({"y": np.array(5.0)}, {}, r"y: must have one entry for each sample, got float64 \[\]; reshape it"),
        ({"y": np.zeros(10), "x_test": X, "y_test": np.array(0.0)}, {}, r"y_test: must have one entry for each sample, got float64 \[\]"),
        ({"y": np.zeros(10), "group": np.array("a")}, {}, r"group: must have one entry for each sample, got <U1 \[\]"),
        ({"y": np.zeros(10), "group": np.array([["a", "b"]] * 10)}, {}, r"group: must have one entry for each sample, got <U1 \[10, 2\]"),
        ({"y": np.zeros((10, 2)) + 0.5, "class_names": np.array(["only"])}, {}, r"y: must be float32 \[8, 1\] for targets of kind vector"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, options, words):
    np.savez(tmp_path / "a.npz", **{"x": X, **changes})
    with pytest.raises(InputError, match=f"a.npz: {words}"):
        load_arrays(tmp_path / "a.npz", **options)


@pytest.mark.parametrize(("share", "held"), [(0.2, 20), (0.3, 30), (0.35, 35), (0.4, 40), (0.5, 50), (0.01, 1), (1e-320, 0)])
def test_the_share_that_is_asked_for_is_held_out(tmp_path, share, held):
    x = np.arange(100, dtype=np.float32)[:, None]
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(100) / 4)
    data = load_arrays(tmp_path / "a.npz", test_share=share)
    assert len(data.x_test) == held and sorted([*data.x[:, 0], *data.x_test[:, 0]]) == list(range(100))
    gaps = np.diff(data.x_test[:, 0])
    assert held < 2 or gaps.max() - gaps.min() <= 1  # evenly spaced


def test_shares_and_splits_are_checked():
    data = Dataset(X, np.zeros((10, 2), np.float32), X, np.zeros((10, 2), np.float32), ("a", "b"), kind="vector")
    for make in (TimeOrdered, OneTask):
        with pytest.raises(InputError, match=r"base_share: must be a share from 0 to below 1, got 1\.0"):
            make(data, base_share=1.0)
    with pytest.raises(InputError, match=r"splits: must be from 1 to 5"):
        TimeOrdered(data, 0.5, 6)
    few = Dataset(X, np.zeros((10, 2), np.float32), X[:1], np.zeros((1, 2), np.float32), ("a", "b"), kind="vector")
    with pytest.raises(InputError, match=r"^base_share: must leave the base set a test sample, got 0\.3 of 1; raise it, or pass 0"):
        TimeOrdered(few, 0.3)
    alone = TimeOrdered(data, 0.04)
    assert not len(alone.base[0]) and len(alone.test(0)[0]) == 10, "no base set, and no test sample is left out"
    with pytest.raises(InputError, match=r"^scoring: must be given for targets of shape \[2\], got None; pass dataset\.scoring\(\)"):
        run_stream(None, OneTask(data))  # before anything is asked of the learner
    sample = next(iter(OneTask(data)))
    assert sample.task == 0 and sample.y.shape == (2,)
