"""The figures in the README are those of the committed JSON, and the JSON is of the settings that the code has."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from edgecl.demo import SETTINGS

ROOT = Path(__file__).resolve().parents[1]


def read(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo():
    return read("docs/figures/demo.json")


@pytest.fixture(scope="module")
def rows(demo):
    return {row["label"]: row for row in demo["rows"]}


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports one of the benchmarks' modules, which import each other by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_the_readme_shows_the_committed_figures(benchmarks):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert benchmarks("update_readme").filled(readme) == readme


def test_the_results_page_shows_the_committed_figures(benchmarks):
    assert benchmarks("write_results").page() == (ROOT / "docs/results.md").read_text(encoding="utf-8")


def plain(config):
    return json.loads(json.dumps(asdict(config)))


def test_the_demo_runs_the_settings_that_were_chosen():
    """Hyperparameters that came later have their defaults, which leave a method as it was."""
    chosen = {label: entries[0]["config"] for label, entries in read("benchmarks/results/choose_settings.json")["rows"].items()}
    configs = {s.label: s.config for s in SETTINGS if s.config is not None}
    assert {label: plain(config) for label, config in configs.items()} == {
        label: {**plain(type(configs[label])()), **values} for label, values in chosen.items()
    }


def test_the_committed_demo_is_of_these_settings(demo):
    assert demo["settings"] == json.loads(json.dumps([{**asdict(s), "config": s.config and asdict(s.config)} for s in SETTINGS]))
    assert demo["seeds"] == 3


def test_the_best_method_is_within_two_points_of_joint_on_the_same_features(rows):
    best = max((row for row in rows.values() if row["role"] == "method"), key=lambda row: row["accuracy"])
    assert best["accuracy"] >= rows[best["joint"]]["accuracy"] - 0.02


def test_the_best_method_is_forty_points_above_finetuning(rows):
    best = max(row["accuracy"] for row in rows.values() if row["role"] == "method")
    assert best >= 0.4 + max(row["accuracy"] for row in rows.values() if row["method"] == "finetune")


def test_latent_replay_reaches_eighty_percent(rows):
    assert rows["latent replay suffix"]["accuracy"] >= 0.8


def test_the_steps_are_as_fast_as_promised():
    cases = {row["case"]: row for row in read("benchmarks/results/step_latency.json")["rows"]}
    assert cases["ridge d=512 K=100"]["onnx_ms"] < 0.15
    assert cases["latent_replay r=8"]["ratio"] <= 1
