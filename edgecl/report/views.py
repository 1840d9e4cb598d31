"""The words and tables of a report, from the content of ``run.json``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgecl import tables
from edgecl.report.charts import PHASES, layers_of, mean_curve, mean_matrix, shared_tasks
from edgecl.tables import LEDGER_WORDS, percent, si, size, span

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the table of learners: heading, unit, text of a row, and what it means."""

    heading: str
    unit: str
    cell: Callable[[Row], str]
    meaning: str


def _share(key: str) -> Callable[[Row], str]:
    return lambda row: percent(row.get(key), row.get(f"{key}_sd"))


def _milliseconds(row: Row) -> str:
    if row.get("update_ms") is None:
        return "-"
    spread = f"±{row['update_ms_sd']:.2f}" if "update_ms_sd" in row else ""
    return f"{row['update_ms']:.2f}{spread}"


COLUMNS = (
    Column("accuracy", "%", _share("accuracy"), "on all test samples after the stream; every sample counts the same"),
    Column(
        "average incremental",
        "%",
        _share("average_incremental_accuracy"),
        "mean over all tasks of the accuracy, after each, on what was met so far; every task counts the same",
    ),
    Column("forgetting", "%", _share("forgetting"), "best earlier accuracy on a task minus the last, mean over all tasks but the last"),
    Column(
        "backward transfer",
        "%",
        _share("backward_transfer"),
        "last accuracy on a task minus that right after it was learned, mean over all tasks but the last; below zero is forgetting",
    ),
    Column("prequential", "%", _share("prequential"), "share of stream samples predicted right before they were learned"),
    Column("update", "MACs", lambda row: si(row.get("update_macs")), "multiply-accumulates of one update, without the frozen trunk"),
    Column("beyond the trunk", "bytes", lambda row: size(row.get("bytes")), "state once and replay rows"),
    Column(
        "second buffers",
        "RAM",
        lambda row: size(row.get("second_buffer_bytes")),
        "RAM on top of it: new state is written beside the old, so that a refused update changes nothing",
    ),
    Column("update writes", "flash", lambda row: size(row.get("update_bytes")), "mean bytes that one update wrote to the store's files"),
    Column("update", "ms", _milliseconds, "median time of one sample on this machine: trunk, prediction, update and store"),
)


def summary(result: Row) -> list[str]:
    """What a person reads first: the setting, the best learner and what it costs, and how it compares."""
    counts, seeds = result["samples"], len(result["seeds"])
    learners = [row for row in result["learners"] if row["role"] != "offline"]
    best = max(learners, key=lambda row: row["accuracy"], default=None)
    if best is None:
        return [f"{result['what']}."]
    mean = "" if seeds == 1 else f", the mean of {seeds} seeds"
    first = (
        f"{best['label']} is right on {percent(best['accuracy'], best.get('accuracy_sd'))} % of {span(counts['test'])} test samples after "
        f"learning {counts['stream']:,} samples, one at a time, on {ENGINES.get(result['engine'], result['engine'])}{mean}."
    )
    cost = f"It keeps {size(best['bytes'])} beyond the frozen trunk"
    if best.get("update_macs") is not None:
        cost += f", and an update takes {si(best['update_macs'])} MACs"
    if best.get("update_ms") is not None:
        cost += f" ({_milliseconds(best)} ms on this machine)"
    compared = [line.removeprefix("It is ") for line in tables.verdict(result_view(result))]
    lines = [first[0].upper() + first[1:], f"{cost}."]
    cheap = [row for row in learners if row.get("update_macs") is not None and best["accuracy"] - row["accuracy"] <= CLOSE]
    cheapest = min(cheap, key=lambda row: row["update_macs"], default=best)
    if cheapest is not best and cheapest["update_macs"] < (best.get("update_macs") or 0):
        gap = percent(best["accuracy"] - cheapest["accuracy"])
        lines.append(
            f"Close and cheaper: {cheapest['label']}, {gap} points below, with {size(cheapest['bytes'])} beyond the trunk and "
            f"{si(cheapest['update_macs'])} MACs an update."
        )
    if compared and "naive" in compared[-1]:
        lines.append(f"That is {compared[-1]}")
    joint = next((row for row in result["learners"] if row["label"] == best["joint"]), None)
    if joint is not None:
        lines.append(f"Offline training on everything at once, from the same features, reaches {_share('accuracy')(joint)} %.")
    return lines


CLOSE = 0.03
"""Accuracy by which a learner may be below the best to be named for its lower cost."""

ENGINES = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
"""What the runtimes are called."""


def result_view(result: Row) -> dict[str, Any]:
    """A result as :func:`edgecl.tables.verdict` takes it."""
    return {"rows": result["learners"]}


def learner_rows(result: Row) -> list[dict[str, Any]]:
    """The table of learners."""
    keys = ("label", "method", "at")
    return [{**{key: row[key] for key in keys}, "cells": [c.cell(row) for c in COLUMNS]} for row in result["learners"]]


def metrics(result: Row) -> dict[str, Any]:
    """Every metric of every learner, as docs/metrics.md names them; no value where a seed lacks it."""
    rows = [row for row in result["learners"] if row.get("metrics")]
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {
        "labels": [row["label"] for row in rows],
        "rows": [{"name": name.replace("_", " "), "cells": [_share(name)(row) for row in rows]} for name in names],
    }


def curves(result: Row) -> dict[str, Any]:
    """Accuracy on what was met so far along the stream, mean over seeds."""
    rows = [row for row in result["learners"] if row.get("curves")]
    found = [mean_curve(result, row) for row in rows]  # of equal points: the learners of a seed are tested at the same
    samples, columns = found[0][0] if found else [], [100 * mean for _, mean, _ in found]
    return {
        "labels": [row["label"] for row in rows],
        "rows": [{"name": f"{n:,}", "cells": [f"{column[i]:.1f}" for column in columns]} for i, n in enumerate(samples)],
    }


def matrices(result: Row) -> list[dict[str, Any]]:
    """The accuracy matrices in percent, by :func:`~edgecl.report.charts.mean_matrix`."""
    rows = [row for row in result["learners"] if row.get("matrices")]
    return [{"label": row["label"], "rows": [[percent(value) for value in line] for line in mean_matrix(result, row)]} for row in rows]


def ledgers(result: Row) -> dict[str, Any]:
    """The ledger of every learner in bytes."""
    rows = [row for row in result["learners"] if row.get("ledger")]
    names = [name for name in LEDGER_WORDS if any(name in row["ledger"] for row in rows)]
    return {
        "labels": [row["label"] for row in rows],
        "rows": [
            {"name": name.replace("_", " "), "what": LEDGER_WORDS[name], "cells": [f"{row['ledger'].get(name, 0):,}" for row in rows]}
            for name in names
        ],
        "not_counted": rows[0]["ledger"]["not_counted"] if rows else "",
    }


def layers(row: Row) -> dict[str, Any]:
    """MACs of one learned sample by layer and phase."""
    found = layers_of(row)
    phases = [name for name in PHASES if any(name in mine for mine in found.values())]
    return {
        "phases": [PHASES[name][0] for name in phases],
        "rows": [
            {"name": name, "cells": [f"{mine.get(phase, 0):,}" for phase in phases], "sum": f"{sum(mine.values()):,}"}
            for name, mine in found.items()
        ],
        "sums": [f"{sum(mine.get(phase, 0) for mine in found.values()):,}" for phase in phases],
        "sum": f"{sum(sum(mine.values()) for mine in found.values()):,}",
    }


def conditions(result: Row) -> list[tuple[str, str]]:
    """Under which conditions the figures came about."""
    seconds = f"{result['seconds']:.0f} s"
    tasks = {"test samples": shared_tasks(result)}
    if not tasks["test samples"]:
        tasks = {f"test samples of seed {seed}": mine for seed, mine in zip(result["seeds"], result["tasks_by_seed"], strict=True)}
    return [
        ("data", f"{result['data']['name']}, SHA-256 {result['data']['sha256']}"),
        ("scenario", result["what"]),
        *((term, ", ".join(f"{task['name']} {task['test_samples']:,}" for task in mine)) for term, mine in tasks.items()),
        ("seeds", ", ".join(map(str, result["seeds"]))),
        *((f"{name} SHA-256", value) for name, value in result["files"].items()),
        *((f"network of seed {seed}, SHA-256", found["sha256"]) for seed, found in result["networks"].items()),
        ("versions", ", ".join(f"{name} {value}" for name, value in result["versions"].items())),
        ("machine", result["machine"]),
        ("time of the last call", seconds),
    ]
