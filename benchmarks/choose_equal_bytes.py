"""Choose cuts and hyperparameters for ``equal_bytes.py`` on training images only.

    python benchmarks/choose_equal_bytes.py --data FOLDER --weights FILE [--sets cifar100 ...] [--jobs 2]

Of each class's training images (500 at most) a fifth is the test set here and the rest the stream, with class orders other than
the reported ones. Methods with a closed form are solved in batch at every cut that fits a budget; methods that descend a gradient
learn the stream, first over a grid of hyperparameters at one cut, then at slda's best cut for the budget and at that one. Replay
codecs are compared at one cut with the same hyperparameters; those of product quantisation are chosen, too. Writes
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
from equal_bytes import BUDGETS, LAST, RESULTS, Row, TooLarge, arguments, at_cut, load, other, prepared_row, run_row
from rich.progress import track

from edgecl.methods import Joint
from edgecl.streams import Dataset
from edgecl_export import ExportError

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
    "ER-ACE": ("latent_replay", [{"lr": lr, "average": a, "loss": "er-ace"} for lr in (0.1, 0.3, 1.0, 3.0) for a in (0.0, 0.999)]),
}
"""Label, method and grid of what descends a gradient."""

CODEC_SET, CODEC_BUDGETS = "cifar100", ("0.25 MiB", "1 MiB", "4 MiB")
"""Where replay codecs are compared."""
PRODUCT = [{"codec": "pq", "subquantizers": m, "centroids": c} for m, c in ((72, 64), (72, 256), (144, 64), (144, 256))]
"""Product quantisation of the 576 values of :data:`NARROW`: 8 or 4 values a byte."""

JOINT = [Joint.Config(epochs=20, batch=128, lr=lr, weight_decay=wd) for lr in (1e-4, 3e-4, 1e-3) for wd in (0.03, 0.1, 0.3)]
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


def fits(row: Row, data: Dataset) -> bool:
    """Whether the row's state, codebooks, and replay rows if it has any, fit into its budget."""
    try:
        prepared_row(row, len(data.class_names), at_cut(data, row.cut).x[:300])
    except TooLarge:
        return False
    return True


def closed_forms(data: Dataset) -> list[dict[str, Any]]:
    """Every cut and regulariser of ncm, slda and ridge, and their accuracy in batch."""
    tried = []
    for cut in track(CUTS, "closed forms"):
        part = at_cut(data, cut)
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
        with ProcessPoolExecutor(args.jobs) as pool:
            accuracies = pool.map(_joint, [(at_cut(data, LAST), config) for config in JOINT])
            joint = [
                {"config": asdict(config), "accuracy": accuracy}
                for config, accuracy in zip(JOINT, track(accuracies, "joint", total=len(JOINT)), strict=True)
            ]
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
        for cut in dict.fromkeys([*cuts, NARROW])
    ]
    second = [row for row in second if fits(row, data)]
    found = evaluate(second, name, data, args)
    rows = []
    for label in GRADIENT:
        for budget in BUDGETS:
            mine = [(e["accuracy"], row) for e, row in zip(found, second, strict=True) if (row.label, row.budget) == (label, budget)]
            rows += [max(mine, key=lambda pair: pair[0])[1]] if mine else []
        rows.append(Row(f"{label}, last layer", best[label]["method"], "8 MiB", LAST, best[label]["config"]))
    if name != CODEC_SET:
        return tried + found, rows
    products, codecs = codec_rows(name, data, best["ER-ACE"]["config"], args)
    return tried + found + products, rows + codecs


def codec_rows(name: str, data: Dataset, config: dict[str, Any], args: Any) -> tuple[list[dict[str, Any]], list[Row]]:
    """What was tried of product quantisation, and rows that differ in nothing but the codec."""
    candidates = [
        row
        for budget in CODEC_BUDGETS
        for codec in PRODUCT
        if fits(row := Row("codec pq", "latent_replay", budget, NARROW, {**config, **codec}), data)
    ]
    found = evaluate(candidates, name, data, args)
    rows = []
    for budget in CODEC_BUDGETS:
        mine = [(e["accuracy"], row) for e, row in zip(found, candidates, strict=True) if row.budget == budget]
        rows += [Row(f"codec {codec}", "latent_replay", budget, NARROW, {**config, "codec": codec}) for codec in ("float32", "uint8")]
        rows.append(
            max(mine, key=lambda pair: pair[0])[1] if mine else Row("codec pq", "latent_replay", budget, NARROW, {**config, **PRODUCT[0]})
        )
    return found, rows


def evaluate(rows: list[Row], name: str, data: Dataset, args: Any) -> list[dict[str, Any]]:
    """Accuracy of each row on the validation stream."""
    jobs = [(row, name, args.data, args.weights, args.cache) for row in rows]
    with ProcessPoolExecutor(args.jobs) as pool:
        return [
            {**asdict(row), **found} for row, found in zip(rows, track(pool.map(_tried, jobs), "streams", total=len(jobs)), strict=True)
        ]


def _joint(job: tuple[Dataset, Joint.Config]) -> float:
    torch.set_num_threads(1)
    return logistic_regression(*job)


def _tried(job: tuple[Row, str, Path, Path, Path]) -> dict[str, Any]:
    """Accuracy; of a row that a gate at export refuses 0, with the reason."""
    row, name, data, weights, cache = job
    torch.set_num_threads(1)
    stream = validation_split(load(name, data, weights, cache))
    try:
        found = run_row(row, stream, load(other(name), data, weights, cache).x[:2000], SEED)
    except ExportError as error:
        return {"accuracy": 0.0, "refused": str(error)}
    return {"accuracy": found["accuracy"]}


if __name__ == "__main__":
    main()
