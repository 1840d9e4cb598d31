"""Choose the demo's hyperparameters on other classes and other images than those that it reports.

    python benchmarks/choose_settings.py

Base classes 4-9, then 0-3 one sample at a time; 150 training images a class, and the other 50 of the training images as
the test set. The demo's own test images are not touched. Writes ``benchmarks/results/choose_settings.json``.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from edgecl.demo import SETTINGS, Setting, pretrain, run_setting
from edgecl.methods import Finetune, Joint, LatentReplay, Ridge, StreamingLDA
from edgecl.streams import ClassIncremental, Dataset, fashion_mnist_subset

SEEDS = (100, 101)
OUT = Path(__file__).parent / "results" / "choose_settings.json"


def validation_split(data: Dataset) -> Dataset:
    """The first 150 training images of each class to learn from, the other 50 to test on."""
    rank = np.zeros(len(data.y), int)
    for label in np.unique(data.y):
        rows = np.flatnonzero(data.y == label)
        rank[rows] = np.arange(len(rows))
    learn = rank < 150
    return Dataset(data.x[learn], data.y[learn], data.x[~learn], data.y[~learn], data.class_names)


def candidates() -> list[Setting]:
    """Every setting tried: each row of the demo that has something to choose."""
    grids = {
        "finetune": [Finetune.Config(lr=lr) for lr in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)],
        "slda": [StreamingLDA.Config(g0=g) for g in (0.01, 0.1, 1.0, 10.0)],
        "ridge": [Ridge.Config(gamma=g) for g in (0.01, 0.03, 0.1, 0.3, 1.0)],
        "latent_replay": [
            LatentReplay.Config(lr=lr, loss=loss, new_weight=new_weight, optimizer=optimizer, capacity_bytes=128 << 10)
            for loss in ("er", "er-ace")
            for new_weight in (1.0, 0.3, 0.1)
            for optimizer, rates in (("sgd", (0.03, 0.1)), ("momentum", (0.003, 0.01)), ("adam", (0.001, 0.003, 0.01)))
            for lr in rates
        ],
        "joint": [Joint.Config(lr=lr, epochs=epochs) for epochs in (20, 40) for lr in (1e-3, 3e-3, 1e-2)],
    }
    rows = [s for s in SETTINGS if s.method in grids]
    return [replace(s, config=config) for s in rows for config in grids[s.method]]


def main() -> None:
    """Run the grid and write the result, best first for each row."""
    torch.set_num_threads(1)
    data = validation_split(fashion_mnist_subset())
    found: dict[str, list[dict[str, object]]] = {}
    scores: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in SEEDS:
            stream = ClassIncremental(data, base_classes=range(4, 10), steps=[[0], [1], [2], [3]], seed=seed)
            net = pretrain(*stream.base, len(data.class_names), seed)
            for i, setting in enumerate(track(candidates(), f"seed {seed}")):
                row = run_setting(net, setting, data, stream, Path(scratch) / f"{seed}-{i}", every=10_000)
                scores.setdefault((setting.label, json.dumps(asdict(setting.config))), []).append(row["accuracy"])
    for (label, config), values in scores.items():
        found.setdefault(label, []).append({"config": json.loads(config), "accuracy": statistics.fmean(values), "by_seed": values})
    for rows in found.values():
        rows.sort(key=lambda row: -float(row["accuracy"]))  # type: ignore[arg-type]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(
        json.dumps({"split": "base 4-9, stream 0-3, 150 + 50 training images a class", "seeds": SEEDS, "rows": found}, indent=1) + "\n"
    )
    for label, rows in found.items():
        print(label)
        for row in rows[:6]:
            print(f"  {float(row['accuracy']):.3f}  {row['config']}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
