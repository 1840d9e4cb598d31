"""A run over several seeds whose tasks are random: every figure is of all seeds, or says of which."""

import json
import re
import shutil

import numpy as np
import pytest

from edgecl import cli
from edgecl.evaluate import evaluation_set
from edgecl.report import charts
from edgecl.report.views import curves, metrics
from edgecl.streams import Blurry, load_windows
from edgecl.tally import right_of
from edgecl_device import Learner

SEEDS = (5, 1)
"""Of task sizes 55, 24, 21 and 42, 17, 41: with a test every 2 samples, only the first has 10 evaluations of each task."""

CONFIG = f"""
data = {{ name = "windows", path = "windows.npz" }}
scenario = {{ name = "blurry", splits = 3 }}
model = {{ name = "net.py:build" }}
learner = {{ method = "ncm", at = "2" }}
device = {{ seeds = {list(SEEDS)}, every = 2, test_samples = 10, store = false }}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory, small):
    """A finished run's configuration, beside its folder, which no test may change."""
    path = small.write(tmp_path_factory.mktemp("blurry"))
    path.write_text(CONFIG)
    assert cli.main(["run", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def result(path):
    return json.loads((path.with_suffix(".run") / "run.json").read_text())


@pytest.fixture(scope="module")
def streams(path):
    data = load_windows(path.with_name("windows.npz"))
    return [Blurry(data, splits=3, seed=seed) for seed in SEEDS]


def test_every_seed_has_its_own_tasks(result, streams):
    names = ["rest", "walk", "run", "climb", "fall"]
    for tasks, stream in zip(result["tasks_by_seed"], streams, strict=True):
        order = [sample.task for sample in stream]
        assert [task["first_sample"] for task in tasks] == [order.index(task) for task in range(3)]
        assert [task["classes"] for task in tasks] == [[names[c] for c in sorted(home)] for home in stream.home_classes]
        assert [task["test_samples"] for task in tasks] == [min(10, 6 * len(home)) for home in stream.home_classes]
    assert result["samples"] == {"base": 0, "stream": 100, "test": [22, 26]}


def test_a_figure_that_a_seed_lacks_is_listed_and_has_no_value(path, result):
    [row] = result["learners"]
    places = [path.with_suffix(".run") / f"seed{seed}" / "ncm" / "result.json" for seed in SEEDS]
    first, second = (json.loads(place.read_text()) for place in places)
    lacked = {name for name in first["metrics"] if name not in second}
    assert lacked == {"learning_curve_area_10_a-gem", "learning_curve_area_10_first-evaluations"}
    assert all(row[name] is None and name in row["metrics"] for name in lacked)
    assert all(row[name] == pytest.approx((first[name] + second[name]) / 2) for name in second["metrics"])
    cells = {line["name"]: line["cells"] for line in metrics(result)["rows"]}
    assert {name for name, line in cells.items() if line == ["-"]} == {name.replace("_", " ") for name in lacked}


def test_the_curve_is_the_mean_of_what_each_seed_has_right_on_its_own_tasks(path, result, streams):
    [row] = result["learners"]
    points, mean, spread = charts.mean_curve(result, row)
    assert points == [*range(0, 101, 2)]  # and not 59, where a task of one seed ends
    wanted = []
    for seed, stream in zip(SEEDS, streams, strict=True):
        tests, order, accuracies = evaluation_set(stream, 10), [sample.task for sample in stream], []
        task_of = np.repeat(np.arange(3), [len(y) for _, y in tests])
        with Learner.load(path.with_suffix(".run") / f"seed{seed}" / "ncm" / "bundle") as learner:
            for done, sample in enumerate([*stream, None]):
                if done % 2 == 0:
                    met = task_of <= max(order[:done], default=0)
                    accuracies.append(right_of(learner, stream, tests)[met].mean())
                if sample is not None:
                    learner.learn(sample.x, sample.y)
        wanted.append(accuracies)
    assert np.allclose(mean, np.mean(wanted, 0)) and np.allclose(spread, np.std(wanted, 0, ddof=1))
    assert mean[-1] == pytest.approx(row["accuracy"]) == np.mean(row["accuracy_by_seed"])
    table = curves(result)["rows"]
    assert [line["name"] for line in table] == [str(point) for point in points]
    assert table[-1]["cells"] == [f"{100 * row['accuracy']:.1f}"]


def test_the_matrix_is_the_first_seeds_and_says_so(path, result):
    [row] = result["learners"]
    assert np.array_equal(charts.mean_matrix(result, row), row["matrices"][0]) and row["matrices"][0] != row["matrices"][1]
    text = (path.with_suffix(".run") / "report.html").read_text()
    names = [task["name"] for task in result["tasks_by_seed"][0]]
    said = "seed 5 alone, as tasks differ between the seeds"
    assert f"the accuracy on each, {said}. A column" in text
    assert re.search(rf"accuracy in %, {said}</caption>\s*<thead><tr><th scope=\"col\">after learning</th>(.*?)</tr>", text)[1] == "".join(
        f'<th scope="col">{name}</th>' for name in names
    )
    assert "Dotted lines: a task begins" not in text and "mean of 2 seeds, each on its own tasks" in text
    assert "of 22 to 26 test samples" in text
    for seed, tasks in zip(SEEDS, result["tasks_by_seed"], strict=True):
        listed = ", ".join(f"{task['name']} {task['test_samples']}" for task in tasks)
        assert f"<dt>test samples of seed {seed}</dt><dd>{listed}</dd>" in text


def test_equal_tasks_are_averaged(result):
    alike = {**result, "tasks_by_seed": [result["tasks_by_seed"][0]] * 2}
    [row] = result["learners"]
    assert np.allclose(charts.mean_matrix(alike, row), np.mean(row["matrices"], 0))
    assert len(charts.accuracy_figure(alike).axes[0].texts) == 2 and not charts.accuracy_figure(result).axes[0].texts


def test_the_table_speaks_of_the_scenario(path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["run", str(path)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    assert title.strip() == "windows, blurry: 0 base samples, then 100 one at a time"
    assert "on all 22 to 26 test samples" in text and "it is learned; repeating the last label would give" in text
    assert "base" not in text  # as there is no base set


def test_a_result_without_the_tasks_of_each_seed_is_refused_and_made_again(path, result, small, tmp_path, capsys):
    folder = tmp_path / "old.run"
    shutil.copytree(path.with_suffix(".run"), folder)
    old = {**{key: value for key, value in result.items() if key != "tasks_by_seed"}, "tasks": result["tasks_by_seed"][1]}
    (folder / "run.json").write_text(json.dumps(old))
    assert cli.main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "run.json must be as edgecl run writes it, with the tasks of each seed, got none; delete that file" in error
    (folder / "run.json").unlink()
    before = (folder / "seed5" / "ncm" / "result.json").read_bytes()
    assert cli.main(["run", str(path), "--out", str(folder)]) == 0
    assert (folder / "seed5" / "ncm" / "result.json").read_bytes() == before
    assert small.counted(json.loads((folder / "run.json").read_text())) == small.counted(result)
