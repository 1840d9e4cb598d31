"""Tables of ``edgecl bench sparse``."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from edgecl import tables
from edgecl.bench.paired import points

Row = Mapping[str, Any]


def nominal_table(result: Row) -> Table:
    """How many times less nominal work training is."""
    caption = "against dense training on all samples; gradients: share whose products are left out"
    shown = tables.grid((">sparsity, %", ">gradients, %", ">samples, %", ">times less"), title="nominal MACs, ResNet-18", caption=caption)
    for row in result["nominal"]:
        shares = [tables.percent(row[key]) for key in ("sparsity", "gradient_sparsity", "data")]
        shown.add_row(*shares, f"{row['times_less']:.1f}")
    return shown


def step_table(result: Row) -> Table:
    """Measured time of structured updates beside their work."""
    names = ("", ">sparsity, %", ">unit", ">MACs", ">ms", ">faster", ">fewer MACs", ">share, %")
    caption = "ONNX Runtime, one thread, 1 new and 8 replayed images. share: of the reduction of MACs that time has."
    shown = tables.grid(names, title="time of a structured update", caption=caption)
    for row in result["steps"]:
        dense = row["sparsity"] is None
        what = ["dense", "-"] if dense else [f"{100 * row['sparsity']:g}", str(row["block"])]
        ratios = ["-", "-", "-"] if dense else [f"{row['speed_up']:.1f}", f"{row['mac_reduction']:.1f}", f"{100 * row['share']:.0f}"]
        shown.add_row(row["net"], *what, tables.si(row["canonical_macs"]), f"{row['ms']:.1f}", *ratios)
    return shown


def accuracy_table(result: Row) -> Table:
    """Accuracy of every case, and its difference from dense training."""
    names = ("", ">accuracy, %", ">to dense", ">95 %", ">learned, %", ">MACs a sample", ">of an update", ">state and rows")
    seeds = result["rows"][0]["seeds"]
    times = "each image once" if result["epochs"] == 1 else f"{result['epochs']} epochs a task"
    who = f"{result['net']}, {seeds} {'seed' if seeds == 1 else 'seeds'}, {tables.size(result['capacity_bytes'])} of rows"
    title = f"five tasks of two classes, {times}; {who}"
    caption = (
        "to dense: paired by seed, from dense training with the same replay, with its interval. learned: share of the samples; the others "
        "cost a forward pass. MACs: with the share of a refresh."
    )
    shown = tables.grid(names, title=title, caption=caption)
    for row in result["rows"]:
        apart = "-" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        costs = [tables.si(row["sample_macs"]), tables.si(row["update_macs"]), tables.size(row["beyond_trunk"])]
        accuracy = tables.percent(row["accuracy"], row["accuracy_sd"])
        shown.add_row(row["case"], accuracy, apart, points(row["interval"]), tables.percent(row["learned"]), *costs)
    return shown
