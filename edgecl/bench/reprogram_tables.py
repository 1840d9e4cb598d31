"""Tables of ``edgecl bench reprogram``."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from edgecl import tables
from edgecl.bench.paired import paired, points
from edgecl.bench.reprogram import RUN

Row = Mapping[str, Any]


def task_table(result: Row) -> Table:
    """Mean accuracy over the tasks and what each keeps, by way to learn."""
    title = f"{len(result['tasks'])} tasks of {len({task['source'] for task in result['tasks']})} sources, one network"
    sources = list(dict.fromkeys(task["source"] for task in result["tasks"]))
    caption = "to the head: mean difference from the linear head over the tasks, with its 95 % interval; kept a task: what is stored for it"
    caption += " beside the frozen network."
    if result["choose"]:
        caption += f" Rates were chosen on a further task, {result['choice']}."
    names = ("", ">accuracy, %", ">to the head", ">95 %", *(f">{name}" for name in sources), ">kept a task", ">rate")
    shown = tables.grid(names, title=title, caption=caption)
    head = next(row for row in result["rows"] if row["method"] == "joint")
    for row in result["rows"]:
        mean, ends = (None, None) if row is head else paired(row["accuracies"], head["accuracies"])
        apart = ("-" if mean is None else f"{100 * mean:+.1f}", points(ends))
        of = [tables.percent(value) for value in by_source(result, row).values()]
        shown.add_row(row["row"], tables.percent(row["accuracy"]), *apart, *of, tables.size(row["bytes_a_task"]), f"{row['rate']:g}")
    return shown


def by_source(result: Row, row: Row) -> dict[str, float]:
    """A row's mean accuracy on the tasks of each source."""
    found: dict[str, list[float]] = {}
    for task, accuracy in zip(result["tasks"], row["accuracies"], strict=True):
        found.setdefault(task["source"], []).append(accuracy)
    return {source: sum(values) / len(values) for source, values in found.items()}


def device_table(result: Row) -> Table:
    """All tasks in one learner on ONNX Runtime."""
    names = ("", "earlier tasks' outputs", ">told by 1, %", f">by {RUN}, %", ">switch, ms", ">worst", ">a task in the store")
    shown = tables.grid(
        names, title="all tasks in one learner on ONNX Runtime", caption="told: share of samples whose task identify() finds"
    )
    for row in result["device"]:
        bits = "equal to the bit" if row["bits_equal"] else "CHANGED"
        told = [tables.percent(row[f"identified_by_{count}"]) for count in (1, RUN)]
        shown.add_row(
            row["row"], bits, *told, *(f"{row['switch_ms'][key]:.1f}" for key in ("median", "worst")), tables.size(row["task_bytes"])
        )
    return shown


def memory_table(result: Row) -> Table:
    """What one sample's update keeps."""
    caption = "kept: for the backward pass, of one sample; recomputed: within half of the peak"
    shown = tables.grid(("", ">kept", ">peak", ">MACs", ">executed"), title="memory of an update", caption=caption)
    for row in result["memory"]:
        sizes = [tables.size(row[key]) for key in ("kept_for_backward", "activations_peak")]
        shown.add_row(row["row"], *sizes, *(tables.si(row[key]) for key in ("canonical_macs", "executed_macs")))
    return shown
