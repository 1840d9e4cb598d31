"""Write the tables of the README, docs/plan.md and the methods' pages, and the picture of a plan, from the JSON that commands wrote.

edgecl demo --seeds 3 --out docs/figures
edgecl demo --engine executorch --json > docs/figures/executorch.json
edgecl plan --ram 256KiB --flash 1MiB --macs 5M --json > docs/figures/plan.json
python benchmarks/equal_bytes.py --data FOLDER --weights FILE
python benchmarks/learn_latency.py
python benchmarks/step_latency.py
edgecl bench tta ... --only batches|singles --json > benchmarks/results/tta_batches|tta_singles.json
edgecl bench reprogram|sparse ... --json > benchmarks/results/reprogram|sparse.json
python benchmarks/update_tables.py
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import bench_tables
from int8_tables import equal_table
from page_parts import Row, conditions, markdown
from update_report import readme

from edgecl.planning.plot import plan_figure
from edgecl.planning.table import COLUMNS, plan_rows, remarks
from edgecl.tables import percent, si, size, verdict

ROOT = Path(__file__).resolve().parents[1]
EXECUTORCH = ROOT / "docs/figures/executorch.json"


def demo_table(result: Row) -> str:
    """Accuracy, forgetting and costs of every row of ``edgecl demo``."""
    numbers = [
        "accuracy, %",
        "base classes",
        "forgetting",
        "prequential",
        "MACs/update",
        "+ trunk",
        "beyond trunk",
        "2nd buffers",
        "written/update",
    ]
    head = ["method", *numbers, "ms/update"]
    lines = []
    for row in result["rows"]:
        memory = [size(row.get(key)) for key in ("bytes", "second_buffer_bytes", "update_bytes")]
        costs = [si(row.get("update_macs")), si(row.get("encode_macs")), *memory]
        time = f"{row['update_ms']:.2f}" if row.get("update_ms") else "-"
        shown = [percent(row["accuracy"], row.get("accuracy_sd")), percent(row.get("base_accuracy")), percent(row.get("forgetting"))]
        shown.append(percent(row.get("prequential")))
        lines.append([row["label"], *shown, *costs, time])
    rows = {row["label"]: row for row in result["rows"]}
    repeat = percent(rows["frozen"]["last_label"])
    notes = [
        f"Means and standard deviations over {result['seeds']} seeds. Forgetting: mean over tasks of the best earlier accuracy",
        "minus the last, in points (Chaudhry et al. 2018). Beyond trunk: state once and replay memory; second buffers are RAM on top of",
        "it; written: mean bytes that an update writes to the store's files on flash. The time includes trunk and store.",
        f"Repeating the previous label would score {repeat} % prequentially on this stream of one class after another, so that",
        "prequential accuracy (each sample predicted before it is learned) tells here how soon a new class is taken up.",
        "Hyperparameters were chosen on other classes and images (`benchmarks/choose_settings.py`), among those that reach 50 % on a",
        "class just learned; finetune's and the joint heads' lie at the end of their grids.",
        "",
        *verdict(result),
        "Targets: within 2 points of joint on the same features; 40 points above finetune; latent replay at 80 % or more "
        f"(by seed {', '.join(percent(a) for a in rows['latent replay suffix']['accuracy_by_seed'])} %).",
        *_above_joint(rows),
        *_on_executorch(rows, json.loads(EXECUTORCH.read_text(encoding="utf-8"))),
        "",
        f"`edgecl demo --seeds {result['seeds']} --out docs/figures`: {result['seconds']:.0f} s. {conditions(result)}",
    ]
    return markdown(head, lines) + "\n\n" + "\n".join(notes)


def _above_joint(rows: Mapping[str, Row]) -> list[str]:
    """A sentence when a method ends above offline training of the same part."""
    above = [row["label"] for row in rows.values() if row["joint"] in rows and row["accuracy"] > rows[row["joint"]]["accuracy"]]
    return [f"Above offline training by gradient descent, which is no upper bound: {'; '.join(above)}."] if above else []


def _on_executorch(rows: Mapping[str, Row], other: Row) -> list[str]:
    """How far the same stream on ExecuTorch ends from ONNX Runtime, seed by seed."""
    apart = [
        abs(a - b)
        for row in other["rows"]
        if row["role"] != "offline"
        for a, b in zip(row["accuracy_by_seed"], rows[row["label"]]["accuracy_by_seed"], strict=False)
    ]
    return [
        f"On ExecuTorch ({other['versions']['executorch']}, `edgecl demo --engine executorch`, {other['seeds']} seed) every method "
        f"ends within {percent(max(apart))} points of the same seed on ONNX Runtime."
    ]


def _target(row: Row) -> str:
    """A step's target, and whether it is missed."""
    found = row["ratio" if row["target"].startswith("ratio") else "onnx_ms"]
    return row["target"] + (", missed" if found > float(row["target"].removeprefix("ratio ").removesuffix(" ms")) else "")


def latency_table(result: Row) -> str:
    """Time of one learning step against PyTorch."""
    lines = [
        [r["case"], f"{r['onnx_ms']:.3f}", f"{r['eager_ms']:.3f}", f"{r['ratio']:.2f}", f"{r['copy_ms']:.3f}", _target(r)]
        for r in result["rows"]
    ]
    note = (
        "Copy: of the whole state, once, by NumPy; a step that changes all of it takes no less. With `delay=16` an update reads the "
        "large matrix once and leaves its change waiting; its time holds a sixteenth of the step `refresh`, which takes the changes in. "
        "PyTorch's is the step without a delay. "
        f"`python benchmarks/learn_latency.py`: medians of {result['repeats']} interleaved repeats. {conditions(result)}"
    )
    return markdown(["step", "ONNX Runtime, ms", "PyTorch, ms", "ratio", "copy, ms", "target, at most"], lines) + "\n\n" + note


def accuracy(row: Row, key: str = "accuracy") -> str:
    """Mean and standard deviation over seeds in percent; "does not fit" for a row that does not."""
    if not row["fits"]:
        return "does not fit"
    values = row[f"{key}_by_seed"]
    return percent(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def tabled(result: Row) -> list[Row]:
    """All rows but those of the comparison of codecs."""
    return [row for row in result["rows"] if not row["label"].startswith("codec ")]


def equal_bytes_table(result: Row) -> str:
    """CIFAR-100: the accuracy of every method within each budget."""
    found = result["sets"]["cifar100"]
    inside = [row for row in tabled(found) if "last layer" not in row["label"]]
    cells = {(row["label"], row["budget"]): accuracy(row) for row in inside}
    labels, budgets = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    lines = [[label, *[cells[label, budget] for budget in budgets]] for label in labels]
    joint = {row["label"]: percent(row["accuracy"]) for row in found["joint"]["rows"]}
    note = (
        "CIFAR-100, 20,000 images one at a time on a frozen MobileNetV2: accuracy at the end in percent, means and standard deviations "
        f"over {found['seeds']} seeds, within so many bytes beyond the trunk (state, replay memory, codebooks). "
        f"Logistic regression trained offline on the last layer: {joint['last layer']}. "
        f"`python benchmarks/equal_bytes.py`. {conditions(result)}"
    )
    return markdown(["method", *budgets], lines) + "\n\n" + note


def plan_table(result: Row) -> str:
    """The Pareto front of ``edgecl plan``."""
    lines = [[cells[0], f"`{cells[1]}`", *cells[2:]] for cells in plan_rows(result)]
    notes = " ".join(remarks(result)).replace("* recommended", "\\* recommended")  # else a list's mark
    return markdown([name.removeprefix(">").replace("\n", " ") for name in COLUMNS], lines) + f"\n\n{notes} {conditions(result)}"


PAGES: dict[str, dict[str, tuple[str, Callable[[Row], str]]]] = {
    "README.md": {
        "demo": ("docs/figures/demo.json", demo_table),
        "equal_bytes": ("benchmarks/results/equal_bytes.json", equal_bytes_table),
        "latency": ("benchmarks/results/learn_latency.json", latency_table),
        "updates": ("benchmarks/results/step_latency.json", readme),
    },
    "docs/plan.md": {"plan": ("docs/figures/plan.json", plan_table)},
    "docs/int8.md": {"int8": ("benchmarks/results/int8_trunk.json", equal_table)},
    **{page: tables for page, tables in bench_tables.PAGES.items() if all((ROOT / path).exists() for path, _ in tables.values())},
}
"""The tables of each page: their JSON, and what writes them."""


def filled(page: str) -> str:
    """A page's text with every table written anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, (path, table) in PAGES[page].items():
        rows = table(json.loads((ROOT / path).read_text(encoding="utf-8")))
        block = f"<!-- table:{name} -->\n{rows}\n<!-- /table -->"
        text, found = re.subn(rf"<!-- table:{name} -->\n.*?<!-- /table -->", lambda _, block=block: block, text, flags=re.DOTALL)
        assert found == 1, f"{page}: {found} places for the table {name!r}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(filled(page), encoding="utf-8")
    plan = json.loads((ROOT / "docs/figures/plan.json").read_text(encoding="utf-8"))
    plan_figure(plan).savefig(ROOT / "docs/figures/plan.png", dpi=110)
