"""The frozen trunk in float32 and in int8: time, bytes and error on both runtimes, and accuracy before and after on real data.

    python benchmarks/int8_trunk.py --data FOLDER --weights FILE [--seeds 3] [--repeats 200] [--parts networks digits cifar10] [--out FILE]

FOLDER holds ``fsdd/recordings`` and ``cifar-10-batches-bin``, FILE is MobileNetV2's weights of ImageNet. Networks and their random inputs
are those of ``step_latency.py``; one thread, the engines in turn. Accuracy: for spoken digits the small network of ``spoken_digits.py``,
trained on five speakers, the sixth one recording at a time, another one for every seed; for CIFAR-10 MobileNetV2 at 96 pixels, five
classes as base set and five that come one after the other, 100 training images a class, another choice for every seed, tested on all
classes. Every learner was exported and learned on ONNX Runtime through the device's own loop. Trunks are calibrated with 100 base
samples, methods have their defaults: nothing was tuned. Writes ``benchmarks/results/int8_trunk.json``.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from pooled_features import Enlarged, backbone
from rich.console import Console
from spoken_digits import FEATURE, RECIPE, Standardise, load, network
from torch import nn
from update_cases import CLASSES, SHAPES, case

from edgecl import Prepared, prepare
from edgecl.figures import machine
from edgecl.pretraining import train
from edgecl.streams import ClassIncremental, Dataset, DomainIncremental
from edgecl.streams.loaders import load_cifar10
from edgecl.streams.stream import Stream
from edgecl_device import Learner
from edgecl_export import export
from edgecl_export.bundle import Exported
from edgecl_export.targets import target_of

ENGINES, DTYPES = ("onnx", "executorch"), ("float32", "int8")
METHODS = {"digits": ("ridge", "latent_replay"), "cifar10": ("ridge",)}
CALIBRATION, SAMPLES = 100, 50
CUTS = {"mobilenet_v2": "net.pool", "resnet20": "net.pool", "ds_cnn": "net.pool"}
IMAGES, TEST_IMAGES, BASE = 100, 100, range(5)
OUT = Path(__file__).parent / "results" / "int8_trunk.json"


def prepared(model: nn.Module, dtype: str, x: Any, **options: Any) -> Prepared:
    """A learner whose trunk is of a type, calibrated with some of the samples."""
    int8 = {"trunk_dtype": dtype, "calibration": x[:CALIBRATION]} if dtype == "int8" else {}
    return prepare(model, example=x[:1], **options, **int8)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def networks(repeats: int) -> list[dict[str, Any]]:
    """Every network, runtime and type: time of ``encode``, bytes, and how far latents are from eager float32's and eager's own."""
    rows = []
    for net, shape in SHAPES.items():
        x, test = (
            np.random.default_rng(seed).standard_normal((count, *shape[1:])).astype(np.float32) for seed, count in ((0, 100), (1, SAMPLES))
        )
        learners = {
            dtype: prepared(case(net, "W1").model, dtype, x, at=CUTS[net], method="ncm", classes=CLASSES).fit(x, np.arange(100) % CLASSES)
            for dtype in DTYPES
        }
        eager = {dtype: torch.cat(learner.encode(test)).numpy() for dtype, learner in learners.items()}
        with tempfile.TemporaryDirectory() as folder:
            made = {(e, d): export(learners[d], Path(folder) / f"{e}-{d}", engine=e) for e in ENGINES for d in DTYPES}
            running = {key: target_of(key[0]).read(found.path, found.manifest).engine() for key, found in made.items()}
            found = {
                key: np.concatenate([e.run("encode", {"x": test[i : i + 1]})["z"].copy() for i in range(SAMPLES)])
                for key, e in running.items()
            }
            times: dict[tuple[str, str], list[float]] = {key: [] for key in running}
            for turn in range(repeats):
                for key, engine in running.items():
                    start = time.perf_counter()
                    engine.run("encode", {"x": test[turn % SAMPLES : turn % SAMPLES + 1]})
                    times[key].append((time.perf_counter() - start) * 1e3)
            for (e, d), exported in made.items():
                ledger = exported.manifest.ledger
                rows.append({
                    "net": net, "engine": e, "dtype": d,
                    "encode_macs": exported.manifest.steps["encode"].canonical_macs,
                    "ms": statistics.median(times[e, d][repeats // 10 :]),
                    "frozen_weights": ledger["frozen_weights"],
                    "bundle_bytes": folder_bytes(exported.path),
                    "activations": exported.manifest.steps["encode"].activation_bytes,
                    "error": distance(found[e, d], eager["float32"]),
                    "from_eager": distance(found[e, d], eager[d]),
                })  # fmt: skip
            for engine in running.values():
                engine.close()
        Console().print(f"{net}: " + ", ".join(f"{r['engine']} {r['dtype']} {r['ms']:.2f} ms" for r in rows if r["net"] == net))
    return rows


def distance(found: Any, reference: Any) -> float:
    """Root mean square over the samples of the relative distance of their latents."""
    apart = np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return float(np.sqrt(np.mean(apart**2)))


def learned(exported: Exported, stream: Stream) -> float:
    """Accuracy on the tests of all tasks after the stream, each test sample weighing the same."""
    right: list[bool] = []
    with Learner.load(exported.path) as learner:
        for sample in stream:
            learner.learn(sample.x, sample.y)
        for task in range(stream.tasks):
            right += [learner.predict(x).label == y for x, y in zip(*stream.test(task), strict=True)]
    return float(np.mean(right))


def accuracies(name: str, seed: int, model: nn.Module, stream: Stream, **options: Any) -> list[dict[str, Any]]:
    """Every method and type on one stream."""
    rows = []
    for method in METHODS[name]:
        for dtype in DTYPES:
            learner = prepared(model, dtype, stream.base[0], method=method, **options).fit(*stream.base)
            with tempfile.TemporaryDirectory() as folder:
                exported = export(learner, Path(folder) / "bundle")
                weights, total = exported.manifest.ledger["frozen_weights"], folder_bytes(exported.path)
                accuracy = learned(exported, stream)
            row = {"data": name, "method": method, "dtype": dtype, "seed": seed, "accuracy": accuracy}
            rows.append({**row, "frozen_weights": weights, "bundle_bytes": total})
            Console().print(f"{name} seed {seed}: {method} {dtype} {100 * accuracy:.1f} %")
    return rows


def digits(data: Path, weights: Path, seed: int) -> list[dict[str, Any]]:
    """Spoken digits, with every seed another speaker as the new one."""
    spoken = load(data / "fsdd" / "recordings")
    speakers = range(len(spoken.group_names))
    new = seed % len(speakers)
    stream = DomainIncremental(spoken, base_groups=[i for i in speakers if i != new], steps=[[new]], seed=seed)
    x, y = stream.base
    preprocess = Standardise(float(x.mean()), float(x.std()))
    generator = torch.Generator().manual_seed(seed)
    net = network(len(spoken.class_names), generator)
    train(net, x, y, preprocess=preprocess, recipe=RECIPE, generator=generator)
    return accuracies("digits", seed, net, stream, at=FEATURE, classes=len(spoken.class_names), preprocess=preprocess)


def cifar10(data: Path, weights: Path, seed: int) -> list[dict[str, Any]]:
    """CIFAR-10 by class."""
    images, generator = load_cifar10(data / "cifar-10-batches-bin"), np.random.default_rng(seed)
    chosen = np.concatenate([generator.permutation(np.flatnonzero(images.y == k))[:IMAGES] for k in range(CLASSES)])
    tests = np.concatenate([np.flatnonzero(images.y_test == k)[:TEST_IMAGES] for k in range(CLASSES)])
    small = Dataset(images.x[chosen], images.y[chosen], images.x_test[tests], images.y_test[tests], images.class_names)
    stream = ClassIncremental(small, base_classes=BASE, steps=[[k] for k in range(len(BASE), CLASSES)], seed=seed)
    return accuracies("cifar10", seed, backbone(weights), stream, at="pool", classes=CLASSES, preprocess=Enlarged())


ACCURACY = {"digits": digits, "cifar10": cifar10}


def main() -> None:
    """Measure the parts that are asked for, and write JSON; the file's other parts stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--parts", nargs="+", default=["networks", *ACCURACY], choices=["networks", *ACCURACY])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = {"networks": before.get("networks", []), "accuracy": before.get("accuracy", [])}
    for part in args.parts:
        if part == "networks":
            rows["networks"] = networks(args.repeats)
        else:
            found = [row for seed in range(args.seeds) for row in ACCURACY[part](args.data, args.weights, seed)]
            rows["accuracy"] = [row for row in rows["accuracy"] if row["data"] != part] + found
        result = {
            **rows,
            "seeds": args.seeds,
            "repeats": args.repeats,
            "calibration_samples": CALIBRATION,
            "threads": 1,
            "versions": {name: version(name) for name in ("edgecl", "torch", "torchao", "onnxruntime", "executorch")},
            "machine": machine(),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
