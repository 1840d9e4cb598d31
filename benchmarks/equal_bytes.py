"""Methods at equal bytes: what each reaches with so many bytes beyond the trunk, on one frozen MobileNetV2 at 96 pixels.

    python benchmarks/equal_bytes.py --data FOLDER --weights FILE [--sets cifar100 ...] [--seeds 3] [--jobs 2] [--out FILE]
        [--labels ridge ...] [--changed]

FOLDER holds the publishers' folders (``cifar-10-batches-bin``, ``cifar-100-binary``, ``FashionMNIST/raw``; ``edgecl.streams.fetch``
gets them), FILE is MobileNetV2 1.0 with torchvision's key names. All classes come two (of 10) or ten (of 100) at a time, in another
order for every seed, one sample at a time and each once, without a base set. The trunk's pooled features are computed once
(``pooled_features.py``); each learner is exported, and learns from them on ONNX Runtime through the device's own loop.

The bytes are the ledger's: state once and replay memory; a replay memory fills what the state leaves of the budget. Cuts and
hyperparameters come from ``choose_equal_bytes.py``, which never sees a test image. Writes ``benchmarks/results/equal_bytes.json``.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one learner a core

import numpy as np
import torch
from batch_references import discriminant, logistic_regression, nearest_mean, ridge
from pooled_features import columns, pooled_features
from rich.progress import track
from torch import nn

from edgecl import METHODS, Prepared, prepare
from edgecl.evaluate import run_stream
from edgecl.figures import machine
from edgecl.ledger import table_bytes
from edgecl.methods import Joint
from edgecl.metrics import average_incremental_accuracy, forgetting
from edgecl.streams import ClassIncremental, Dataset
from edgecl_device import Learner
from edgecl_device.manifest import sha256_file
from edgecl_export import export

KIB = 1024
BUDGETS = {"0.25 MiB": 256 * KIB, "1 MiB": 1024 * KIB, "4 MiB": 4096 * KIB, "8 MiB": 8192 * KIB}
PER_TASK = 200
"""Test images of each task that the tests along the stream use; the last one uses all."""
SMALLEST_MEMORY = 16 * KIB
"""A replay memory of fewer bytes is none."""
RESULTS = Path(__file__).parent / "results"
OPTIONS = {"ridge": {"reflect": True}}
"""What is set beside the chosen hyperparameters of a method, and changes its rounding alone."""
LAST = ("features.18",)
"""What the classifier of ImageNet sees: the cut that comparisons of this kind use."""


@dataclass(frozen=True)
class Row:
    """One learner at one budget.

    Attributes:
        label: Its method and variant, as the tables have it.
        method: Registered name.
        budget: Of :data:`BUDGETS`.
        cut: Modules whose pooled features it learns from.
        config: Hyperparameters by name; ``capacity_bytes`` is what the state leaves of the budget.
    """

    label: str
    method: str
    budget: str
    cut: tuple[str, ...]
    config: dict[str, Any]


class TooLarge(ValueError):
    """A learner's state, or its first replay row, is beyond the budget."""


def prepared_row(row: Row, classes: int, calibration: np.ndarray[Any, Any]) -> Prepared:
    """The learner of a row, with the largest replay memory that its budget leaves room for.

    Args:
        row: Method, budget, cut and hyperparameters.
        classes: Classes to make room for.
        calibration: Features [N, d] of the cut, of other images than those to learn: for ranges of replay codecs and ridge's reflection.

    Raises:
        TooLarge: when it does not fit.
    """
    kind, size = METHODS[row.method], calibration.shape[1]
    model = nn.Sequential(OrderedDict(features=nn.Identity(), head=nn.Linear(size, classes)))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    config = kind.Config(**row.config)

    def learner(config: Any) -> Prepared:
        return prepare(model, at="features", example=calibration[:1], method=row.method, classes=classes, config=config)

    prepared = learner(config)
    replays = prepared.memory is not None
    prepared.learner.calibrate(torch.tensor(calibration))
    room = BUDGETS[row.budget] - table_bytes([*prepared.state.values(), *prepared.learner.codebooks])
    if room < (SMALLEST_MEMORY if replays else 0):
        raise TooLarge(row.label)
    if replays:
        prepared = learner(replace(config, capacity_bytes=room))
        prepared.learner.calibrate(torch.tensor(calibration))
    return prepared


def at_cut(data: Dataset, cut: tuple[str, ...]) -> Dataset:
    """The features of one cut."""
    chosen = columns(cut)
    return Dataset(data.x[:, chosen], data.y, data.x_test[:, chosen], data.y_test, data.class_names)


def run_row(row: Row, data: Dataset, calibration: np.ndarray[Any, Any], seed: int) -> dict[str, Any]:
    """Export the row's learner and let it learn the stream of one seed on ONNX Runtime."""
    classes = len(data.class_names)
    data = at_cut(data, row.cut)
    step = 10 if classes == 100 else 2
    order = np.random.default_rng(seed).permutation(classes).tolist()
    stream = ClassIncremental(data, base_classes=[], steps=[order[i : i + step] for i in range(0, classes, step)], seed=seed)
    prepared = prepared_row(row, classes, calibration[:, columns(row.cut)])
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(prepared, Path(folder) / "bundle")
        with Learner.load(bundle.path) as learner:
            found = run_stream(learner, stream, every=len(stream), per_task=PER_TASK)
            right = [learner.predict(x).label == y for x, y in zip(data.x_test, data.y_test, strict=True)]
    learn = bundle.manifest.steps["learn"]
    return {
        "accuracy": float(np.mean(right)),
        "average_incremental_accuracy": average_incremental_accuracy(found.matrix),
        "forgetting": forgetting(found.matrix),
        "bytes": bundle.manifest.ledger["beyond_trunk"],
        "second_buffer_bytes": bundle.manifest.ledger["state_second_buffers"],
        "rows": prepared.memory.rows if prepared.memory is not None else None,
        "learn_macs": learn.canonical_macs,
        "update_ms": statistics.median(found.update_seconds) * 1e3,
    }


@lru_cache(maxsize=2)
def load(name: str, data: Path, weights: Path, cache: Path) -> Dataset:
    """A set's features, read once a process."""
    return pooled_features(name, data, weights, cache)


def other(name: str) -> str:
    """The set on which replay codecs are calibrated."""
    return "cifar10" if name == "cifar100" else "cifar100"


def chosen_rows(name: str) -> list[Row]:
    """The rows of a set, as ``choose_equal_bytes.py`` wrote them."""
    found = json.loads((RESULTS / "equal_bytes_settings.json").read_text())
    return [
        Row(**{**row, "cut": tuple(row["cut"]), "config": {**row["config"], **OPTIONS.get(row["method"], {})}})
        for row in found["sets"][name]["rows"]
    ]


def run_of(row: Row) -> str:
    """What tells a row's runs from others': not its label, and its budget only where a replay memory fills that."""
    config = asdict(METHODS[row.method].Config(**row.config))
    budget = row.budget if "capacity_bytes" in config else ""
    return json.dumps({**asdict(row), "label": row.method, "budget": budget, "config": config})


def is_of(entry: dict[str, Any], row: Row) -> bool:
    """Whether an entry of the result is of a row: of the same label, budget and settings."""
    wanted = asdict(row)
    return json.dumps({key: entry[key] for key in wanted}, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _job(job: tuple[str, Row, int, Path, Path, Path]) -> dict[str, Any]:
    name, row, seed, data, weights, cache = job
    torch.set_num_threads(1)
    calibration = load(other(name), data, weights, cache).x[:2000]
    try:
        return run_row(row, load(name, data, weights, cache), calibration, seed)
    except TooLarge:
        return {}


def run_all(jobs: Sequence[tuple[str, Row, int, Path, Path, Path]], workers: int) -> Iterable[dict[str, Any]]:
    """The jobs' results in their order, so many at a time."""
    with ProcessPoolExecutor(workers) as pool:
        yield from track(pool.map(_job, jobs), "runs", total=len(jobs))


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with all values of the accuracies."""
    if not found[0]:
        return {"fits": False}
    means = {key: statistics.fmean(f[key] for f in found) if isinstance(value, float) else value for key, value in found[0].items()}
    values = {f"{key}_by_seed": [f[key] for f in found] for key in ("accuracy", "average_incremental_accuracy", "forgetting")}
    return {"fits": True, **means, **values}


def in_batch(row: Row, data: Dataset) -> float | None:
    """Test accuracy of a row's method solved on all samples at once at the same regulariser, where it has a closed form."""
    solve = {"ncm": nearest_mean, "slda": discriminant, "ridge": ridge}.get(row.method)
    if solve is None:
        return None
    config = {key: value for key, value in row.config.items() if key not in OPTIONS.get(row.method, {})}
    return solve(at_cut(data, row.cut), **config)


def joint(name: str, entries: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Logistic regression trained offline on the last layer's features, and on those of the best row's cut."""
    best = max((entry for entry in entries if entry["fits"]), key=lambda entry: entry["accuracy"])
    chosen = json.loads((RESULTS / "equal_bytes_settings.json").read_text())["sets"][name]["joint"]["config"]
    data = load(name, args.data, args.weights, args.cache)
    cuts = {"last layer": LAST, "the best row's cut": tuple(best["cut"])}
    found = [
        {"label": label, "cut": cut, "accuracy": logistic_regression(at_cut(data, cut), Joint.Config(**chosen))}
        for label, cut in cuts.items()
    ]
    return {"config": chosen, "rows": found}


def arguments(text: str, sets: Sequence[str]) -> argparse.Namespace:
    """What both scripts take."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("features"))
    parser.add_argument("--sets", nargs="+", default=list(sets), choices=list(sets))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--labels", nargs="+", help="only rows of these labels; the file's others stay")
    parser.add_argument("--changed", action="store_true", help="only rows that the file does not have with the same settings")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run every chosen row on every seed and write the result."""
    args = arguments(__doc__, ("cifar100", "cifar10", "fashion_mnist"))
    out = args.out or RESULTS / "equal_bytes.json"
    result = json.loads(out.read_text()) if out.exists() else {"sets": {}}
    for name in args.sets:
        entries_before = result["sets"].get(name, {"rows": []})["rows"]
        chosen = chosen_rows(name)
        rows = [row for row in chosen if args.labels is None or row.label in args.labels]
        load(name, args.data, args.weights, args.cache), load(other(name), args.data, args.weights, args.cache)
        if args.changed:
            rows = [row for row in rows if not any(is_of(entry, row) for entry in entries_before)]
        unique = {run_of(row): row for row in reversed(rows)}
        jobs = [(name, row, seed, args.data, args.weights, args.cache) for row in unique.values() for seed in range(args.seeds)]
        found = list(run_all(jobs, args.jobs))
        runs = {run: found[i * args.seeds : (i + 1) * args.seeds] for i, run in enumerate(unique)}
        data = load(name, args.data, args.weights, args.cache)
        entries = [{**asdict(row), **summary(runs[run_of(row)]), "batch_accuracy": in_batch(row, data)} for row in rows]
        whole = [e for row in chosen for e in (entries if row in rows else entries_before) if is_of(e, row)]
        result["sets"][name] = {
            "seeds": args.seeds,
            "test_images_per_task": PER_TASK,
            "rows": whole,
            "joint": joint(name, whole, args),
        }
        result["weights_sha256"] = sha256_file(args.weights)
        result["machine"] = machine()
        result["versions"] = {package: version(package) for package in ("edgecl", "torch", "onnxruntime", "numpy")}
        out.write_text(json.dumps(result, indent=1) + "\n")
        for entry in entries:
            text = f"{100 * entry['accuracy']:.1f} % in {entry['bytes']:,} bytes" if entry["fits"] else "does not fit"
            print(f"{name} {entry['budget']:>8} {entry['label']:<12} {text}  {'+'.join(entry['cut'])}")


if __name__ == "__main__":
    main()
