"""Choose cuts and hyperparameters for ``equal_bytes.py`` on training images only.

    python benchmarks/choose_equal_bytes.py --data FOLDER --weights FILE [--sets cifar100 ...] [--jobs 2]

Of each class's training images (500 at most) a fifth is the test set here and the rest the stream, with class orders other than
the reported ones. Methods with a closed form are solved in batch at every cut that fits a budget; methods that descend a gradient
learn the stream, first over a grid of hyperparameters at one cut, then at slda's best cut for the budget and at a narrow one. Writes
``benchmarks/results/equal_bytes_settings.json``: every candidate tried, and the rows that are chosen.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batch_references import discriminant, logistic_regression, nearest_mean, ridge
from equal_bytes import BUDGETS, RESULTS, Row, TooLarge, arguments, load, other, prepared_row, run_row
from pooled_features import columns
from rich.progress import track

from edgecl.methods import Joint
from edgecl.streams import Dataset

LAST = ("features.18",)
"""What the classifier of ImageNet sees: the cut that comparisons of this kind use."""

NARROW = ("features.13", "features.16", "features.17")
"""The cut at which hyperparameters are chosen."""

CUTS = [
    *[(f"features.{i}",) for i in (10, 13, 16, 17)],
    *[(f"features.{i}.conv.1",) for i in (11, 14, 15)],
    LAST,
    ("features.10", "features.13"),
    ("features.10", "features.16"),
    ("features.13", "features.16"),
    ("features.13", "features.17"),
    ("features.10", "features.13", "features.16"),
    NARROW,
    ("features.10", *NARROW),
    ("features.13", "features.14.conv.1"),
    ("features.14.conv.1", "features.16"),
    ("features.13", "features.14.conv.1", "features.16"),
    ("features.14.conv.1", "features.17"),
    ("features.13", "features.15.conv.1", "features.16"),
    ("features.11.conv.1", "features.15.conv.1"),
    ("features.15.conv.1", "features.17"),
    ("features.13", *LAST),
]

CLOSED: dict[str, tuple[str, Callable[[Dataset, float], float], list[float]]] = {
    "g0": ("slda", discriminant, [0.01, 0.1, 1.0]),
    "gamma": ("ridge", ridge, [0.01, 0.1, 1.0]),
}
"""Regulariser of each closed form, by its name: method, batch solution, grid."""

GRADIENT: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "finetune": ("finetune", [{"lr": lr} for lr in (0.03, 0.1, 0.3, 1.0, 3.0)]),
    "ER": ("latent_replay", [{"lr": lr, "average": a} for lr in (0.3, 1.0, 3.0) for a in (0.0, 0.999)]),
    "ER-ACE": ("latent_replay", [{"lr": lr, "average": a, "loss": "er-ace"} for lr in (0.3, 1.0, 3.0) for a in (0.0, 0.999)]),
}
"""Label, method and grid of what descends a gradient."""

JOINT = [Joint.Config(epochs=30, batch=128, lr=lr, weight_decay=wd) for lr in (3e-4, 1e-3, 3e-3) for wd in (1e-2, 1e-1, 1.0)]
MOST = 500
SEED = 1000


def validation_split(data: Dataset) -> Dataset:
    """Of each class's first :data:`MOST` training images a fifth to test on, the others to learn from."""
    rank = np.zeros(len(data.y), int)
    for label in np.unique(data.y):
        rows = np.flatnonzero(data.y == label)[:MOST]
        rank[rows] = np.where(np.arange(len(rows)) < len(rows) // 5, 1, 2)
    test, learn = rank == 1, rank == 2
    return Dataset(data.x[learn], data.y[learn], data.x[test], data.y[test], data.class_names)


def at(data: Dataset, cut: tuple[str, ...]) -> Dataset:
    """The features of one cut."""
    chosen = columns(cut)
    return Dataset(data.x[:, chosen], data.y, data.x_test[:, chosen], data.y_test, data.class_names)


def fits(row: Row, data: Dataset) -> bool:
    """Whether the row's state, and replay rows if it has any, fit into its budget."""
    try:
        prepared_row(row, len(data.class_names), at(data, row.cut).x[:10])
    except TooLarge:
        return False
    return True


def closed_forms(data: Dataset) -> list[dict[str, Any]]:
    """Every cut and regulariser of ncm, slda and ridge, and their accuracy in batch."""
    tried = []
    for cut in track(CUTS, "closed forms"):
        part = at(data, cut)
        tried.append({"label": "ncm", "method": "ncm", "cut": cut, "config": {}, "accuracy": nearest_mean(part)})
        for name, (method, solve, grid) in CLOSED.items():
            tried += [
                {"label": method, "method": method, "cut": cut, "config": {name: value}, "accuracy": solve(part, value)} for value in grid
            ]
    return tried


def best_fitting(tried: Iterable[dict[str, Any]], budget: str, data: Dataset, count: int = 1) -> list[Row]:
    """Rows of the most accurate candidates at different cuts that fit a budget; fewer where not so many do."""
    rows: list[Row] = []
    for entry in sorted(tried, key=lambda e: -e["accuracy"]):
        row = Row(entry["label"], entry["method"], budget, tuple(entry["cut"]), entry["config"])
        if row.cut not in [r.cut for r in rows] and fits(row, data):
            rows.append(row)
        if len(rows) == count:
            break
    return rows


def main() -> None:
    """Try the candidates of every set and write them with the chosen rows."""
    args = arguments(__doc__, ("cifar100", "cifar10", "fashion_mnist"))
    out = args.out or RESULTS / "equal_bytes_settings.json"
    result = json.loads(out.read_text()) if out.exists() else {"sets": {}}
    torch.set_num_threads(1)
    for name in args.sets:
        data = validation_split(load(name, args.data, args.weights, args.cache))
        load(other(name), args.data, args.weights, args.cache)
        closed = closed_forms(data)
        rows = []
        for label in ("ncm", "slda", "ridge"):
            mine = [entry for entry in closed if entry["label"] == label]
            rows += [row for budget in BUDGETS for row in best_fitting(mine, budget, data)]
            rows += [
                replace(row, label=f"{label}, last layer") for row in best_fitting([e for e in mine if e["cut"] == LAST], "8 MiB", data)
            ]
        places = {budget: [r.cut for r in best_fitting([e for e in closed if e["label"] == "slda"], budget, data)] for budget in BUDGETS}
        tried, descended = gradient_rows(name, data, places, args)
        joint = [{"config": asdict(c), "accuracy": logistic_regression(at(data, LAST), c)} for c in track(JOINT, "joint")]
        result["sets"][name] = {
            "rows": [asdict(row) for row in [*rows, *descended]],
            "joint": max(joint, key=lambda e: e["accuracy"]),
            "tried": {"closed": closed, "gradient": tried, "joint": joint},
        }
        out.write_text(json.dumps(result, indent=1) + "\n")
        for row in [*rows, *descended]:
            print(f"{name} {row.budget:>8} {row.label:<18} {'+'.join(row.cut)}  {row.config}")


def gradient_rows(name: str, data: Dataset, places: dict[str, list[tuple[str, ...]]], args: Any) -> tuple[list[dict[str, Any]], list[Row]]:
    """What was tried of the methods that descend a gradient, and the chosen rows."""
    first = [Row(label, method, "4 MiB", NARROW, config) for label, (method, grid) in GRADIENT.items() for config in grid]
    tried = evaluate(first, name, data, args)
    best = {label: max((e for e in tried if e["label"] == label), key=lambda e: e["accuracy"]) for label in GRADIENT}
    second = [
        Row(label, best[label]["method"], budget, cut, best[label]["config"])
        for label in GRADIENT
        for budget, cuts in places.items()
        for cut in dict.fromkeys([*cuts, ("features.13", "features.16")])
    ]
    second = [row for row in second if fits(row, data)]
    found = evaluate(second, name, data, args)
    rows = []
    for label in GRADIENT:
        for budget in BUDGETS:
            mine = [(e["accuracy"], row) for e, row in zip(found, second, strict=True) if (row.label, row.budget) == (label, budget)]
            rows += [max(mine, key=lambda pair: pair[0])[1]] if mine else []
        rows.append(Row(f"{label}, last layer", best[label]["method"], "8 MiB", LAST, best[label]["config"]))
    return tried + found, rows


def evaluate(rows: list[Row], name: str, data: Dataset, args: Any) -> list[dict[str, Any]]:
    """Accuracy of each row on the validation stream."""
    jobs = [(row, name, args.data, args.weights, args.cache) for row in rows]
    with ProcessPoolExecutor(args.jobs) as pool:
        return [
            {"label": row.label, "method": row.method, "budget": row.budget, "cut": row.cut, "config": row.config, "accuracy": accuracy}
            for row, accuracy in zip(rows, track(pool.map(_accuracy, jobs), "streams", total=len(jobs)), strict=True)
        ]


def _accuracy(job: tuple[Row, str, Path, Path, Path]) -> float:
    row, name, data, weights, cache = job
    torch.set_num_threads(1)
    stream = validation_split(load(name, data, weights, cache))
    found = run_row(row, stream, load(other(name), data, weights, cache).x[:2000], SEED)
    return float(found["accuracy"])


if __name__ == "__main__":
    main()
