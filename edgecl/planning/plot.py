"""The plot of a plan, drawn from its record alone: measured accuracy against each cost."""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from edgecl.plots import BLACK, BYTE_UNITS, GREY, MAC_UNITS, METHOD_STYLES, Label, bare, log_axis, place_labels
from edgecl.tables import percent

Row = Mapping[str, Any]

PANELS = {
    "ram": ("RAM", BYTE_UNITS),
    "flash": ("flash", BYTE_UNITS),
    "macs": ("MACs to encode and learn one sample", MAC_UNITS),
}


@mpl.rc_context({"text.parse_math": False})  # a dollar in a name is a dollar
def plan_figure(result: Row) -> Figure:
    """Accuracy on held-out samples against RAM, flash and MACs: the Pareto front numbered as in the table, the rest in grey.

    Args:
        result: What :func:`edgecl.planning.record.record` returns, or the same read back from JSON.
    """
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)  # label sizes are measured before saving
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS), sharey=True), strict=True))
    labels = {name: _panel(ax, result, name) for name, ax in panels.items()}
    panels["ram"].set_ylabel("validation accuracy, %")
    shown = [*result["front"], *result["beaten"]]
    heights = [100 * row["accuracy"] for row in shown]
    margin = 0.08 * (max(heights) - min(heights)) + 1
    panels["ram"].set_ylim(max(-2, min(heights) - margin), min(102, max(heights) + margin))
    best = result["front"][result["recommended"]]
    words = ", ".join(part for part in (f"{best['method']} at {best['at']}", best["trains"], best["codec"]) if part)
    title = f"{result['what']}\nrecommended, plan {result['recommended'] + 1}: {words}, {percent(best['accuracy'])} %"
    figure.suptitle("\n".join(textwrap.fill(line, 140) for line in title.splitlines()), fontsize=11)
    handles = [_handle(method, method) for method in dict.fromkeys(row["method"] for row in shown)]
    handles.append(Line2D([], [], color=GREY, marker=".", linestyle="none", alpha=0.6, label="small: some plan beats it in everything"))
    handles.append(Line2D([], [], color=GREY, linewidth=1, label="best accuracy up to this cost"))
    handles.append(Line2D([], [], color=BLACK, marker="o", markersize=13, fillstyle="none", linestyle="none", label="recommended"))
    if result["limits"]:
        handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label="the budget"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.draw_without_rendering()
    for name, ax in panels.items():
        place_labels(ax, labels[name])
    return figure


def _style(method: str) -> tuple[str, str]:
    return METHOD_STYLES.get(method, (BLACK, "*"))


def _handle(method: str, label: str) -> Line2D:
    colour, marker = _style(method)
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)


def _panel(ax: Axes, result: Row, cost: str) -> list[Label]:
    title, units = PANELS[cost]
    rows = [*result["front"], *result["beaten"]]
    values = [max(row[cost], 1) for row in rows] + [max(value, 1) for name, value in result["limits"].items() if name == cost]
    log_axis(ax, min(values) / 1.6, max(values) * 1.6, units)
    ax.set_xlabel(title)
    bare(ax)
    if cost in result["limits"]:
        ax.axvline(result["limits"][cost], color=BLACK, linestyle="--", linewidth=1, zorder=1)
    for row in result["beaten"]:
        colour, marker = _style(row["method"])
        ax.plot([row[cost]], [100 * row["accuracy"]], color=colour, marker=marker, markersize=4, alpha=0.4, zorder=1.5)
    ordered = sorted(rows, key=lambda row: row[cost])
    best = np.maximum.accumulate([100 * row["accuracy"] for row in ordered])
    ax.step([row[cost] for row in ordered], best, where="post", color=GREY, linewidth=1, zorder=1.2)
    labels = []
    for number, row in enumerate(result["front"], 1):
        height, (colour, marker) = 100 * row["accuracy"], _style(row["method"])
        spread = [100 * row["accuracy_sd"]] if row["accuracy_sd"] else None
        ax.errorbar([row[cost]], [height], yerr=spread, color=colour, marker=marker, markersize=7, linestyle="none", capsize=3)
        if number - 1 == result["recommended"]:
            ax.plot([row[cost]], [height], color=BLACK, marker="o", markersize=15, fillstyle="none", linestyle="none")
        labels.append(Label(str(number), row[cost], height, colour))
    return labels
