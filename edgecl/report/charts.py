"""The charts of a report, from the content of ``run.json``: one function each, which returns a figure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from edgecl import tables
from edgecl.plots import BLUE, GREEN, GREY, GROUP_COLOURS, GROUP_MARKERS, ORANGE, PURPLE, SKY, VERMILION
from edgecl.report.svg import FAINT, INK, bare
from edgecl.shown import shown_of

Row = Mapping[str, Any]
Unit = Callable[[float | None], str]

LEDGER = {
    "frozen_weights": ("frozen weights", GREY),
    "state": ("state", BLUE),
    "state_second_buffers": ("second buffers", SKY),
    "adaptation_start": ("start of adaptation", GREY),
    "replay": ("replay rows", ORANGE),
    "activations_peak": ("activations, at peak", GREEN),
    "inputs_outputs": ("inputs and outputs", PURPLE),
    "pending_features": ("features that wait for a label, at most", VERMILION),
}
"""What a learner holds in memory, with words and colours: :data:`edgecl.ledger.RAM`, and the frozen weights."""

PHASES = {
    "encode": ("trunk", GREY),
    "replay_decode": ("replay decode", ORANGE),
    "forward": ("forward", SKY),
    "input_gradient": ("input gradient", GREEN),
    "weight_gradient": ("weight gradient", BLUE),
    "update": ("update", VERMILION),
}
"""Phases of learning one sample, with their words and colours."""

MOST_LAYERS = 24
"""Layers that a chart names; the rest, those with the fewest MACs, are one bar."""

_ACCURACY = LinearSegmentedColormap.from_list("accuracy", ["#f4f1ea", "#9fc6dd", "#0072B2", "#00304d"])
LOWEST = -1.0
"""Score below which nothing is drawn: R^2 knows no least."""
_PANEL_TASKS = 16
"""Tasks up to which a matrix has its numbers written in."""


def shared_tasks(result: Row) -> Sequence[Row]:
    """The tasks where those of all seeds are equal, else none: where their sizes are random, a mean over them has no meaning."""
    first, *others = result["tasks_by_seed"]
    return first if all(tasks == first for tasks in others) else ()


def met(tasks: Sequence[Row], curve: Row) -> Any:
    """Score on the test samples of the tasks met so far, at each point of a curve of the seed that has them.

    The base set counts from the start. An accuracy is the mean of the tasks' weighed by their samples; other scores are in the curve.
    """
    if "met" in curve:
        return np.array(curve["met"])
    samples, values = np.array(curve["samples"]), np.array(curve["tasks"])
    sizes = np.array([task["test_samples"] for task in tasks])
    first = np.array([-1 if i == 0 else task["first_sample"] for i, task in enumerate(tasks)])
    weights = sizes[:, None] * (first[:, None] < samples[None])
    return (values * weights).sum(0) / np.maximum(weights.sum(0), 1)


def mean_curve(result: Row, row: Row) -> tuple[list[int], Any, Any]:
    """Samples learned, mean over seeds of :func:`met`, and its standard deviation, None for one seed.

    The points are those at which every seed was tested: where tasks have random sizes, without the ends of tasks.
    """
    points = sorted(set.intersection(*(set(curve["samples"]) for curve in row["curves"])))
    pairs = zip(result["tasks_by_seed"], row["curves"], strict=True)
    values = np.array([met(tasks, curve)[np.isin(curve["samples"], points)] for tasks, curve in pairs])
    return points, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None


def mean_matrix(result: Row, row: Row) -> Any:
    """Mean over seeds of the matrix of scores, [tasks, tasks]; that of the first seed alone where their tasks differ."""
    return np.nanmean(np.array(row["matrices"] if shared_tasks(result) else row["matrices"][:1], float), 0)


def accuracy_figure(result: Row) -> Figure:
    """Score on what was met so far along the stream: a line a learner, its spread over seeds, and where the tasks of all seeds begin."""
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    ax = figure.subplots()
    tasks, shown = shared_tasks(result), shown_of(result)
    factor, lowest = shown.factor, 0.0
    for task in tasks:
        if task["first_sample"] > 0:
            ax.axvline(task["first_sample"], color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0, alpha=0.6)
    if 0 < len(tasks) - 1 <= 10:
        for task in tasks[1:]:
            ax.annotate(task["name"], (task["first_sample"], 1), (3, 2), ("data", "axes fraction"), "offset points", fontsize=8)
    drawn = 0
    for row in result["learners"]:
        if not row.get("curves"):
            ax.axhline(factor * row[shown.key], color=INK, linestyle="--", linewidth=1.2, label=f"{row['label']} (offline, at the end)")
            continue
        samples, mean, spread = mean_curve(result, row)
        colour, marker = GROUP_COLOURS[drawn % 6], GROUP_MARKERS[drawn % 6]
        lowest = min(lowest, float(mean.min()))
        ax.plot(samples, factor * mean, color=colour, marker=marker, markersize=4, linewidth=1.6, label=row["label"])
        if spread is not None:
            ax.fill_between(samples, factor * (mean - spread), factor * (mean + spread), color=colour, alpha=0.18, linewidth=0)
        drawn += 1
    ax.set_ylim(factor * max(1.08 * lowest, LOWEST), factor)
    ax.set_xlabel("samples learned, one at a time")
    ax.set_ylabel(f"test {shown.axis}")
    bare(ax, "y")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def matrix_figure(result: Row) -> Figure:
    """Score on each task after each task, by :func:`mean_matrix`: one panel a learner."""
    rows = [row for row in result["learners"] if row.get("matrices")]
    names = [task["name"] for task in result["tasks_by_seed"][0]]
    shown = shown_of(result)
    size, columns = len(names), len(rows) if len(rows) <= 4 else 3
    lines = -(-len(rows) // columns)
    side = max(1.9, 0.34 * size)
    figure = Figure(figsize=(1.3 + columns * (side + 0.35), 0.9 + lines * (side + 0.45)), layout="constrained")

    def cell(value: float) -> str:
        return f"{100 * value:.0f}" if shown.shares else f"{value:.2f}"

    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(rows) :]:
        ax.set_axis_off()
    for ax, row in zip(axes.flat, rows, strict=False):
        values = mean_matrix(result, row)
        ax.pcolormesh(values, cmap=_ACCURACY, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
        for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True) if size <= _PANEL_TASKS else ():
            colour = "white" if values[i, j] > 0.45 else "#222222"
            ax.text(j + 0.5, i + 0.5, cell(values[i, j]), ha="center", va="center", fontsize=8, color=colour)
        ax.set_xlim(0, size)
        ax.set_ylim(size, 0)
        ax.set_title(row["label"])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xticks(np.arange(size) + 0.5, [_cut(name) for name in names], rotation=90, fontsize=8)
        ax.set_yticks(np.arange(size) + 0.5, [_cut(name) for name in names], fontsize=8)
    figure.supxlabel(f"{shown.word} on" + (", %" if shown.unit else ""), fontsize=10)
    figure.supylabel("after learning", fontsize=10)
    return figure


def ledger_figure(result: Row) -> Figure:
    """Memory by what it is for: a stacked bar a learner."""
    rows = [row for row in result["learners"] if row.get("ledger")]
    parts = [[row["ledger"][name] for row in rows] for name in LEDGER]
    figure = _stacked([row["label"] for row in rows], parts, list(LEDGER.values()), tables.size)
    figure.axes[0].xaxis.set_major_locator(_binary(max(map(sum, zip(*parts, strict=True)))))
    return figure


def phase_figure(result: Row) -> Figure:
    """MACs of learning one sample by phase: a stacked bar a learner."""
    rows = [row for row in result["learners"] if row.get("profile")]
    layers = [layers_of(row) for row in rows]
    parts = [[sum(phases.get(name, 0) for phases in found.values()) for found in layers] for name in PHASES]
    return _stacked([row["label"] for row in rows], parts, list(PHASES.values()), tables.si)


def layer_figure(row: Row) -> Figure:
    """MACs of learning one sample by layer and phase, in the order in which they run."""
    layers = layers_of(row)
    kept = sorted(layers, key=lambda name: -sum(layers[name].values()))[:MOST_LAYERS]
    shown = {name: phases for name, phases in layers.items() if name in kept}
    if len(shown) < len(layers):
        rest = [phases for name, phases in layers.items() if name not in shown]
        shown[f"{len(rest)} others"] = {name: sum(phases.get(name, 0) for phases in rest) for name in PHASES}
    parts = [[phases.get(name, 0) for phases in shown.values()] for name in PHASES]
    return _stacked([_cut(name, 28) for name in shown], parts, list(PHASES.values()), tables.si, width=6.2)


def layers_of(row: Row) -> dict[str, dict[str, int]]:
    """MACs of one learned sample (``encode`` and ``learn``, or ``predict`` where nothing learns) by layer and phase.

    The method's own algebra is called by the method's name.
    """
    steps = {step["step"]: step["layers"] for step in row["profile"]["steps"]}
    found: dict[str, dict[str, int]] = {}
    for step in (steps["encode"], steps.get("learn", steps["predict"])):
        for name, phases in step.items():
            mine = found.setdefault(name or f"({row['method']})", {})
            for phase, macs in phases.items():
                mine[phase] = mine.get(phase, 0) + macs
    return found


def _stacked(
    names: Sequence[str], parts: Sequence[Sequence[int]], words: Sequence[tuple[str, str]], unit: Any, width: float = 8.4
) -> Figure:
    """Horizontal bars from the top, each of the parts that are not zero everywhere, its sum behind it."""
    figure = Figure(figsize=(width, 1.15 + 0.34 * len(names)), layout="constrained")
    ax = figure.subplots()
    left, places = np.zeros(len(names)), np.arange(len(names))
    for values, (word, colour) in zip(parts, words, strict=True):
        if any(values):
            ax.barh(places, values, left=left, height=0.62, color=colour, label=word, edgecolor=FAINT, linewidth=0.3)
            left = left + np.array(values)
    for place, total in zip(places, left, strict=True):
        ax.annotate(unit(total), (total, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(places, list(names))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, max(left.max(), 1) * 1.14)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, place: unit(value) if value else "0"))
    bare(ax, "x")
    figure.legend(loc="outside lower center", ncols=3 if width < 7 else 4, fontsize=8.5)
    return figure


def _binary(most: int) -> MultipleLocator:
    """Ticks at round multiples of a power of 1024."""
    unit = 1024 ** max(0, int(np.log2(max(most, 1)) // 10))
    return MultipleLocator(unit * next(n for n in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if most / (n * unit) <= 6))


def _cut(text: str, most: int = 16) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
