"""The tables of ``edgecl bench`` on the pages of methods, with the targets that the project set itself."""

from collections.abc import Iterable, Mapping
from typing import Any

from page_parts import Row, conditions, markdown
from rich.table import Table

from edgecl.bench.reprogram_tables import device_table, memory_table, task_table
from edgecl.bench.sparse_tables import accuracy_table, nominal_table, step_table
from edgecl.bench.tta_tables import cost_table, error_tables


def page(tables: Iterable[Table]) -> str:
    """Tables of the terminal as those of a page: the title in front, the caption behind."""
    parts = []
    for table in tables:
        cells = zip(*(column.cells for column in table.columns), strict=True)
        lines = [
            [f"**{cell}**" if row.style == "bold" else str(cell) for cell in line] for row, line in zip(table.rows, cells, strict=True)
        ]
        title = f"*{table.title}*" if table.title else ""
        parts += [
            title,
            markdown([str(column.header).replace("\n", " ") for column in table.columns], lines),
            str(table.caption or "").strip(),
        ]
    return "\n\n".join(part for part in parts if part)


def said(command: str, result: Row) -> str:
    """How a result came about."""
    versions = {name: value for name, value in result["versions"].items() if name != "sources"}
    return f"`{command}`. {conditions({**result, 'versions': versions})}"


def targets(rows: Iterable[tuple[str, str, str, bool]]) -> str:
    """What was aimed at, what was reached, and whether that is enough."""
    return markdown(
        ["target", "at least or at most", "reached", "met"],
        [[what, aim, found, "yes" if met else "**no**"] for what, aim, found, met in rows],
    )


def tta_page(result: Row) -> str:
    """Errors, costs and targets of test-time adaptation."""
    seeds = f"Errors are means over {result['seeds']} seeds" + (" and their standard deviation" if result["seeds"] > 1 else "")
    images = f"{result['images']:,} test images for each of {len(result['corruptions'])} corruptions"
    note = f"{seeds}, {images} at severity 5, one after the other."
    command = "edgecl bench tta --data cifar-10-batches-bin --weights resnet20.th"
    return "\n\n".join([note, page(error_tables(result)), page([cost_table(result)]), targets(_tta_targets(result)), said(command, result)])


def _tta_targets(result: Row) -> Iterable[tuple[str, str, str, bool]]:
    tables = {name: {row["label"]: row for row in rows} for name, rows in result["tables"].items()}
    costs = {row["label"]: row for row in result["costs"]}
    error = {name: {label: row["error"] for label, row in rows.items()} for name, rows in tables.items()}
    wide, detached = error["batch 200"], "EcoTTA, detached"

    def below(what: str, least: float, by: float) -> tuple[str, str, str, bool]:
        return what, f"{least:g} points", f"{by:.1f}", by >= least

    def best(name: str, role: str) -> tuple[str, float]:
        return min(((label, row["error"]) for label, row in tables[name].items() if row["role"] == role), key=lambda pair: float(pair[1]))

    apart = wide[detached] - wide["EcoTTA, released"]
    yield "EcoTTA detached above released, batch 200", "0.5 points", f"{apart:+.1f}", apart <= 0.5
    yield below("EcoTTA detached below TENT, batch 200", 1, wide["TENT"] - wide[detached])
    apart = wide[detached] - wide["CoTTA, 8 views"]
    yield "EcoTTA detached above CoTTA, batch 200", "1 point", f"{apart:+.1f}", apart <= 1
    for name in ("batch 200", "batch 64"):
        label, found = best(name, "method")
        yield below(f"best method ({label}) below the better control, {name}", 0.5, best(name, "control")[1] - found)
    share = costs[detached]["kept_by_pytorch"] / costs["TENT"]["kept_by_pytorch"]
    yield "bytes that PyTorch keeps, EcoTTA detached / TENT", "0.45", f"{share:.2f}", share <= 0.45
    share = 1 - costs[detached]["kept_by_pytorch"] / costs["CoTTA, 8 views"]["kept_by_pytorch"]
    yield "the same, less than CoTTA's student", "55 %", f"{100 * share:.0f} %", share >= 0.55
    passes = next(rows for name, rows in tables.items() if "passes" in name)
    for label in (detached, best("batch 64", "method")[0]):
        drift = passes[label]["rounds"][-1] - passes[label]["rounds"][0]
        yield f"last pass above the first, {label}", "0.5 points", f"{drift:+.1f}", drift <= 0.5
    for name in ("batch 1", "batch 1, long runs of a class"):
        label, found = best(name, "method")
        yield below(f"best method ({label}) below the source, {name}", 12, error[name]["source"] - found)
    pairs = {"EMA .01": ("TENT", "EATA"), "affine warm-up, EMA .01": ("affine warm-up + TENT",), "EcoTTA, no updates, EMA .01": (detached,)}
    for still, learning in pairs.items():
        label = min(learning, key=lambda one: error["batch 1"][one])
        gain = error["batch 1"][still] - error["batch 1"][label]
        yield f"{label} below {still}, the same weights without a gradient, batch 1", "above 0", f"{gain:+.1f}", gain > 0


def reprogram_page(result: Row) -> str:
    """Accuracy, memory, device and targets of reprogramming."""
    aims = []
    for row in result["device"]:
        aims.append(
            (
                f"outputs of earlier tasks behind all later ones, {row['row']}",
                "equal bits",
                "equal" if row["bits_equal"] else "not",
                row["bits_equal"],
            )
        )
        switch = row["switch_ms"]["median"]
        aims.append((f"switch of tasks, {row['row']}, median", "10 ms", f"{switch:.1f} ms", switch < 10))
    count = len(result["tasks"])
    aims.append(("tasks", "12", str(count), count >= 12))
    sources = len({task["source"] for task in result["tasks"]})
    aims.append(("sources", "3", str(sources), sources >= 3))
    tables = page([task_table(result), device_table(result), memory_table(result)])
    command = "edgecl bench reprogram --data FOLDER --weights mobilenet_v2.pth"
    return "\n\n".join([tables, targets(aims), f"{result['epochs']} epochs; {result['size']} pixels a side. " + said(command, result)])


def sparse_page(result: Row) -> str:
    """Work, time, accuracy and targets of sparse training."""
    aims: list[tuple[str, str, str, bool]] = []
    for row, aim in zip(result["nominal"], (5.3, 12.1, 21.0), strict=True):
        found = row["times_less"]
        aims.append((f"nominal work at {100 * row['sparsity']:g} %", f"{aim:g} times less", f"{found:.1f}", found >= 0.98 * aim))
    for row in result["steps"]:
        if row["sparsity"] is not None and row["net"] == "resnet18":
            unit = "channels" if row["block"] == 1 else f"blocks of {row['block']} channels"
            what = f"share of the reduction of MACs, ResNet-18, {100 * row['sparsity']:g} %, {unit}"
            aims.append((what, "60 %", f"{100 * row['share']:.0f} %", row["share"] >= 0.6))
    parts = [nominal_table(result), step_table(result), *([accuracy_table(result)] if result["rows"] else [])]
    return "\n\n".join([page(parts), targets(aims), said("edgecl bench sparse --data FOLDER", result)])


PAGES: Mapping[str, Mapping[str, Any]] = {
    "docs/methods/adaptation.md": {"tta": ("benchmarks/results/tta.json", tta_page)},
    "docs/methods/clr.md": {"reprogram": ("benchmarks/results/reprogram.json", reprogram_page)},
    "docs/methods/sparcl.md": {"sparse": ("benchmarks/results/sparse.json", sparse_page)},
}
"""The tables of each page: their JSON, and what writes them."""
