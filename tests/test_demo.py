"""The demo on three of its rows: export, ONNX Runtime, stream, table, files."""

import json
import math
import statistics
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
from rich.console import Console

from edgecl import cli, tables
from edgecl.demo import FEATURE, MAP, SETTINGS, Setting, joint_of, role_of, run_demo, summarise
from edgecl.metrics import AccuracyMatrix, forgetting
from edgecl_device.errors import InputError

FEW = tuple(s for s in SETTINGS if s.at == FEATURE and s.method in ("frozen", "ncm", "joint"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder, stdout and stderr of one small demo."""
    folder, out, err = tmp_path_factory.mktemp("demo") / "new" / "figures", StringIO(), StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", "120")
        cli.show_demo(1, folder, as_json=False, settings=FEW)
    assert torch.get_num_threads() == 2  # one thread while it ran
    torch.set_num_threads(threads)
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def result(demo):
    return json.loads((demo[0] / "demo.json").read_text())


def test_files_are_written_and_named(demo):
    folder, out, _ = demo
    joined = "".join(out.split())
    for name in ("demo.json", "stream.png", "cost.png"):
        assert (folder / name).stat().st_size > 1000
        assert f"figures/{name}" in joined


def test_progress_names_every_row(demo):
    lines = demo[2].splitlines()
    assert lines == [
        "seed 0: pretraining on 1,200 images of 6 classes (0 of 4)",
        "seed 0: frozen (1 of 4)",
        "seed 0: ncm, 62-d (2 of 4)",
        "seed 0: joint head, 62-d (3 of 4)",
        "drawing plots (4 of 4)",
    ]


def test_table_shows_every_row_in_its_section(demo, result):
    out = demo[1]
    places = [
        out.index(text) for text in ("Baselines", "  frozen", "  ncm, 62-d", "Offline training", "  joint head, 62-d", "Best: ncm, 62-d")
    ]
    assert places == sorted(places) and "Learners" not in out
    row = next(r for r in result["rows"] if r["method"] == "ncm")
    line = next(text for text in out.splitlines() if text.startswith("  ncm, 62-d"))
    assert f"{100 * row['accuracy']:.1f}" in line and "2.24 M" in line and "2.50 KiB" in line
    words = " ".join(out.split())
    assert "max_before_last" in words and "classes come task by task, so that repeating the last label would give 99.5 %" in words
    assert "on all 500 test samples" in words and "base the same, on the test samples of the base set" in words


def test_a_narrow_terminal_gets_fewer_columns(result):
    text = StringIO()
    console = Console(file=text, width=80)
    table = tables.demo_table(result, 80)
    console.print(table)
    console.print(tables.demo_legend(result, table))
    assert "second" not in text.getvalue() and "beyond" in text.getvalue()
    lines = [line.split() for line in text.getvalue().splitlines() if line.startswith("  ncm")]
    assert [len(words) for words in lines] == [11]  # the label has two words, each of the two columns of bytes has a unit


@pytest.mark.parametrize("width", [40, 60])
def test_a_very_narrow_terminal_gets_whole_numbers_and_their_meaning(result, width):
    table = tables.demo_table(result, width)
    text = StringIO()
    Console(file=text, width=width).print(table)
    shown = [column.header.replace("\n", " ") for column in table.columns]
    assert shown[1] == "accuracy %" and "update ms" not in shown
    row = next(r for r in result["rows"] if r["method"] == "ncm")
    line = next(line for line in text.getvalue().splitlines() if line.startswith("  ncm, 62-d"))
    assert line.split()[2] == tables.percent(row["accuracy"])
    assert "update ms" in " ".join(text.getvalue().split("Left out at this width: ")[1].split())
    text = StringIO()
    Console(file=text, width=200).print(tables.demo_legend(result, table))
    terms = [line.split("  ")[0] for line in text.getvalue().splitlines()]
    assert terms == [*(heading.removesuffix(" %") for heading in shown[1:]), "offline training"]


def test_result_has_every_field(result):
    assert result["seeds"] == 1 and result["forgetting"] == "max_before_last"
    assert {"edgecl", "torch", "onnxruntime", "numpy"} <= set(result["versions"]) and "Python" in result["machine"]
    assert [len(text) for text in result["pretrained_sha256"]] == [64]
    assert [(t["first_sample"], t["test_images"]) for t in result["tasks"]] == [(0, 300), (0, 50), (200, 50), (400, 50), (600, 50)]
    assert [t["name"] for t in result["tasks"]] == ["6 base classes", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    assert [(r["label"], r["role"], r["joint"]) for r in result["rows"]] == [
        ("frozen", "baseline", "joint head, 62-d"),
        ("ncm, 62-d", "baseline", "joint head, 62-d"),
        ("joint head, 62-d", "offline", "joint head, 62-d"),
    ]
    assert [s["label"] for s in result["settings"]] == [s.label for s in FEW]


def test_figures_agree_with_each_other(result):
    sizes = [task["test_images"] for task in result["tasks"]]
    for row in result["rows"][:2]:
        matrix = row["matrix"]
        assert row["accuracy"] == pytest.approx(sum(a * n for a, n in zip(matrix[-1], sizes, strict=True)) / 500)
        assert row["base_accuracy"] == matrix[-1][0]
        assert row["forgetting"] == pytest.approx(forgetting(AccuracyMatrix.from_rows(matrix), "max_before_last"))
        assert row["curve"]["samples"] == list(range(0, 801, 50))
        assert [curve[-1] for curve in row["curve"]["tasks"]] == matrix[-1]
        assert row["last_label"] == pytest.approx(1 - 4 / 800)
        assert row["accuracy_by_seed"] == [row["accuracy"]]


def test_learning_beats_not_learning(result):
    frozen, ncm, joint = result["rows"]
    assert frozen["update_macs"] is None and frozen["update_ms"] is None
    assert frozen["base_accuracy"] > 0.8 and all(not any(curve) for curve in frozen["curve"]["tasks"][1:])
    assert ncm["accuracy"] > frozen["accuracy"] + 0.1 and joint["accuracy"] > ncm["accuracy"]
    # a running mean: 62 products with 1/n for each of 10 classes; state is 10 means and 10 counts, in float32
    assert ncm["update_macs"] == 620 and ncm["bytes"] == 4 * (620 + 20) and ncm["second_buffer_bytes"] == ncm["bytes"]
    assert ncm["update_ms"] > 0


def test_several_seeds_become_mean_and_deviation():
    seeds = [{"label": "a", "accuracy": 0.5, "macs": 7, "none": None}, {"label": "a", "accuracy": 0.7, "macs": 7, "none": None}]
    row = summarise(seeds)
    assert row["accuracy"] == pytest.approx(0.6) and row["accuracy_sd"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert row["accuracy_by_seed"] == [0.5, 0.7] and row["macs"] == 7 and row["none"] is None
    lacking = [{**seeds[0], "area": 0.25}, seeds[1]]
    for order in (lacking, lacking[::-1]):  # no mean of the one seed that has it, and not left out either
        row = summarise(order)
        assert row["area"] is None and "area_sd" not in row and row["accuracy"] == pytest.approx(0.6)
    assert "accuracy_sd" not in summarise(seeds[:1]) and math.isclose(summarise(seeds[:1])["accuracy"], 0.5)


def test_each_row_is_compared_with_offline_training_on_its_features():
    found = {s.label: (role_of(s), joint_of(s, SETTINGS)) for s in SETTINGS}
    assert found["slda, 62-d"] == ("method", "joint head, 62-d")
    assert found["slda, 576-d"] == ("method", "joint head, 576-d")
    assert found["finetune suffix"] == ("baseline", "joint suffix") and found["finetune head"] == ("baseline", "joint head, 62-d")
    assert found["latent replay suffix"] == ("method", "joint suffix")
    assert joint_of(Setting("ridge", MAP, "ridge"), SETTINGS[:3]) is None


@pytest.mark.parametrize(("seeds", "settings"), [(0, FEW), (1, ())])
def test_nothing_to_run_is_refused(seeds, settings):
    with pytest.raises(InputError, match="at least 1 seed and 1 row"):
        run_demo(seeds, settings=settings)


def test_json_alone_on_stdout(tmp_path, capsys, monkeypatch):
    row = {"label": "ncm", "method": "ncm", "accuracy": 0.5}
    monkeypatch.setattr("edgecl.demo.run_demo", lambda seeds, **options: {"seeds": seeds, "rows": [row]})
    monkeypatch.setattr("edgecl.plots.save_plots", lambda result, folder: [])
    assert cli.main(["demo", "--json", "--out", str(tmp_path), "--seeds", "2"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((tmp_path / "demo.json").read_text()) == {"seeds": 2, "rows": [row]}
    assert err == ""
