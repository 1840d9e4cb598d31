"""The words and tables of a report, from the content of ``run.json``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecl import tables
from edgecl.evaluate import named
from edgecl.report.charts import PHASES, layers_of, mean_curve, mean_matrix, shared_tasks
from edgecl.shown import KINDS, kind_of, shown_of
from edgecl.tables import LEDGER_WORDS, si, size, span

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the table of learners: heading, unit, text of a row, and what it means."""

    heading: str
    unit: str
    cell: Callable[[Row], str]
    meaning: str


def _milliseconds(row: Row) -> str:
    if row.get("update_ms") is None:
        return "-"
    spread = f"±{row['update_ms_sd']:.2f}" if "update_ms_sd" in row else ""
    return f"{row['update_ms']:.2f}{spread}"


def columns(kind: str) -> tuple[Column, ...]:
    """The columns of the table of learners for one kind of target."""
    shown = KINDS[kind]

    def score(heading: str, key: str, meaning: str) -> Column:
        return Column(heading, shown.unit, lambda row: shown.cell(row, key), meaning)

    whole = "on all test samples after the stream; every sample counts the same" if kind == "class" else shown.meaning
    before = "share of stream samples predicted right" if kind == "class" else f"{shown.word} of the predictions for the stream's samples"
    word = shown.word
    return (
        score(word, shown.key, whole if kind == "class" else f"of all test samples after the stream, {whole}"),
        *(score(figure.heading, figure.key, figure.meaning) for figure in shown.figures),
        score(
            "average incremental",
            named("average_incremental_accuracy", kind == "class"),
            f"mean over all tasks of the {word}, after each, on what was met so far; every task counts the same",
        ),
        score("forgetting", "forgetting", f"best earlier {word} on a task minus the last, mean over all tasks but the last"),
        score(
            "backward transfer",
            "backward_transfer",
            f"last {word} on a task minus that right after it was learned, mean over all tasks but the last; below zero is forgetting",
        ),
        score("prequential", "prequential", f"{before} before they were learned"),
        *COSTS,
    )


COSTS = (
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
    counts, seeds, shown = result["samples"], len(result["seeds"]), shown_of(result)
    learners = [row for row in result["learners"] if row["role"] != "offline"]
    best = max(learners, key=lambda row: row[shown.key], default=None)
    if best is None:
        return [f"{result['what']}."]
    mean = "" if seeds == 1 else f", the mean of {seeds} seeds"
    reached = f"{shown.cell(best, shown.key)} {shown.unit}".strip()
    right = f"is right on {reached} of" if shown.key == "accuracy" else f"reaches {shown.word} {reached} on"
    first = (
        f"{best['label']} {right} {span(counts['test'])} test samples after "
        f"learning {counts['stream']:,} samples, one at a time, on {ENGINES.get(result['engine'], result['engine'])}{mean}."
    )
    cost = f"It keeps {size(best['bytes'])} beyond the frozen trunk"
    if best.get("update_macs") is not None:
        cost += f", and an update takes {si(best['update_macs'])} MACs"
    if best.get("update_ms") is not None:
        cost += f" ({_milliseconds(best)} ms on this machine)"
    compared = [line.removeprefix("It is ") for line in tables.verdict(result_view(result))]
    lines = [first[0].upper() + first[1:], f"{cost}."]
    cheap = [row for row in learners if row.get("update_macs") is not None and best[shown.key] - row[shown.key] <= CLOSE]
    cheapest = min(cheap, key=lambda row: row["update_macs"], default=best)
    if cheapest is not best and cheapest["update_macs"] < (best.get("update_macs") or 0):
        gap = shown.points(best[shown.key] - cheapest[shown.key])
        lines.append(
            f"Close and cheaper: {cheapest['label']}, {gap} below, with {size(cheapest['bytes'])} beyond the trunk and "
            f"{si(cheapest['update_macs'])} MACs an update."
        )
    if compared and "naive" in compared[-1]:
        lines.append(f"That is {compared[-1]}")
    joint = next((row for row in result["learners"] if row["label"] == best["joint"]), None)
    if joint is not None:
        lines.append(f"Offline training on everything at once, from the same features, reaches {shown.cell(joint, 'accuracy')} %.")
    return lines


CLOSE = 0.03
"""Score by which a learner may be below the best to be named for its lower cost."""

ENGINES = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
"""What the runtimes are called."""


def result_view(result: Row) -> dict[str, Any]:
    """A result as :func:`edgecl.tables.verdict` takes it."""
    return {"rows": result["learners"], "kind": kind_of(result)}


def learner_rows(result: Row) -> list[dict[str, Any]]:
    """The table of learners."""
    keys, shown = ("label", "method", "at"), columns(kind_of(result))
    return [{**{key: row[key] for key in keys}, "cells": [c.cell(row) for c in shown]} for row in result["learners"]]


def metrics(result: Row) -> dict[str, Any]:
    """Every metric of every learner, as docs/metrics.md names them; no value where a seed lacks it."""
    rows = [row for row in result["learners"] if row.get("metrics")]
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {
        "labels": [row["label"] for row in rows],
        "rows": [{"name": name.replace("_", " "), "cells": [shown_of(result).cell(row, name) for row in rows]} for name in names],
    }


def curves(result: Row) -> dict[str, Any]:
    """Score on what was met so far along the stream, mean over seeds."""
    shown = shown_of(result)
    rows = [row for row in result["learners"] if row.get("curves")]
    found = [mean_curve(result, row) for row in rows]  # of equal points: the learners of a seed are tested at the same
    samples, cells = found[0][0] if found else [], [mean.tolist() for _, mean, _ in found]
    return {
        "labels": [row["label"] for row in rows],
        "rows": [{"name": f"{n:,}", "cells": [shown.text(column[i]) for column in cells]} for i, n in enumerate(samples)],
    }


def matrices(result: Row) -> list[dict[str, Any]]:
    """The matrices of scores, by :func:`~edgecl.report.charts.mean_matrix`."""
    rows = [row for row in result["learners"] if row.get("matrices")]
    return [
        {"label": row["label"], "rows": [[shown_of(result).text(value) for value in line] for line in mean_matrix(result, row)]}
        for row in rows
    ]


def parts(result: Row) -> list[dict[str, Any]]:
    """The figures of every label, value or class at the end, mean over the seeds: a table a learner."""
    shown, names, found = shown_of(result), result["data"]["classes"], []
    for row in (row for row in result["learners"] if row.get("parts")):
        by_seed = {key: np.array([one[key] for one in row["parts"]], float) for key in row["parts"][0]}  # None becomes NaN
        means = {key: [None if np.isnan(v) else v for v in values.mean(0).tolist()] for key, values in by_seed.items()}
        lines = [{"name": name, "cells": [shown.text(column[i]) for column in means.values()]} for i, name in enumerate(names)]
        found.append({"label": row["label"], "columns": [PARTS[key] for key in means], "rows": lines})
    return found


PARTS = {"f1": "F1, %", "label_accuracy": "right, %", "r2": "R²", "mse": "MSE", "mae": "MAE", "iou": "IoU, %"}
"""Headings of the figures of labels, values and classes."""

EACH = {"multilabel": "label", "vector": "value", "map": "class"}
"""What these are figures of."""


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
