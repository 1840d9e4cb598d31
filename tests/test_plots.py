"""Plots of the demo, from its JSON alone."""

import copy
import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from edgecl import plots, tables

TASKS = [
    {"name": "2 base classes", "classes": ["a", "b"], "test_images": 30, "first_sample": 0},
    {"name": "c", "classes": ["c"], "test_images": 10, "first_sample": 0},
    {"name": "d", "classes": ["d"], "test_images": 10, "first_sample": 20},
]


def row(label, method, accuracy, role="method", nbytes=1000, macs=1000, joint="joint head"):
    curve = {
        "samples": [0, 10, 20, 30, 40],
        "tasks": [[0.9, 0.8, 0.8, 0.7, 0.7], [0.0, 0.9, 0.9, 0.8, 0.8], [0.0, 0.0, 0.0, 0.5, accuracy]],
    }
    learns = {"curve": curve, "bytes": nbytes, "second_buffer_bytes": nbytes, "update_macs": macs, "encode_macs": 10**6, "update_ms": 0.1}
    figures = {"base_accuracy": 0.7, "forgetting": 0.1, "prequential": 0.6, "last_label": 0.95}
    return {
        "label": label,
        "method": method,
        "accuracy": accuracy,
        "accuracy_by_seed": [accuracy],
        "role": role,
        "joint": joint,
        **({} if role == "offline" else {**learns, **figures}),
    }


@pytest.fixture
def result():
    """Eight learners in one corner, so that their labels have to make way for each other."""
    crowd = [row(f"ridge, {i}-d", "ridge", 0.80 + i / 200, nbytes=1000 + 150 * i, macs=20_000 - 900 * i) for i in range(6)]
    rows = [
        row("frozen", "frozen", 0.5, "baseline", nbytes=40, macs=None),
        row("finetune head", "finetune", 0.25, "baseline", nbytes=2000),
        row("slda", "slda", 0.82, macs=19_000),
        *crowd,
        row("joint head", "joint", 0.84, "offline"),
        row("joint suffix", "joint", 0.85, "offline"),
    ]
    return {"what": "made-up data", "seeds": 1, "seconds": 1.0, "tasks": TASKS, "forgetting": "max_before_last", "rows": rows}


def test_files_hold_drawings(result, tmp_path):
    before = copy.deepcopy(result)
    files = plots.save_plots(json.loads(json.dumps(result)), tmp_path)
    assert [f.name for f in files] == ["stream.png", "cost.png"] and result == before
    for file in files:
        pixels = imread(file)[..., :3]
        assert min(pixels.shape[:2]) > 400
        assert 0.02 < (pixels < 0.9).any(-1).mean() < 0.5
        assert len(np.unique((pixels[::8, ::8].reshape(-1, 3) * 255).astype(int), axis=0)) > 50


def test_stream_shows_the_best_row_of_each_method(result):
    figure = plots.stream_figure(result)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == [
        "frozen: 50.0 % at the end",
        "finetune head: 25.0 % at the end",
        "slda: 82.0 % at the end",
        "ridge, 5-d: 82.5 % at the end",
    ]


def test_stream_lines_are_the_curves_in_percent(result):
    ax = plots.stream_figure(result).axes[0]
    base, c, d, *_ = [line for line in ax.lines if len(line.get_xdata()) > 2]
    np.testing.assert_allclose(base.get_ydata(), [90, 80, 80, 70, 70])
    np.testing.assert_allclose(c.get_ydata(), [0, 90, 90, 80, 80])
    assert list(d.get_xdata()) == [20, 30, 40]  # from its first sample
    whole = next(line for line in ax.lines if line.get_linewidth() == 2.5)
    want = [90, (30 * 80 + 10 * 90) / 40, (30 * 80 + 10 * 90) / 40, (30 * 70 + 10 * 80 + 10 * 50) / 50, (30 * 70 + 10 * 80 + 10 * 50) / 50]
    np.testing.assert_allclose(whole.get_ydata(), want)
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [float(line.get_ydata()[0]) for line in dashed] == [84.0]
    boundary = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [float(line.get_xdata()[0]) for line in boundary] == [20.0]


def test_cost_points_are_where_the_figures_say(result):
    left, right = plots.cost_figure(result).axes
    learners = [r for r in result["rows"] if r.get("update_macs") is not None]
    for ax, key in ((left, "bytes"), (right, "update_macs")):
        found = {tuple(np.ravel(line.get_xydata())) for line in ax.lines if len(line.get_xdata()) == 1}
        assert {(r[key], 100 * r["accuracy"]) for r in learners} <= found
        assert ax.get_xscale() == "log" and ax.get_ylim() == (0, 100)


def test_cost_labels_name_every_row_and_do_not_overlap(result):
    figure = plots.cost_figure(result)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for ax in figure.axes:
        assert sorted(note.get_text() for note in ax.texts) == sorted(r["label"] for r in result["rows"])
        boxes = []
        for note in ax.texts:
            note.update_positions(renderer)
            boxes.append(Text.get_window_extent(note, renderer))
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_plots_of_one_learner_without_offline_training(result, tmp_path):
    result["rows"] = [row("ncm", "ncm", 0.7, joint=None)]
    assert len(plots.save_plots(result, tmp_path)) == 2
    assert len(plots.stream_figure(result).axes) == 1


def test_spread_is_drawn_with_several_seeds(result):
    plain = plots.cost_figure(result).axes[0].collections
    for r in result["rows"]:
        r["accuracy_sd"] = 0.02
    result["seeds"] = 3
    figure = plots.cost_figure(result)
    segments = [c.get_segments()[0][:, 1] for c in figure.axes[0].collections]
    assert len(plain) == 0 and [float(np.ptp(s)) for s in segments] == pytest.approx([4.0] * len(segments))
    assert "mean of 3 seeds" in figure.get_suptitle()


def test_verdict_is_paired_by_seed(result):
    rows = {r["label"]: r for r in result["rows"]}
    assert tables.verdict(result) == [
        "Best: ridge, 5-d, 82.5 %: 1.5 points below joint head (84.0 %), offline training on the same features.",
        "It is 57.5 points above naive fine-tuning (finetune head, 25.0 %).",
    ]
    rows["ridge, 5-d"]["accuracy_by_seed"] = [0.80, 0.85]
    rows["joint head"]["accuracy_by_seed"] = [0.81, 0.86]
    rows["finetune head"]["accuracy_by_seed"] = [0.20, 0.30]
    first, second = tables.verdict(result)
    assert "1.0 ± 0.0 points below" in first and "57.5 ± 3.5 points above" in second
    rows["joint head"]["accuracy_by_seed"] = [0.81, 0.84]
    assert "level with (0.0 ± 1.4 points) joint head" in tables.verdict(result)[0]
    result["rows"] = [rows["frozen"]]
    assert tables.verdict(result) == []
