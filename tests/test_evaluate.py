"""Runs over streams with a learner that is written out here, so that every figure can be worked by hand."""

import re
from pathlib import Path

import numpy as np
import pytest

from edgecl.evaluate import evaluation_set, figures, run_stream
from edgecl.metrics import FORGETTING_VARIANTS
from edgecl.streams import ClassIncremental, Dataset, Recurring, TaskIncremental
from edgecl_device.errors import InputError
from edgecl_device.manifest import UNSEEN_SCORE
from edgecl_device.reports import LearnReport, Prediction


class Greedy:
    """Scores the classes by how lately they were learned, whatever the sample; remembers what it was asked."""

    def __init__(self, classes, known=()):
        self.scores = np.full(classes, UNSEEN_SCORE, np.float32)
        self.asked, self.learned = [], []
        for k in known:
            self.scores[k] = 0

    def predict(self, x):
        self.asked.append(int(x))
        best = int(self.scores.argmax())
        return Prediction(self.scores.copy(), best if self.scores[best] > UNSEEN_SCORE else None, None, 0)

    def learn(self, x, y):
        predicted = self.predict(x).label
        self.asked.pop()
        self.learned.append(int(x))
        self.scores[y] = len(self.learned)
        return LearnReport(0, 0.0, predicted, y, {}, 0, 10, 0.5)


def tiny(per_class=4, classes=4, test=2):
    y, y_test = np.repeat(np.arange(classes), per_class), np.repeat(np.arange(classes), test)
    return Dataset(np.arange(len(y)), y, 100 + np.arange(len(y_test)), y_test, tuple(map(str, range(classes))))


def test_evaluations_come_before_on_the_beat_and_at_every_end():
    stream = ClassIncremental(tiny(), [0, 1], [[2], [3]])
    result = run_stream(Greedy(4, known=[0]), stream, every=3)
    assert result.samples == [0, 3, 4, 6, 8]
    assert result.trace.current.tolist() == [0, 1, 1, 2, 2]
    # It knows class 0, of the two in task 0; then the latest class alone.
    assert result.matrix.values.tolist() == [[0.5, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert result.trace.values.tolist() == [[0.5, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert result.curve == {"samples": [0, 3, 4, 6, 8], "tasks": [[0.5, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]}
    assert result.right.shape == (5, 8) and result.sizes == [4, 2, 2]
    assert result.right[0].tolist() == [True, True, *[False] * 6]
    assert result.accuracy == 2 / 8 and result.seen_accuracy == [2 / 4, 2 / 6, 2 / 8]
    assert result.prequential == 6 / 8 and result.last_label == 6 / 8
    assert result.update_seconds == [0.5] * 8 and result.update_bytes == [10] * 8
    assert result.initial is None


def test_every_figure_of_a_hand_worked_run():
    stream = ClassIncremental(tiny(), [0, 1], [[2], [3]])
    result = run_stream(Greedy(4, known=[0]), stream, every=2, initial=[0.25, 0.25, 0.0])
    assert result.trace.values.tolist() == [[0.5, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    found = figures(result, offline=[0.5, 1.0, 1.0], beta=2)
    assert found == pytest.approx(
        {
            "accuracy": 0.25,
            "prequential": 0.75,
            "prequential_windowed": 0.75,
            "last_label": 0.75,
            "majority": 3 / 8,
            "average_accuracy": 1 / 3,
            "average_incremental_accuracy": (0.5 + 0.5 + 1 / 3) / 3,
            "average_anytime_accuracy": (0.5 + 0.5 + 0.5 + 1 / 3 + 1 / 3) / 5,
            "backward_transfer": (-0.5 - 1) / 2,
            "forward_transfer": (-0.25 + 0) / 2,
            "forward_transfer_raw": 0.0,
            **{f"forgetting_{variant}": 0.75 for variant in FORGETTING_VARIANTS},
            "minimum_accuracy": 0.0,
            "worst_case_accuracy": 1 / 3,
            "stability_gap": (0.5 + (0 + 1) / 2) / 2,
            "windowed_forgetting_10": (0.5 + 1 + 0) / 3,
            "windowed_plasticity_10": (0 + 1 + 1) / 3,
            "learning_curve_area_2_a-gem": 2 / 3,
            "learning_curve_area_2_first-evaluations": 1.0,
            "average_anytime_accuracy_by_sample": (2 / 4 + 2 / 6 + 2 / 6 + 2 / 8 + 2 / 8) / 5,
            "negative_flips": 2 / 8,
            "negative_flips_between_evaluations": (2 / 8 + 0 + 2 / 8 + 0) / 4,
            "omega_all": (1 + (2 / 6) / 1.0 + 0.25) / 3,
        }
    )
    assert not {"learning_curve_area_10_a-gem", "omega_all"} & set(figures(result))
    assert "omega_all" not in figures(result, offline=[0.5, 0.0, 1.0])
    with pytest.raises(InputError, match="offline: must have an accuracy above 0 for each of 3 tasks"):
        figures(result, offline=[0.5, 1.0])


def test_the_page_lists_every_figure():
    result = run_stream(Greedy(2), ClassIncremental(tiny(10, 2), [], [[0], [1]]), every=1)
    page = (Path(__file__).resolve().parents[1] / "docs/metrics.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w[\w-]*)` \|", page, re.MULTILINE)) == sorted(figures(result, offline=[1, 1]))


def test_a_run_from_nothing_measures_its_initial_accuracies():
    result = run_stream(Greedy(2), ClassIncremental(tiny(classes=2), [], [[0], [1]]), every=100)
    assert result.samples == [0, 4, 8] and result.trace.current.tolist() == [-1, 0, 1]
    assert result.initial == [0.0, 0.0] and figures(result)["forward_transfer"] == 0
    assert result.prequential == 6 / 8  # the first of each class is wrong


def test_one_task_has_the_figures_that_need_no_second():
    found = figures(run_stream(Greedy(1), ClassIncremental(tiny(classes=1), [], [[0]])))
    assert found["average_accuracy"] == 1 and "backward_transfer" not in found and "forgetting_max_before_last" not in found


def test_a_known_task_masks_the_scores():
    data = tiny()
    groups = {"base_classes": [0, 1], "steps": [[2, 3]]}
    learner = Greedy(4, known=[0, 1])
    masked = run_stream(learner, TaskIncremental(data, **groups), every=100)
    # Among its own classes task 0 keeps predicting class 0, right for half of its samples.
    assert masked.matrix.values[:, 0].tolist() == [0.5, 0.5]
    plain = run_stream(Greedy(4, known=[0, 1]), ClassIncremental(data, **groups), every=100)
    assert plain.matrix.values[:, 0].tolist() == [0.5, 0.0]
    # Before the first sample of task 1 none of its classes is known, so nothing is predicted.
    assert not masked.right[0, 4:].any() and masked.prequential < 1


def test_a_method_that_does_not_learn_only_predicts():
    learner = Greedy(4, known=[1])
    result = run_stream(learner, ClassIncremental(tiny(), [0], [[1], [2]]), every=100, learns=False)
    assert learner.learned == [] and result.prequential == 0.5 and result.update_seconds == []


def test_one_subset_is_drawn_once():
    data = tiny(test=20)
    learner = Greedy(4, known=[0])
    stream = Recurring(data, [0], [[1], [2, 3], [1]])
    result = run_stream(learner, stream, every=1, per_task=3, seed=5)
    assert result.sizes == [3, 3, 3, 3] and result.right.shape == (17 - 4, 12)
    each = np.array(learner.asked).reshape(-1, 12)
    assert (each == each[0]).all()
    assert each[0].tolist() == np.concatenate([x for x, _ in evaluation_set(stream, 3, seed=5)]).tolist()
    assert each[0, 3:6].tolist() == each[0, 9:].tolist()  # a visit's test set and that of its return
    others = evaluation_set(stream, 3, seed=6)
    assert [x.tolist() for x, _ in others] != [x.tolist() for x, _ in evaluation_set(stream, 3, seed=5)]
    assert all(len(y) == 20 * size for (_, y), size in zip(evaluation_set(stream, 1000), [1, 1, 2, 1], strict=True))


@pytest.mark.parametrize(
    ("stream", "options", "words"),
    [
        (ClassIncremental(tiny(), [0], []), {}, "stream: must have at least one sample"),
        (
            ClassIncremental(tiny(test=0), [0], [[1]]),
            {},
            r"stream: every task must have a test sample, got none in \[0, 1\]; leave.*, take fewer tasks, or",
        ),
        (ClassIncremental(tiny(), [0], [[1]]), {"every": 0}, "every: must be at least 1 sample, got 0"),
        (ClassIncremental(tiny(), [0], [[1]]), {"per_task": 0}, "per_task: must be at least 1 test sample, got 0"),
    ],
)
def test_bad_runs_are_refused(stream, options, words):
    with pytest.raises(InputError, match=words):
        run_stream(Greedy(4), stream, **options)


def test_on_a_runtime(toy):
    samples = toy.helpers.samples
    (x, y), (x_test, y_test) = samples(60), samples(30, seed=1)
    data = Dataset(x, y, x_test, y_test, tuple("abcde"))
    stream = ClassIncremental(data, [0, 1], [[2], [3, 4]], seed=1)
    with toy.device("ncm", "onnx") as learner:
        result = run_stream(learner, stream, every=9, per_task=4)
    assert result.accuracy > 0.6 and figures(result)["prequential"] > 0.5
