"""The table of a plan, and what stands below it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from edgecl.tables import grid, percent, si, size

Row = Mapping[str, Any]

LIMIT_WORDS = {"ram": size, "flash": size, "macs": si}


COLUMNS = ("plan", "cut at", "method", ">validation\naccuracy, %", ">RAM", ">flash", ">MACs a\nsample", "trains", "codec", ">rows")
"""Headings, as :func:`edgecl.tables.grid` takes them."""


def plan_rows(result: Row) -> list[list[str]]:
    """The Pareto front of a plan's record as texts in the order of :data:`COLUMNS`; the recommended plan has a star."""
    return [
        [
            f"{number} *" if number - 1 == result["recommended"] else str(number),
            row["at"],
            row["method"],
            percent(row["accuracy"], row["accuracy_sd"]),
            size(row["ram"]),
            size(row["flash"]),
            si(row["macs"]),
            row["trains"] or "-",
            row["codec"] or "-",
            f"{row['replay_rows']:,}" if row["replay_rows"] else "-",
        ]
        for number, row in enumerate(result["front"], 1)
    ]


def plan_table(result: Row) -> Table:
    """The Pareto front of a plan's record, the recommended row marked."""
    limits = ", ".join(f"{name} {LIMIT_WORDS[name](value)}" for name, value in result["limits"].items()) or "no limit"
    table = grid(COLUMNS, title=f"{result['what']}; within {limits}")
    for number, cells in enumerate(plan_rows(result)):
        table.add_row(*cells, style="bold" if number == result["recommended"] else None)
    return table


def remarks(result: Row) -> list[str]:
    """What the table does not say."""
    best, counts = result["front"][result["recommended"]], result["counts"]
    orders = len(best["accuracy_by_order"])
    late = sum(done["options"] - done["measured"] for done in result["rounds"])
    lines = [
        f"* recommended: the most accurate one, over {orders} stream order{'s' if orders > 1 else ''}.",
        "Every plan listed is beaten by no other in accuracy, RAM, flash and MACs at once. Costs are exact. Accuracy is measured: on "
        f"{result['validation_samples']:,} held-out training samples, after {result['stream_samples']:,} samples learned one at a time; "
        "it chose the plan, so expect a little less on new data.",
        f"Looked at {counts['candidates']:,} learners at {counts['depths_within_macs']} of {counts['depths']} cuts: "
        f"{counts['within_budget']:,} within the budget, {len(result['front']) + len(result['beaten'])} measured on all samples.",
    ]
    if late:
        lines.append(f"The time was up before {late} of the streams; more --seconds measure more.")
    return lines
