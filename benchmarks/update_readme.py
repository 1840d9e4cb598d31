"""Write the README's tables from the JSON that the commands wrote.

edgecl demo --seeds 3 --out docs/figures
edgecl demo --engine executorch --json > docs/figures/executorch.json
python benchmarks/step_latency.py
python benchmarks/update_readme.py
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecl.tables import percent, si, size, verdict

ROOT = Path(__file__).resolve().parents[1]
EXECUTORCH = ROOT / "docs/figures/executorch.json"
SOURCES = {
    "demo": ROOT / "docs/figures/demo.json",
    "latency": ROOT / "benchmarks/results/step_latency.json",
    "latency_rerun": ROOT / "benchmarks/results/step_latency_rerun.json",
}


def demo_table(result: Mapping[str, Any]) -> str:
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


def _above_joint(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence when a method ends above offline training of the same part."""
    above = [row["label"] for row in rows.values() if row["joint"] in rows and row["accuracy"] > rows[row["joint"]]["accuracy"]]
    return [f"Above offline training by gradient descent, which is no upper bound: {'; '.join(above)}."] if above else []


def _on_executorch(rows: Mapping[str, Mapping[str, Any]], other: Mapping[str, Any]) -> list[str]:
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


def latency_table(result: Mapping[str, Any]) -> str:
    """Time of one learning step against PyTorch."""
    lines = [[r["case"], f"{r['onnx_ms']:.3f}", f"{r['eager_ms']:.3f}", f"{r['ratio']:.2f}", r["target"]] for r in result["rows"]]
    note = f"`python benchmarks/step_latency.py`: medians of {result['repeats']} interleaved repeats. {conditions(result)}"
    return markdown(["step", "ONNX Runtime, ms", "PyTorch, ms", "ratio", "target"], lines) + "\n\n" + note


def filled(text: str) -> str:
    """The README's text with every table written anew."""
    tables = {"demo": demo_table, "latency": latency_table, "latency_rerun": latency_table}
    for name, path in SOURCES.items():
        table = tables[name](json.loads(path.read_text(encoding="utf-8")))
        block = f"<!-- table:{name} -->\n{table}\n<!-- /table -->"
        text, found = re.subn(rf"<!-- table:{name} -->\n.*?<!-- /table -->", lambda _, block=block: block, text, flags=re.DOTALL)
        assert found == 1, f"README.md: {found} places for the table {name!r}"
    return text


def conditions(result: Mapping[str, Any]) -> str:
    """Versions and machine in one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = result["machine"]
    return f"{versions}; {machine if isinstance(machine, str) else ', '.join(machine.values())}."


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table whose columns but the first are right-aligned."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
