"""The page holds the figures of run.json, needs nothing but itself, and is well-formed."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from edgecl import cli
from edgecl.report import charts
from edgecl.report.page import page
from edgecl.report.svg import inline, style
from edgecl.tables import percent, si, size


@pytest.fixture(scope="module")
def result(whole):
    return json.loads((whole / "run.json").read_text())


@pytest.fixture(scope="module")
def text(whole, result):
    return page([{**result, "name": "whole", "toml": (whole / "config.toml").read_text()}])


class Page(HTMLParser):
    """Cells of every table, rows of which start with their heading; ids; names of attributes that would load something."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.ids, self.loaded, self.scripts, self._cell = [], [], [], 0, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.loaded += [f"{name}={values[name]}" for name in ("src", "href", "srcset", "data") if name in values]
        self.scripts += tag == "script" or any(name.startswith("on") for name in values)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self._cell = ""

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None


def tree(text):
    """The page as a tree: it is written so that it is XML, too, where every element is closed and every attribute quoted."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def test_the_page_is_well_formed_and_needs_nothing_else(text):
    found = Page(text)
    assert not re.findall(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert found.scripts == 0
    assert {name.partition("=")[0] for name in found.loaded} == {"href"} and all("=#" in name for name in found.loaded)
    assert len(set(found.ids)) == len(found.ids)
    assert {name.split("=#")[1] for name in found.loaded} <= set(found.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(found.ids)
    assert tree(text).get("lang") == "en"


def test_every_picture_has_words_and_every_table_headings(text):
    root = tree(text)
    pictures = root.findall(".//svg")
    assert len(pictures) == 4 + 2  # a layer chart for each of two learners
    assert all(picture.get("role") == "img" and len(picture.get("aria-label")) > 20 for picture in pictures)
    assert all(figure.find("figcaption") is not None for figure in root.findall(".//figure"))
    for table in root.findall(".//table"):
        assert all(cell.get("scope") == "col" for cell in table.findall("thead/tr/th"))
        assert all(row.find("th").get("scope") == "row" for row in table.findall("tbody/tr"))


def test_the_table_of_learners_has_the_figures_of_run_json(text, result):
    rows = Page(text).tables[0][1:]
    assert [row[0] for row in rows] == ["ridgeridge at 2", "replaylatent_replay at 2"]
    for cells, row in zip(rows, result["learners"], strict=True):
        shares = ["accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "prequential"]
        assert cells[1:6] == [percent(row[name]) for name in shares]
        assert cells[6:10] == [si(row["update_macs"]), size(row["bytes"]), size(row["second_buffer_bytes"]), size(row["update_bytes"])]
        assert cells[10] == f"{row['update_ms']:.2f}"


def test_matrices_ledgers_and_layers_have_the_numbers(text, result):
    curve, metrics, *tables = Page(text).tables[1:]
    assert [line[0] for line in curve[1:]] == ["0", "10", "20", "30", "40"]
    assert curve[-1][1:] == [f"{100 * row['accuracy']:.1f}" for row in result["learners"]]  # all tasks are met at the end
    found = {line[0]: line[1:] for line in metrics[1:]}
    assert found["stability gap"] == [percent(row["stability_gap"]) for row in result["learners"]] and len(found) > 15
    for table, row in zip(tables, result["learners"], strict=False):
        assert [line[1:] for line in table[1:]] == [[percent(value) for value in line] for line in row["matrix"]]
    ledger = {line[0]: line[1:-1] for line in tables[2][1:]}
    assert ledger["beyond trunk"] == [f"{row['ledger']['beyond_trunk']:,}" for row in result["learners"]]
    for table, row in zip(tables[3:], result["learners"], strict=False):
        macs = {step["step"]: sum(step["canonical"].values()) for step in row["profile"]["steps"]}
        assert table[-1][0] == "all layers" and table[-1][-1] == f"{macs['encode'] + macs['learn']:,}"


def test_the_first_sentence_names_the_best_learner(text, result):
    best = max(result["learners"], key=lambda row: row["accuracy"])
    summary = tree(text).find(".//div[@class='summary']")
    assert summary.find("p").text == (
        f"{best['label'].capitalize()} is right on {percent(best['accuracy'])} % of 30 test samples after learning 40 samples, one at a "
        "time, on ONNX Runtime."
    )


def test_names_of_the_users_are_text_and_not_markup(result):
    changed = json.loads(json.dumps(result))
    changed["title"], changed["learners"][0]["label"], changed["tasks_by_seed"][0][1]["name"] = "<b>&", '<i>ridge</i> & "x"', "a<b>"
    text = page([{**changed, "name": "x", "toml": "# <script>"}])
    assert "<b>" not in text and "<i>" not in text and "<script>" not in text
    assert tree(text).find(".//h1").text == "<b>&"


def test_what_is_no_character_is_replaced(result):
    changed = json.loads(json.dumps(result))
    changed["title"], changed["tasks_by_seed"][0][1]["name"] = "a\0b\x1b", "c\ufffed"
    text = page([{**changed, "name": "x", "toml": os.fsdecode(b"# \xff")}])
    assert tree(text).find(".//h1").text == "a\ufffdb\ufffd" and "c\ufffdd" in text and "# \ufffd" in text
    text.encode()


def test_a_dollar_in_a_name_is_no_formula(result):
    changed = json.loads(json.dumps(result))
    changed["learners"][0]["label"], changed["tasks_by_seed"][0][1]["name"] = "$x_{$", "$\\frac{$"
    text = page([{**changed, "name": "x", "toml": ""}])
    assert "$x_{$</text>" in text and "$\\frac{$" in text


def test_a_damaged_run_is_one_error_and_leaves_no_page(result, tmp_path, capsys):
    missing = {key: value for key, value in result.items() if key != "learners"}
    nameless = {**result, "learners": [{**row, "gates": [{}]} for row in result["learners"]]}
    for content in ("[]", "[" * 100_000, json.dumps(missing), json.dumps(nameless)):
        (tmp_path / "run.json").write_text(content)
        assert cli.main(["report", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "run.json" in error and "run it again with --fresh" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_report_does_not_replace_a_file_of_the_run(whole, capsys):
    before = (whole / "run.json").read_bytes()
    for out in (str(whole / "run.json"), "."):
        assert cli.main(["report", str(whole), "--out", out]) == 2
        assert capsys.readouterr().err == f"edgecl: --out: must end in .html, got {out}; name such a file\n"
    assert (whole / "run.json").read_bytes() == before


def test_several_runs_are_compared_on_one_page(whole, tmp_path, capsys):
    other = tmp_path / "other.run"
    shutil.copytree(whole, other)
    before = json.loads((other / "run.json").read_text())
    before["title"], before["seeds"] = "Another", [0, 1]
    before["learners"] = [{**row, "accuracy": 0.5, "accuracy_sd": 0.01} for row in before["learners"]]
    (other / "run.json").write_text(json.dumps(before))
    assert cli.main(["report", str(whole), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'both.html'}\n"
    text = (tmp_path / "both.html").read_text()
    found = Page(text)
    assert [row[0] for row in found.tables[0][1:]][2:] == ["ridgeAnother; ridge at 2", "replayAnother; latent_replay at 2"]
    assert found.tables[0][3][1] == "50.0±1.0" and len(set(found.ids)) == len(found.ids)
    assert tree(text).find(".//h1").text == "Comparison of run.run, Another"


def test_no_finished_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "must be the folder of a finished run" in capsys.readouterr().err
    (tmp_path / "start.json").write_text("{}")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not finished; go on with it by edgecl run" in capsys.readouterr().err


def test_accuracy_is_on_what_was_met():
    tasks = [
        {"test_samples": 30, "first_sample": 0},
        {"test_samples": 10, "first_sample": 0},
        {"test_samples": 10, "first_sample": 20},
    ]
    curve = {"samples": [0, 20, 40], "tasks": [[1.0, 0.8, 0.6], [0.0, 0.4, 0.2], [0.0, 0.0, 1.0]]}
    assert np.allclose(charts.met(tasks, curve), [1.0, (24 + 4) / 40, (18 + 2 + 10) / 50])


def test_layers_are_added_up_and_the_least_become_one():
    steps = [
        {"step": "encode", "layers": {f"conv{i}": {"encode": 100 - i} for i in range(30)}},
        {"step": "predict", "layers": {"fc": {"forward": 1}}},
        {"step": "learn", "layers": {"fc": {"forward": 40, "weight_gradient": 60}, "": {"update": 500}, "conv0": {"forward": 5}}},
    ]
    row = {"method": "ridge", "profile": {"steps": steps}}
    layers = charts.layers_of(row)
    assert layers["conv0"] == {"encode": 100, "forward": 5} and layers["(ridge)"] == {"update": 500} and "fc" in layers
    figure = charts.layer_figure(row)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == charts.MOST_LAYERS + 1 and names[-1] == "8 others" and "(ridge)" in names
    widths = sum(bar.get_width() for bars in figure.axes[0].containers for bar in bars)
    assert widths == sum(sum(phases.values()) for phases in layers.values())


def test_the_same_figure_gives_the_same_picture(result):
    with style():
        first, second = (inline(charts.ledger_figure(result), "x", 'a "b" <c>') for _ in range(2))
    assert first == second and 'aria-label="a &quot;b&quot; &lt;c&gt;"' in first and "currentColor" in first
