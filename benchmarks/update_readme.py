"""Write the README's tables from the JSON that the commands wrote.

    edgecl demo --seeds 3 --out docs/figures
    python benchmarks/step_latency.py
    python benchmarks/update_readme.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"demo": ROOT / "docs/figures/demo.json", "latency": ROOT / "benchmarks/results/step_latency.json"}


def demo_table(result: dict[str, Any]) -> str:
    """Accuracy, forgetting and costs of every row of ``edgecl demo``."""
    head = ["method", "accuracy, %", "base classes, %", "forgetting, points", "MACs/update", "+ trunk", "bytes beyond trunk", "RAM 2nd buffers", "ms/update"]
    lines = []
    for row in result["rows"]:
        learned = row.get("matrix") is not None
        lines.append(
            [
                row["label"],
                _spread(row, "accuracy"),
                _spread(row, "base_accuracy") if learned else "",
                f"{100 * row['forgetting']:.1f}" if learned else "",
                _count(row.get("update_macs")),
                _count(row.get("encode_macs")),
                _bytes(row.get("bytes")),
                _bytes(row.get("second_buffer_bytes")),
                f"{row['update_ms']:.2f}" if row.get("update_ms") else "",
            ]
        )
    rows = {row["label"]: row for row in result["rows"]}
    baseline = max(row.get("last_label") or 0 for row in result["rows"])
    joint = rows["joint head, 576-d"]["accuracy"]
    best = max((row for row in result["rows"] if row["method"] != "joint"), key=lambda row: row["accuracy"])
    naive = max(row["accuracy"] for row in result["rows"] if row["method"] == "finetune")
    replay = rows["latent replay suffix"]["accuracy"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    note = (
        f"Means{' ± standard deviation' if result['seeds'] > 1 else ''} over {result['seeds']} seeds; forgetting: mean over tasks of the best earlier "
        f"accuracy minus the last (Chaudhry et al. 2018). Repeating the previous label would score {100 * baseline:.1f} % prequentially on this stream, "
        "so prequential accuracy says little here; it is in the JSON.\n\n"
        f"Targets: best method within 2 points of joint on the same features: {best['label']} {100 * best['accuracy']:.1f} against {100 * joint:.1f} "
        f"({100 * (joint - best['accuracy']):+.1f}). At least 40 above finetune: {100 * (best['accuracy'] - naive):.1f}. "
        f"Latent replay at least 80: {100 * replay:.1f}.\n\n"
        f"`edgecl demo --seeds {result['seeds']} --out docs/figures`, {result['seconds']:.0f} s, {versions}, {result['machine']['platform']}."
    )
    return f"{_markdown(head, lines)}\n\n{note}"


def latency_table(result: dict[str, Any]) -> str:
    """Time of one learning step against PyTorch."""
    lines = [
        [row["case"], f"{row['onnx_ms']:.3f}", f"{row['eager_ms']:.3f}", f"{row['ratio']:.2f}", row["target"]] for row in result["rows"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    note = f"`python benchmarks/step_latency.py`, medians of {result['repeats']} interleaved repeats, {versions}, {result['machine']['platform']}."
    return f"{_markdown(['step', 'ONNX Runtime, ms', 'eager PyTorch, ms', 'ratio', 'target'], lines)}\n\n{note}"


def filled(text: str) -> str:
    """The README's text with every table written anew."""
    tables = {"demo": demo_table, "latency": latency_table}
    for name, path in SOURCES.items():
        table = tables[name](json.loads(path.read_text(encoding="utf-8")))
        block = f"<!-- table:{name} -->\n{table}\n<!-- /table -->"
        text, found = re.subn(rf"<!-- table:{name} -->\n.*?<!-- /table -->", lambda _, block=block: block, text, flags=re.DOTALL)
        assert found == 1, f"README.md: {found} places for the table {name!r}"
    return text


def _spread(row: dict[str, Any], key: str) -> str:
    spread = row.get(f"{key}_sd")
    return f"{100 * row[key]:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def _count(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k" if value >= 1e3 else str(value)


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB" if value >= 2**10 else f"{value} B"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
