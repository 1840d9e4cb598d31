"""Choose the demo's hyperparameters on other classes and other images than those that it reports.

    python benchmarks/choose_settings.py

Base classes 4-9, then 0-3 one sample at a time; 150 training images a class, and the other 50 of the training images as
the test set. The demo's own test images are not touched. For each row the best final accuracy counts, among the settings
that do learn a new class: by accuracy alone, the best rate of naive fine-tuning is none, which is the frozen network.
Writes ``benchmarks/results/choose_settings.json``, the chosen setting first in each list.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from edgecl.demo import SETTINGS, Setting, pretrain, run_setting
from edgecl.methods import Finetune, Joint, LatentReplay, Ridge, StreamingLDA
from edgecl.streams import ClassIncremental, Dataset, fashion_mnist_subset

SEEDS = (100, 101)
LEARNS = 0.5
"""Least accuracy on a new class right after its samples, mean over the four."""
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
            LatentReplay.Config(lr=lr, optimizer=optimizer, loss=loss, new_weight=new_weight, average=average, capacity_bytes=128 << 10)
            for loss in ("er", "er-ace")
            for new_weight in (1.0, 0.3)
            for average in (0.0, 0.98)
            for optimizer, lr in (("sgd", 0.03), ("sgd", 0.1), ("momentum", 0.01), ("adam", 0.003), ("adam", 0.01))
        ],
        "joint": [Joint.Config(lr=lr, epochs=epochs) for epochs in (20, 40, 120) for lr in (1e-3, 3e-3, 1e-2)],
    }
    rows = [s for s in SETTINGS if s.method in grids]
    return [replace(s, config=config) for s in rows for config in grids[s.method]]


def main() -> None:
    """Run the grid and write the result, the chosen setting first for each row."""
    torch.set_num_threads(1)
    data = validation_split(fashion_mnist_subset())
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in SEEDS:
            stream = ClassIncremental(data, base_classes=range(4, 10), steps=[[0], [1], [2], [3]], seed=seed)
            net = pretrain(*stream.base, len(data.class_names), seed)
            for i, setting in enumerate(track(candidates(), f"seed {seed}")):
                row = run_setting(net, setting, data, stream, Path(scratch) / f"{seed}-{i}", every=10_000)
                found.setdefault((setting.label, json.dumps(asdict(setting.config))), []).append(row)
    rows: dict[str, list[dict[str, Any]]] = {}
    for (label, config), results in found.items():
        accuracies = [row["accuracy"] for row in results]
        entry = {"config": json.loads(config), "accuracy": statistics.fmean(accuracies), "by_seed": accuracies}
        if "matrix" in results[0]:
            entry["just_learned"] = statistics.fmean(row["matrix"][task][task] for row in results for task in range(1, len(row["matrix"])))
        rows.setdefault(label, []).append(entry)
    for entries in rows.values():
        entries.sort(key=lambda e: (e.get("just_learned", 1.0) < LEARNS, -e["accuracy"]))
    result = {"split": "base 4-9, stream 0-3, 150 + 50 training images a class", "seeds": SEEDS, "learns": LEARNS, "rows": rows}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    for label, entries in rows.items():
        print(label)
        for entry in entries[:6]:
            print(f"  {entry['accuracy']:.3f}  {entry.get('just_learned', float('nan')):.2f}  {entry['config']}")


if __name__ == "__main__":
    main()
