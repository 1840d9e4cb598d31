"""Runs on several labels, real vectors and maps: figures are those of a plain loop and brute force, a killed run ends in the same bits."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest

from edgecl import cli
from edgecl.planning.source import source_of
from edgecl.runs import read_config, run
from edgecl.streams import load_arrays
from edgecl.tally import SumTally
from edgecl_device import Learner
from edgecl_device.errors import InputError

NETS = """
import torch
from torch import nn

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

def dense():
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1))
"""
LEARNERS = {
    "multilabel": '{ method = "ridge", at = "2" }, { method = "latent_replay", at = "2", config = { lr = 0.5, policy = "reservoir" } }',
    "vector": '{ method = "ridge", at = "2" }, { method = "finetune", at = "2", config = { lr = 0.02 } }',
    "map": '{ method = "frozen", at = "1" }, { method = "finetune", at = "1", config = { lr = 0.3 } }',
}
CONFIG = """
data = {{ name = "arrays", path = "data.npz"{ignore} }}
scenario = {{ name = "domain-incremental", base_groups = [0, 1], steps = [[2], [3]] }}
model = {{ name = "net.py:{net}", pretrain = {{ epochs = 3, lr = 0.02 }} }}
learner = [{learners}]
device = {{ every = 8, test_samples = 5 }}
"""


def arrays(kind):
    """100 samples of 4 places, each of which shifts what is seen."""
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(4), 25)
    if kind == "map":
        x = rng.normal(size=(100, 1, 6, 6)).astype(np.float32) + 0.1 * place[:, None, None, None].astype(np.float32)
        y = np.digitize(x[:, 0], [0, 0.8]).astype(np.uint8)
        y[np.arange(100), 0, np.arange(100) % 6] = 255  # elsewhere in every map
    else:
        x = (rng.normal(size=(100, 2, 6)) + 0.2 * place[:, None, None]).astype(np.float32)
        signal = x.reshape(100, 12) @ rng.normal(size=(12, 3)) + 0.3 * place[:, None]
        y = (signal > 0) if kind == "multilabel" else signal
    return {"x": x, "y": y, "group": np.array(["north", "east", "south", "west"])[place], "class_names": np.array(["one", "two", "three"])}


def write(folder, kind):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NETS)
    np.savez(folder / "data.npz", **arrays(kind))
    net, ignore = ("dense", ", ignore = 255") if kind == "map" else ("flat", "")
    (folder / "run.toml").write_text(CONFIG.format(ignore=ignore, net=net, learners=LEARNERS[kind]))
    return folder / "run.toml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """By kind: the configuration of a run whose folder no test may change, made once by the command."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = write(tmp_path_factory.mktemp(kind), kind)
            assert cli.main(["run", str(made[kind])]) == 0
        return made[kind]

    return of


def result_of(config):
    return json.loads((config.with_suffix(".run") / "run.json").read_text())


def f1(truth, found):
    return 2 * (truth & found).sum() / (truth.sum() + found.sum())


def brute(kind, truth, outcomes):
    """The figures by their definitions, pixel by pixel and label by label."""
    if kind == "multilabel":
        found = np.array([[k in outcome for k in range(3)] for outcome in outcomes])
        truth = np.array(truth) > 0
        wrong = np.mean([a != b for a, b in zip(truth.ravel(), found.ravel(), strict=True)])
        each = [f1(truth[:, k], found[:, k]) for k in range(3) if truth[:, k].any()]
        exact = np.mean([(a == b).all() for a, b in zip(truth, found, strict=True)])
        return {
            "score": f1(truth, found),
            "macro_f1": np.mean(each),
            "hamming_loss": wrong,
            "label_accuracy": 1 - wrong,
            "exact_match": exact,
        }
    truth, found = np.array(truth, np.float64), np.array(outcomes, np.float64)
    if kind == "vector":
        r2 = [1 - ((truth[:, d] - found[:, d]) ** 2).mean() / truth[:, d].var() for d in range(3)]
        return {"score": np.mean(r2), "mse": ((truth - found) ** 2).mean(), "mae": np.abs(truth - found).mean()}
    truth, found = truth[truth != 255], found[truth != 255]
    iou = [((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum() for k in range(3) if (truth == k).any()]
    return {"score": np.mean(iou), "pixel_accuracy": np.mean(truth == found)}


@pytest.mark.parametrize("kind", LEARNERS)
def test_figures_are_those_of_a_plain_loop(finished, kind):
    config = finished(kind)
    result, data = result_of(config), load_arrays(config.with_name("data.npz"), ignore=255 if kind == "map" else None)
    assert result["data"]["kind"] == data.kind == kind and result["samples"]["test"] == [15]
    order = np.random.default_rng(0)
    order.permutation(np.flatnonzero(data.group < 2))  # the base set's
    tests = [[i for i in np.flatnonzero(np.isin(data.group_test, groups))] for groups in ([0, 1], [2], [3])]
    tests = [np.array(rows)[np.sort(np.random.default_rng(0).permutation(len(rows))[:5])] for rows in tests]
    assert data.group_names == ("east", "north", "south", "west")
    stream = np.concatenate([order.permutation(np.flatnonzero(data.group == g)) for g in (2, 3)])
    for row in result["learners"]:
        folder = config.with_suffix(".run") / "seed0" / row["label"]
        told, points = [], {}
        with Learner.load(folder / "bundle") as learner:
            for n in range(41):
                if n % 8 == 0 or n == 20:
                    points[n] = [[learner.predict(data.x_test[i]).outcome for i in rows] for rows in tests]
                if n < 40:
                    told.append(learner.predict(data.x[stream[n]]).outcome)
                    if row["method"] != "frozen":
                        learner.learn(data.x[stream[n]], data.y[stream[n]])
        truth = [data.y_test[rows] for rows in tests]
        ends = brute(kind, np.concatenate(truth), [each for task in points[40] for each in task])
        assert {name: row[name] for name in ends} == pytest.approx(ends)
        assert row["prequential"] == pytest.approx(brute(kind, data.y[stream], told)["score"])
        scores = [[brute(kind, y, seen)["score"] for y, seen in zip(truth, found, strict=True)] for found in points.values()]
        assert pytest.approx(np.array(scores)) == np.array(row["curve"]["tasks"]).T
        assert row["curve"]["samples"] == list(points)
        for n, met, found in zip(points, row["curve"]["met"], points.values(), strict=True):
            upto = 1 if n == 0 else 2 if n <= 20 else 3
            assert met == pytest.approx(brute(kind, np.concatenate(truth[:upto]), [e for task in found[:upto] for e in task])["score"])
        matrix = np.array(scores)[[0, list(points).index(20), -1]]
        assert row["backward_transfer"] == pytest.approx(np.mean(matrix[2, :2] - matrix[[0, 1], [0, 1]]))
        assert row["forgetting"] == pytest.approx(np.mean(matrix[:2, :2].max(0) - matrix[2, :2]))
        assert row["average_incremental_score"] == pytest.approx((matrix[0, 0] + matrix[1, :2].mean() + matrix[2].mean()) / 3)
        assert row["parts"] and all(len(values) == 3 for values in row["parts"][0].values())
    first, second = result["learners"]
    assert max(first["score"], second["score"]) > 0.25  # of few samples; by chance 0 for values, less for the others


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_killed_run_ends_in_the_same_bits(finished, kind, small, tmp_path):
    """The bundles are there; the second learner dies once while it learns and once while it is tested."""
    config, folder = finished(kind), tmp_path / "killed.run"
    shutil.copytree(config.with_suffix(".run"), folder)
    label = result_of(config)["learners"][1]["label"]
    for path in (folder / "run.json", *(folder / "seed0" / label / name for name in ("result.json", "trail.jsonl", "store.db"))):
        path.unlink()
    for owner, name, after in ((Learner, "learn", 13), (SumTally, "test", 2)):
        child = os.fork()
        if child == 0:
            call, count = getattr(owner, name), iter(range(1, 1 << 30))

            def wrapped(*arguments, call=call, count=count, after=after):
                if next(count) == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments)

            setattr(owner, name, wrapped)
            run(read_config(config), config, folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = run(read_config(config), config, folder)
    assert small.counted(json.loads(json.dumps(found))) == small.counted(result_of(config))


@pytest.mark.parametrize(
    ("kind", "word", "other"), [("multilabel", "Micro F1", "macro F1"), ("vector", "R²", "MSE"), ("map", "Mean IoU", "pixels right")]
)
def test_the_page_and_the_table_speak_of_the_score(finished, kind, word, other, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = finished(kind)
    capsys.readouterr()
    assert cli.main(["report", str(config.with_suffix(".run"))]) == 0
    text = (config.with_suffix(".run") / "report.html").read_text()
    assert f"<h2>{word} along the stream</h2>" in text and f">{other}<" in text and "three" in text
    shown = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert "accurac" not in shown.lower().replace("label accuracy", "").replace("pixel accuracy", "")
    assert cli.main(["run", str(config)]) == 0
    table = capsys.readouterr().out
    assert "accuracy" not in table and word.lower() in table.lower()


def changed(config, **values):
    """The configuration with other tables, as read, beside a file of the same data."""
    text = config.read_text()
    for table, value in values.items():
        text = re.sub(rf"^{table} = .*$", f"{table} = {value}", text, flags=re.MULTILINE)
    config.write_text(text)
    return config


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("vector", {"scenario": '{ name = "class-incremental", base_classes = [0], steps = [[1]] }'}, "scenario: class-incremental needs"),
        ("map", {"scenario": '{ name = "task-incremental", base_classes = [0], steps = [[1]] }'}, "scenario: task-incremental needs one"),
        ("multilabel", {"scenario": '{ name = "blurry" }'}, "scenario: blurry needs one class a sample, got targets of kind multi"),
        ("vector", {"scenario": '{ name = "recurring", base_values = [0], visits = [[1]] }'}, "scenario: recurring by class needs one"),
        ("map", {"learner": '{ method = "ridge", at = "1" }'}, r"learner\[0\]\.method: must be one of .*finetune.* kind map, got 'ridge'"),
        ("vector", {"learner": '{ method = "joint", at = "2" }'}, r"learner\[0\]\.method: must be one of .*ridge.*, got 'joint'"),
        ("vector", {"model": '{ name = "net.py:flat", classes = 5 }'}, "model.classes: is for one class a sample, got 5"),
        ("vector", {"model": '{ name = "net.py:dense", pretrain = {} }'}, "Sizes|model|shape"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_targets_is_refused_by_name(tmp_path, kind, values, said):
    config = changed(write(tmp_path, kind), **values)
    if "dense" in str(values):
        config = changed(config, learner='{ method = "ridge", at = "1" }')
    with pytest.raises(InputError, match=said):
        run(read_config(config), config, tmp_path / "out.run")
    assert not list((tmp_path / "out.run").glob("seed*/*/"))


def test_a_task_whose_tests_define_no_score_is_refused_before_anything_runs(tmp_path):
    config = write(tmp_path, "multilabel")
    data = arrays("multilabel")
    data["y"][data["group"] == "south"] = 0
    np.savez(config.with_name("data.npz"), **data)
    with pytest.raises(InputError, match=r"stream: the tests of every task must have a label that applies, got none in \[1\]; "):
        run(read_config(config), config, tmp_path / "out.run")


def test_runs_of_two_kinds_are_not_compared(finished, tmp_path, capsys):
    runs = [str(finished(kind).with_suffix(".run")) for kind in ("vector", "map")]
    assert cli.main(["report", *runs, "--out", str(tmp_path / "both.html")]) == 2
    assert (
        "RUN: must be runs of one kind of target, to be compared on one page, got vector, map; write a page each" in capsys.readouterr().err
    )


def test_a_plan_is_for_classes(finished):
    with pytest.raises(InputError, match="data: must have one class a sample to plan with, got targets of kind vector; compare"):
        source_of(read_config(finished("vector")), 40, lambda *_: None)


def test_a_stream_in_the_order_of_time_and_of_one_task(tmp_path):
    config = changed(write(tmp_path, "vector"), scenario='{ name = "time-ordered", base_share = 0.5, splits = 2 }', learner='{ at = "2" }')
    found = run(read_config(config), config, tmp_path / "time.run")
    assert [(task["name"], task["first_sample"], task["test_samples"]) for task in found["tasks_by_seed"][0]] == [
        ("base", 0, 5), ("task 1", 0, 5), ("task 2", 20, 5)
    ]  # fmt: skip
    config = changed(config, scenario='{ name = "one-task", base_share = 0.5 }')
    found = run(read_config(config), config, tmp_path / "one.run")
    [row] = found["learners"]
    assert (
        row["forgetting"] is None and row["base_score"] is None and "backward_transfer" in row and "forgetting_first_minus_last" not in row
    )
    assert row["curve"]["met"] == row["curve"]["tasks"][0] and row["score"] == row["curve"]["met"][-1]
