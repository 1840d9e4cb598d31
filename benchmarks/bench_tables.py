"""The tables of ``edgecl bench`` on the pages of methods, with the targets that the project set itself."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Target:
    """What was aimed at, and what was reached.

    Attributes:
        what: Words for it.
        found: The figure.
        aim: Its target.
        most: Whether the figure must be at most the target; else it must be at least that.
        unit: Of both.
    """

    what: str
    found: float
    aim: float
    most: bool = True
    unit: str = ""

    @property
    def met(self) -> bool:
        """By the figure, not by its digits on the page."""
        return self.found <= self.aim if self.most else self.found >= self.aim

    def cells(self) -> list[str]:
        """A line of the table."""
        sign = "at most" if self.most else "at least"
        return [self.what, f"{sign} {self.aim:g}{self.unit}", f"{self.found:.2f}{self.unit}", "yes" if self.met else "**no**"]


def targets(found: Iterable[Target]) -> str:
    """A table of targets."""
    return markdown(["target", "aim", "reached", "met"], [target.cells() for target in found])


def batches_page(result: Row) -> str:
    """Errors in batches, costs and targets of test-time adaptation."""
    device = " --device cuda" if "NVIDIA" in result["machine"] else ""
    command = f"edgecl bench tta --data cifar-10-batches-bin --weights resnet20.th --only batches{device} --seeds {result['seeds']}"
    shown = page([*error_tables(result), cost_table(result)])
    return "\n\n".join([_note(result), shown, targets(batches_targets(result)), said(command, result)])


def singles_page(result: Row) -> str:
    """Errors sample by sample, and targets of test-time adaptation."""
    command = f"edgecl bench tta --data cifar-10-batches-bin --weights resnet20.th --only singles --seeds {result['seeds']}"
    return "\n\n".join([_note(result), page(error_tables(result)), targets(singles_targets(result)), said(command, result)])


def _note(result: Row) -> str:
    count = result["seeds"]
    seeds = "One seed" if count == 1 else f"Means over {count} seeds and their standard deviation"
    return f"{seeds}; {len(result['corruptions'])} corruptions at severity 5, one after the other."


def _by_label(result: Row) -> dict[str, dict[str, Row]]:
    return {name: {row["label"]: row for row in rows} for name, rows in result["tables"].items()}


def _best(rows: Mapping[str, Row], role: str) -> str:
    """The label with the lowest error of a role."""
    return min((label for label, row in rows.items() if row["role"] == role), key=lambda label: float(rows[label]["error"]))


def batches_targets(result: Row) -> Iterable[Target]:
    """The project's targets for test-time adaptation in batches."""
    tables = _by_label(result)
    kept = {row["label"]: row["kept_by_pytorch"] for row in result["costs"]}
    wide, detached, points = {label: row["error"] for label, row in tables["batch 200"].items()}, "EcoTTA, detached", " points"
    yield Target("EcoTTA detached above released, batch 200", wide[detached] - wide["EcoTTA, released"], 0.5, unit=points)
    yield Target("EcoTTA detached below TENT, batch 200", wide["TENT"] - wide[detached], 1, most=False, unit=points)
    yield Target("EcoTTA detached above CoTTA, batch 200", wide[detached] - wide["CoTTA, 8 views"], 1, unit=points)
    for name in ("batch 200", "batch 64"):
        label, control = (_best(tables[name], role) for role in ("method", "control"))
        gain = tables[name][control]["error"] - tables[name][label]["error"]
        yield Target(f"best method ({label}) below the better control, {name}", gain, 0.5, most=False, unit=points)
    yield Target("bytes that PyTorch keeps, EcoTTA detached / TENT", kept[detached] / kept["TENT"], 0.45)
    yield Target("the same / CoTTA's student", kept[detached] / kept["CoTTA, 8 views"], 0.45)
    passes = next(rows for name, rows in tables.items() if "passes" in name)
    for label in dict.fromkeys((detached, _best(tables["batch 64"], "method"))):
        drift = passes[label]["rounds"][-1] - passes[label]["rounds"][0]
        yield Target(f"last pass above the first, {label}", drift, 0.5, unit=points)


def singles_targets(result: Row) -> Iterable[Target]:
    """The project's targets for test-time adaptation sample by sample."""
    tables, points = _by_label(result), " points"
    for name, rows in tables.items():
        label = _best(rows, "method")
        gain = rows["source"]["error"] - rows[label]["error"]
        yield Target(f"best method ({label}) below the source, {name}", gain, 12, most=False, unit=points)
    single = {label: row["error"] for label, row in tables["batch 1"].items()}
    for still, learning in _SAME_WEIGHTS.items():
        first, label = min(still, key=single.__getitem__), min(learning, key=single.__getitem__)
        what = f"{label} below {first}, the best without a gradient from the same weights, batch 1"
        yield Target(what, single[first] - single[label], 0, most=False, unit=points)


_SAME_WEIGHTS = {
    ("EMA .01", "BN-alpha .1"): ("TENT", "EATA"),
    ("affine warm-up, EMA .01",): ("affine warm-up + TENT",),
    ("EcoTTA, no updates, EMA .01",): ("EcoTTA, detached",),
}
"""Lines without a gradient, and those that learn from the same weights."""


def reprogram_page(result: Row) -> str:
    """Accuracy, memory, device and targets of reprogramming."""
    aims = []
    for row in result["device"]:
        aims.append(Target(f"tasks whose outputs changed behind later ones, {row['row']}", float(not row["bits_equal"]), 0))
        aims += [
            Target(f"switch of tasks, {row['row']}, {which}", row["switch_ms"][which], 10, unit=" ms") for which in ("median", "worst")
        ]
    aims.append(Target("tasks", len(result["tasks"]), 12, most=False))
    aims.append(Target("sources", len({task["source"] for task in result["tasks"]}), 3, most=False))
    tables = page([task_table(result), device_table(result), memory_table(result)])
    images = sum(task["training_images"] for task in result["tasks"])
    note = f"{result['epochs']} epochs over {images:,} training images in all; {result['size']} pixels a side. "
    return "\n\n".join([tables, targets(aims), note + said("edgecl bench reprogram --data FOLDER --weights mobilenet_v2.pth", result)])


def sparse_page(result: Row) -> str:
    """Work, time, accuracy and targets of sparse training."""
    aims = []
    for row, aim in zip(result["nominal"], (5.3, 12.1, 21.0), strict=True):
        aims.append(Target(f"nominal work at {100 * row['sparsity']:g} %, times less", row["times_less"], aim, most=False))
    for row in result["steps"]:
        if row["sparsity"] is not None and row["net"] == "resnet18":
            unit = "channels" if row["block"] == 1 else f"blocks of {row['block']} channels"
            what = f"share of the reduction of MACs, ResNet-18, {100 * row['sparsity']:g} %, {unit}"
            aims.append(Target(what, 100 * row["share"], 60, most=False, unit=" %"))
    parts = [nominal_table(result), step_table(result), *([accuracy_table(result)] if result["rows"] else [])]
    command = f"edgecl bench sparse --data FOLDER --seeds {result['rows'][0]['seeds'] if result['rows'] else 0}"
    return "\n\n".join([page(parts), targets(aims), said(command, result)])


PAGES: Mapping[str, Mapping[str, Any]] = {
    "docs/methods/adaptation.md": {
        "tta-batches": ("benchmarks/results/tta_batches.json", batches_page),
        "tta-singles": ("benchmarks/results/tta_singles.json", singles_page),
    },
    "docs/methods/clr.md": {"reprogram": ("benchmarks/results/reprogram.json", reprogram_page)},
    "docs/methods/sparcl.md": {"sparse": ("benchmarks/results/sparse.json", sparse_page)},
}
"""The tables of each page: their JSON, and what writes them."""
