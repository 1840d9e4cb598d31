"""Accuracy of sparse training on online Split CIFAR-10, against dense replay at equal buffer bytes.

    python benchmarks/sparse.py --data FOLDER [--seeds 5] [--cases NAME ...] [--jobs 1] [--quick] [--out FILE]

ResNet-20, trained on CIFAR-100 first (kept in ``--cache``), learns the ten classes of CIFAR-10 two at a time, each image once, in the
device's own loop on ONNX Runtime; batch norm keeps the statistics of CIFAR-100. Rows are images in bytes, and every case has the same
bytes for its memory: DER++ has fewer rows, as it keeps scores. Dense cases are the same code with no mask. All are tested on the same
images; differences from the dense case of the same replay are paired by seed (order of classes, of samples, and of draws), with their
95 % interval.

``--data`` holds ``cifar-10-batches-bin`` and ``cifar-100-binary`` as published. Runs that the file has are not made again. ``--quick``
makes a small network learn noise without any training before, to see that everything runs.

Writes ``benchmarks/results/sparse.json``.
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from edgecl import METHODS, prepare
from edgecl.backbones.resnet_cifar import ResNetCifar
from edgecl.evaluate import run_stream
from edgecl.figures import machine
from edgecl.metrics import average_incremental_accuracy, forgetting
from edgecl.preprocess import ImageU8
from edgecl.pretraining import Recipe, train
from edgecl.streams import ClassIncremental, Dataset, load_cifar10, load_cifar100
from edgecl_device import Learner
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_export import export

OUT = Path(__file__).parent / "results" / "sparse.json"
CLASSES = 10
BYTES = 640 << 10
"""Of the replay memory: some 200 images."""
GRADIENTS = {0.75: 0.8, 0.9: 0.92}
REPLAY: dict[str, dict[str, float]] = {"er": {}, "der++": {"distill": 0.1, "replay_weight": 0.5}}
COMMON: dict[str, Any] = {"rows_per_step": 8, "policy": "reservoir", "sparse": ("1.layer*.conv*.weight",), "lr": 0.01}
SKIP = 0.9
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom, of a two-sided interval of 95 %."""


def cases() -> dict[str, dict[str, Any]]:
    """Changes to :data:`COMMON` by name: dense, then each granularity with and without DGM and DDR."""
    dense = {"sparsity": 0.0, "gradient_sparsity": 0.0, "refresh_every": 0}
    found = {f"dense {replay}": {**dense, **REPLAY[replay]} for replay in REPLAY}
    for granularity, sparsity, dgm, ddr in product(("structured", "unstructured"), GRADIENTS, (True, False), (True, False)):
        parts = [granularity, f"{sparsity:g}", *(["DGM"] if dgm else []), *(["DDR"] if ddr else [])]
        masks = {"granularity": granularity, "sparsity": sparsity, "gradient_sparsity": GRADIENTS[sparsity] if dgm else sparsity}
        for replay in REPLAY if dgm and ddr else ("er",):
            found[" ".join([*parts, replay])] = {**masks, "skip_above": SKIP if ddr else 1.0, **REPLAY[replay]}
    return found


def network(data: Path, cache: Path, quick: bool) -> tuple[nn.Module, nn.Module]:
    """The network behind an identity, where it is cut, and what makes images of bytes."""
    scale = ImageU8([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "CHW")
    net = ResNetCifar(1 if quick else 3, 100)
    if not quick:
        path = cache / "sparse_cifar100.pt"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            known = load_cifar100(data / "cifar-100-binary")
            train(net, known.x, known.y, preprocess=scale, recipe=Recipe(epochs=15), generator=torch.Generator().manual_seed(0))
            torch.save(net.state_dict(), path)
        net.load_state_dict(torch.load(path, weights_only=True))
    net.linear = nn.Linear(64, CLASSES)
    for parameter in net.linear.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Identity(), net).eval(), scale


def images(data: Path, quick: bool) -> Dataset:
    """CIFAR-10, or noise in its shape."""
    if not quick:
        return load_cifar10(data / "cifar-10-batches-bin")
    generator, y = np.random.default_rng(0), np.arange(60) % CLASSES
    x = generator.integers(0, 256, (60, 3, 32, 32), np.uint8)
    return Dataset(x, y, x[:20], y[:20], tuple(map(str, range(CLASSES))))


def bundle_of(name: str, data: Path, cache: Path, quick: bool, folder: Path) -> tuple[Any, Any]:
    """A case's bundle and learner; it is the same for every seed."""
    model, scale = network(data, cache, quick)
    calibration = np.random.default_rng(1).integers(0, 256, (64, 3, 32, 32), np.uint8)
    calibration[0], calibration[1] = 0, 255  # the whole range of bytes
    config = METHODS["sparcl"].Config(**{**COMMON, "capacity_bytes": BYTES, **cases()[name]})
    prepared = prepare(model, at="0", example=calibration[:1], method="sparcl", classes=CLASSES, config=config, preprocess=scale)
    prepared.learner.calibrate(torch.cat(prepared.encode(calibration)))
    return export(prepared, folder, ram_budget_bytes=1 << 30), prepared


def run(job: tuple[str, int], data: Path, cache: Path, quick: bool, per_task: int) -> list[dict[str, Any]]:
    """All seeds of a case that are not there yet."""
    name, seeds = job
    torch.set_num_threads(1)
    known, found = images(data, quick), []
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        exported, prepared = bundle_of(name, data, cache, quick, Path(folder, "bundle"))
        export_seconds = perf_counter() - start
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(CLASSES).tolist()
            stream = ClassIncremental(known, base_classes=[], steps=[order[i : i + 2] for i in range(0, CLASSES, 2)], seed=seed)
            replay = dataclasses.replace(exported.manifest.replay, seed=seed)
            manifest = dataclasses.replace(exported.manifest, replay=replay)
            state = {key: tensor.numpy().copy() for key, tensor in prepared.state.items()}
            start = perf_counter()
            with Learner(manifest, OnnxEngine(exported.path, manifest), state) as learner:
                result = run_stream(learner, stream, every=len(stream), per_task=per_task)
                session = learner.report()["session"]
            found.append(
                {
                    "case": name,
                    "seed": seed,
                    "accuracy": result.accuracy,
                    "average_incremental_accuracy": average_incremental_accuracy(result.matrix),
                    "forgetting": forgetting(result.matrix),
                    "learned": session["learned"] / len(stream),
                    "learn_macs": manifest.steps["learn"].canonical_macs,
                    "executed_macs": manifest.steps["learn"].executed_macs,
                    "refresh_macs": manifest.steps["refresh"].canonical_macs if "refresh" in manifest.steps else 0,
                    "beyond_trunk": manifest.ledger["beyond_trunk"],
                    "activations_peak": manifest.ledger["activations_peak"],
                    "rows": prepared.memory.rows,
                    "update_ms": statistics.median(result.update_seconds) * 1e3,
                    "seconds": perf_counter() - start,
                    "export_seconds": export_seconds,
                }
            )
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by case, and the paired difference of accuracy from dense training with the same replay."""
    values: dict[str, dict[int, float]] = {}
    for one in runs:
        values.setdefault(one["case"], {})[one["seed"]] = one["accuracy"]
    rows = []
    for name, found in values.items():
        base = values.get(f"dense {name.split()[-1]}", {})
        pairs = [found[seed] - base[seed] for seed in found if seed in base]
        row: dict[str, Any] = {"case": name, "seeds": len(found), "accuracy": statistics.fmean(found.values())}
        if not name.startswith("dense") and pairs:
            row["difference"] = statistics.fmean(pairs)
            if len(pairs) > 1:
                row["interval"] = T_975[min(len(pairs) - 1, 9)] * statistics.stdev(pairs) / math.sqrt(len(pairs))
        rows.append(row)
    return rows


def main() -> None:
    """Make the runs that are missing and write the result behind each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("features"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(cases()), choices=list(cases()))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help=f"{OUT.name} among the results; with --quick a file of its own here")
    args = parser.parse_args()
    args.out = args.out or (Path(f"{OUT.stem}-quick.json") if args.quick else OUT)
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    there = {(one["case"], one["seed"]) for one in runs}
    if not args.quick:
        network(args.data, args.cache, quick=False)
    wanted = [(name, [seed for seed in range(args.seeds) if (name, seed) not in there]) for name in args.cases]
    work = partial(run, data=args.data, cache=args.cache, quick=args.quick, per_task=4 if args.quick else 200)
    with ProcessPoolExecutor(args.jobs) as pool:
        for found in pool.map(work, [job for job in wanted if job[1]]):
            runs += found
            result = {
                "runs": runs,
                "summary": summary(runs),
                "capacity_bytes": BYTES,
                "quick": args.quick,
                "versions": {package: version(package) for package in ("edgecl", "torch", "onnxruntime", "numpy")},
                "machine": machine(),
            }
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            for one in found:
                print(f"{one['case']}, seed {one['seed']}: {100 * one['accuracy']:.1f} %, {one['seconds']:.0f} s")


if __name__ == "__main__":
    main()
