"""Plots of the demo, drawn from its JSON alone: accuracy along the stream, and accuracy against bytes and MACs.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; each series has a marker or a label beside.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

Row = Mapping[str, Any]

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#707070"
METHOD_STYLES = {
    "frozen": (GREY, "x"),
    "finetune": (VERMILION, "v"),
    "ncm": (ORANGE, "s"),
    "slda": (BLUE, "o"),
    "ridge": (GREEN, "D"),
    "latent_replay": (PURPLE, "^"),
}
GROUP_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
GROUP_MARKERS = ("o", "s", "D", "v", "^", "P")


BYTE_UNITS = {1: " B", 1 << 10: " KiB", 1 << 20: " MiB", 1 << 30: " GiB"}
MAC_UNITS = {1: "", 10**3: " k", 10**6: " M", 10**9: " G"}


def save_plots(result: Row, folder: Path) -> list[Path]:
    """Draw both plots of a demo's result.

    Args:
        result: What :func:`edgecl.demo.run_demo` returns, or the same read back from JSON.
        folder: Existing folder for ``stream.png`` and ``cost.png``.

    Returns:
        The files.
    """
    found = []
    for name, draw in (("stream", stream_figure), ("cost", cost_figure)):
        path = folder / f"{name}.png"
        draw(result).savefig(path, dpi=150)
        found.append(path)
    return found


def stream_figure(result: Row) -> Figure:
    """Accuracy over the stream by class group: one panel a method, each method's best row."""
    rows = _panels(result)
    columns = min(3, max(1, len(rows)))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.9 + 2.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i < len(rows):
            _stream_panel(ax, rows[i], result)
        else:
            ax.set_axis_off()
    seed = "" if result["seeds"] == 1 else f" (curves: the first of {result['seeds']} seeds)"
    title = textwrap.fill(f"Test accuracy along the stream, by class group{seed}", 40 * columns)
    figure.suptitle(title + "\n" + textwrap.fill(result["what"], 40 * columns), fontsize=11)
    for ax in axes[-1]:
        ax.set_xlabel("samples learned, one at a time")
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy, %")
    handles = [
        Line2D([], [], color=GROUP_COLOURS[i % 6], marker=GROUP_MARKERS[i % 6], markersize=4, label=task["name"])
        for i, task in enumerate(result["tasks"])
    ]
    handles.append(Line2D([], [], color=BLACK, linewidth=2.5, label="all classes so far"))
    handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label="all classes, joint (offline, same features)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9, frameon=False)
    return figure


def _panels(result: Row) -> list[Row]:
    """The best row of every method that has a curve, in the table's order."""
    best: dict[str, Row] = {}
    for row in result["rows"]:
        if "curve" in row and (row["method"] not in best or row["accuracy"] > best[row["method"]]["accuracy"]):
            best[row["method"]] = row
    return list(best.values())


def _stream_panel(ax: Axes, row: Row, result: Row) -> None:
    tasks, samples = result["tasks"], np.array(row["curve"]["samples"])
    curves = 100 * np.array(row["curve"]["tasks"])
    for i, (task, curve) in enumerate(zip(tasks, curves, strict=True)):
        shown = samples >= task["first_sample"]
        ax.plot(samples[shown], curve[shown], color=GROUP_COLOURS[i % 6], marker=GROUP_MARKERS[i % 6], markersize=3, linewidth=1.2)
        if task["first_sample"]:
            ax.axvline(task["first_sample"], color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
    sizes = np.array([task["test_images"] for task in tasks])
    first = np.array([-1] + [task["first_sample"] for task in tasks[1:]])  # the base classes are known before the stream
    images = sizes[:, None] * (first[:, None] < samples[None])
    ax.plot(samples, (curves * images).sum(0) / images.sum(0), color=BLACK, linewidth=2.5, zorder=1.9)
    joint = next((r for r in result["rows"] if r["label"] == row["joint"]), None)
    if joint is not None:
        ax.axhline(100 * joint["accuracy"], color=BLACK, linestyle="--", linewidth=1)
    ax.set_title(f"{row['label']}: {100 * row['accuracy']:.1f} % at the end", fontsize=10)
    ax.set_ylim(-3, 103)
    ax.set_yticks(range(0, 101, 20))
    bare(ax)


def _label_lines(ax: Axes, heights: Mapping[str, float], gap: float = 2.6) -> None:
    """Names of horizontal lines, right of the axes; those of close lines are moved apart, ``gap`` percent at least."""
    place = -np.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        place = max(height, place + gap)
        end: Any = ax.get_yaxis_transform()
        line = {"arrowstyle": "-", "linewidth": 0.6, "color": GREY, "shrinkA": 0, "shrinkB": 0}
        ax.annotate(name, (1, height), (1.02, place), xycoords=end, textcoords=end, va="center", fontsize=9, arrowprops=line)


@dataclass(frozen=True)
class Label:
    """Text beside a point."""

    text: str
    x: float
    y: float
    colour: str

    def places(self) -> Iterator[tuple[float, float, str, str]]:
        """Offsets in points with alignments, the best first."""
        for far in (8, 14, 22, 32, 44, 58, 74):
            yield from ((far, 0, "left", "center"), (-far, 0, "right", "center"), (0, far, "center", "bottom"), (0, -far, "center", "top"))
            for right, up in ((0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7)):
                yield (far * right, far * up, "left" if right > 0 else "right", "bottom" if up > 0 else "top")


def cost_figure(result: Row) -> Figure:
    """Final accuracy against memory beyond the trunk, and against the MACs of one update; both on log scales."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)  # label sizes are measured before saving
    left, right = figure.subplots(1, 2, sharey=True)
    panels = {
        left: _cost_panel(left, result, "bytes", "memory beyond the trunk: state once + replay", BYTE_UNITS),
        right: _cost_panel(right, result, "update_macs", "multiply-accumulates (MACs) of one update, without the trunk", MAC_UNITS),
    }
    left.set_ylabel("final test accuracy, %")
    seeds = "1 seed" if result["seeds"] == 1 else f"mean of {result['seeds']} seeds"
    figure.suptitle(f"Final accuracy against the cost of learning, {seeds}\n{result['what']}", fontsize=11)
    handles = [
        Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label="joint: offline training on all data, same features"),
        Line2D([], [], color=GREY, linestyle=":", linewidth=1.5, label="frozen: learns nothing, costs nothing"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.draw_without_rendering()
    for ax, labels in panels.items():
        place_labels(ax, labels)
    return figure


def _cost_panel(ax: Axes, result: Row, key: str, title: str, units: Mapping[int, str]) -> list[Label]:
    points = [row for row in result["rows"] if row.get("update_macs") is not None]
    low, high = min(row[key] for row in points) / 4, max(row[key] for row in points) * 8
    log_axis(ax, low, high, units)
    ax.set_xlabel(title)
    ax.set_ylim(0, 100)
    ax.set_yticks(range(0, 101, 10))
    bare(ax)
    labels, lines = [], {}
    for row in result["rows"]:
        height, frozen = 100 * row["accuracy"], row["method"] == "frozen"
        if row["role"] == "offline" or frozen:
            colour, dashes = (GREY, ":") if frozen else (BLACK, "--")
            ax.axhline(height, color=colour, linestyle=dashes, linewidth=1, zorder=1)
            lines[row["label"]] = height
    _label_lines(ax, lines)
    for row in points:
        height, (colour, marker) = 100 * row["accuracy"], METHOD_STYLES.get(row["method"], (BLACK, "*"))
        spread = [100 * row["accuracy_sd"]] if row.get("accuracy_sd") else None
        ax.errorbar([row[key]], [height], yerr=spread, color=colour, marker=marker, markersize=8, linestyle="none", capsize=3)
        labels.append(Label(row["label"], row[key], height, colour))
    return labels


def place_labels(ax: Axes, labels: Sequence[Label]) -> list[Annotation]:
    """Draw each label at its first place that no marker and no other label takes, else at its last; thin lines lead to far points."""
    renderer = ax.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    points = ax.transData.transform([(label.x, label.y) for label in labels])
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in points]
    frame, notes = ax.get_window_extent(), []
    for label in labels:
        for x, y, horizontal, vertical in label.places():
            back = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            colour = [0.65 * c for c in to_rgb(label.colour)]  # darker: text needs more contrast than a marker
            style: dict[str, Any] = {"ha": horizontal, "va": vertical, "color": colour, "fontsize": 9, "bbox": back}
            if np.hypot(x, y) > 14:
                style["arrowprops"] = {"arrowstyle": "-", "linewidth": 0.6, "color": label.colour, "shrinkB": 4}
            note = ax.annotate(label.text, (label.x, label.y), (x, y), textcoords="offset points", **style)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)
            if frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) and not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        else:
            note = ax.annotate(label.text, (label.x, label.y), (x, y), textcoords="offset points", **style)
        taken.append(box)
        notes.append(note)
    return notes


def log_axis(ax: Axes, low: float, high: float, units: Mapping[int, str]) -> None:
    """A log scale from ``low`` to ``high`` with ticks in units: at powers of ten, on a short axis at 2 and 5 between them, too."""
    between = (1, 2, 5) if high < 100 * low else (1,)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks = {n * power * unit: f"{n * power}{name}" for unit, name in units.items() for power in (1, 10, 100) for n in between}
    ax.set_xticks([t for t in ticks if low <= t <= high], [text for t, text in ticks.items() if low <= t <= high])
    ax.xaxis.set_minor_locator(NullLocator())


def bare(ax: Axes) -> None:
    """Light horizontal lines and no frame above and on the right."""
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
