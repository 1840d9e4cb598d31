"""``edgecl bench sparse``: sparse training with replay: nominal work, measured time, and accuracy beside dense training.

A small ResNet, trained on CIFAR-100 first, learns the ten classes of CIFAR-10 two at a time, each image once, in the device's own loop on
ONNX Runtime; batch norm keeps the statistics of CIFAR-100. Rows are images in bytes, and every case has the same bytes for its memory:
DER++ has fewer rows, as it keeps scores. Dense cases are the same code with no mask. All are tested on the same images; differences from
the dense case of the same replay are paired by seed (order of classes, of samples, and of draws), with their 95 % interval.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgecl.bench.cells import Cell, as_file, check_known, fill, one_setting
from edgecl.bench.heads import with_head
from edgecl.bench.paired import paired
from edgecl.bench.sparse_step import CLASSES, GRADIENTS, ROWS, SPARSE, cut, measure, network
from edgecl.console import Step, silent
from edgecl.engine import EagerEngine
from edgecl.evaluate import run_stream
from edgecl.graph import cost
from edgecl.graph.capture import capture
from edgecl.graph.lowering import canonicalise
from edgecl.learner import Problem, update_macs
from edgecl.masks import nominal_macs
from edgecl.methods.finetune import Finetune
from edgecl.methods.sparcl import SparCL
from edgecl.metrics import average_incremental_accuracy, forgetting
from edgecl.prepare import Prepared, prepare
from edgecl.preprocess import IMAGENET, ImageU8
from edgecl.pretraining import Recipe, train
from edgecl.runs.files import save_network, sha256_data
from edgecl.streams import ClassIncremental, Dataset
from edgecl_device import Learner
from edgecl_device.checks import read_tensors
from edgecl_device.engines import Engine
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.manifest import TensorSpec, read_manifest
from edgecl_export import export

REPLAY: dict[str, dict[str, float]] = {"er": {}, "der++": {"distill": 0.1, "replay_weight": 0.5}}
COMMON: dict[str, Any] = {"rows_per_step": ROWS, "policy": "reservoir", "sparse": SPARSE, "lr": 0.01}
SKIP = 0.9
"""A sample whose class has more than this probability is not learned."""
DATA = 0.775
"""Share of the samples that the authors' removal leaves on average."""
NOMINAL = (0.75, 0.9, 0.95)
WIDE = "resnet18"
"""The network whose nominal work is counted, and whose step is timed."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        net: ``resnet8``, ``resnet20``, ...: what learns.
        pretraining_epochs: Of training on the first data set.
        seeds: How many; none for work and time alone.
        capacity_bytes: Of each replay memory.
        tests: Test images of a task.
        timed: Networks whose step is timed.
        forms: Sparsity and channels of a unit, of the steps that are timed.
        repeats: Turns.
        cases: Names of the cases that are wanted; all by default.
        epochs: Over each task's images; 1 is the online setting.
        device: PyTorch's device for training and streams: other than ``cpu`` the loop's steps run there, eagerly, and not on ONNX Runtime.
    """

    net: str = "resnet8"
    pretraining_epochs: int = 15
    seeds: int = 5
    capacity_bytes: int = 640 << 10
    tests: int = 200
    timed: tuple[str, ...] = (WIDE, "resnet20")
    forms: tuple[tuple[float, int], ...] = ((0.75, 1), (0.9, 1), (0.75, 4), (0.9, 4))
    repeats: int = 15
    cases: tuple[str, ...] = ()
    epochs: int = 1
    device: str = "cpu"


def cases() -> dict[str, dict[str, Any]]:
    """Changes to :data:`COMMON` by name: dense, then each granularity; at the lower sparsity also without DGM and without DDR."""
    dense: dict[str, Any] = {"sparsity": 0.0, "gradient_sparsity": 0.0, "refresh_every": 0}
    found = {f"dense, {replay}": {**dense, **REPLAY[replay]} for replay in REPLAY}
    for granularity, sparsity, dgm, ddr in product(("structured", "unstructured"), (0.75, 0.9), (True, False), (True, False)):
        whole = dgm and ddr
        if sparsity > 0.75 and not whole:
            continue
        parts = [f"{granularity} {sparsity:.0%}", *([] if dgm else ["no DGM"]), *([] if ddr else ["no DDR"])]
        masks = {"granularity": granularity, "sparsity": sparsity, "gradient_sparsity": GRADIENTS[sparsity] if dgm else sparsity}
        for replay in REPLAY if whole else ("er",):
            found[", ".join([*parts, replay])] = {**masks, "skip_above": SKIP if ddr else 1.0, **REPLAY[replay]}
    return found


def run_sparse(first: Dataset, then: Dataset, plan: Plan, folder: Path, jobs: int = 1, progress: Step = silent) -> dict[str, Any]:
    """Every figure, and the result that the tables are drawn from.

    Args:
        first: Colour images of bytes [N, 3, 32, 32] that the network is trained on before.
        then: Images of ten classes that it learns.
        plan: What is compared. A folder whose plan had fewer seeds or cases gets what is missing.
        folder: Of the figures.
        jobs: Processes that run streams; times are taken before, in one.
        progress: Called with what runs, how much of it is done, and how much there is.

    Raises:
        InputError: when the folder's figures are of another plan, data, version or machine.
    """
    check_known("cases", plan.cases, cases())
    names = ("net", "pretraining_epochs", "epochs", "capacity_bytes", "tests", "forms", "repeats")
    same = {name: getattr(plan, name) for name in names}
    with one_setting(folder, "scipy", device=plan.device, **same, first=sha256_data(first), data=sha256_data(then)) as setting:
        bench = _Bench(first, then, plan, folder)
        steps = [Cell(folder / "steps" / f"{net}.json", f"time of a step of {net}", partial(bench.timed, net)) for net in plan.timed]
        fill(steps, 1, progress)
        nominal = Cell(folder / "nominal.json", "nominal work", nominal_work)
        trained = Cell(bench.weights.with_suffix(".json"), f"training {plan.net} on the first images", bench.trained, bench.weights)
        fill([nominal, *([trained] if plan.seeds else [])], jobs, progress)
        wanted = [name for name in cases() if plan.seeds and (not plan.cases or name in plan.cases)]
        bundles = {name: bench.bundle(name) for name in wanted}
        fill(list(bundles.values()), jobs, progress)
        runs = {name: [bench.run(name, seed) for seed in range(plan.seeds)] for name in wanted}
        fill([cells[seed] for seed in range(plan.seeds) for cells in runs.values()], jobs, progress)
        found = {name: [cell.read() for cell in cells] for name, cells in runs.items()}
        costs = {name: cell.read() for name, cell in bundles.items()}
        rows = [_summary(name, found, costs[name]) for name in found]
        return {"nominal": nominal.read()["rows"], "steps": [r for cell in steps for r in cell.read()["rows"]], "rows": rows, **setting}


def _summary(name: str, found: Mapping[str, list[dict[str, Any]]], costs: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the seeds, and the paired difference of accuracy from dense training with the same replay."""
    mine, base = found[name], found.get(f"dense, {name.rpartition(', ')[2]}", [])
    row: dict[str, Any] = {"case": name, "seeds": len(mine), **{k: v for k, v in costs.items() if k != "seconds"}}
    for key in ("accuracy", "average_incremental_accuracy", "forgetting", "learned"):
        row[key] = statistics.fmean(one[key] for one in mine)
    row["sample_macs"] = round(costs["gate_macs"] + row["learned"] * costs["update_macs"])
    row["accuracies"] = [one["accuracy"] for one in mine]
    row["accuracy_sd"] = statistics.stdev(row["accuracies"]) if len(mine) > 1 else None
    row["difference"], row["interval"] = None, None
    if base and mine is not base:
        row["difference"], row["interval"] = paired(row["accuracies"], [one["accuracy"] for one in base])
    return row


def nominal_work() -> dict[str, Any]:
    """Nominal MACs of training ResNet-18 on 32x32 images, and how many times less they are than dense ones on all samples."""
    net, problem = network(WIDE), Problem(TensorSpec("z", (1, 3, 32, 32), "float32"), CLASSES)
    layers = cost.count_by_module(canonicalise(capture(Finetune(problem, suffix=net), "learn")))
    dense = 3 * sum(phases.get("forward", 0) for phases in layers.values())
    rows = []
    for sparsity in NOMINAL:
        masks: dict[str, Any] = {"sparsity": sparsity, "gradient_sparsity": GRADIENTS[sparsity], "sparse": ("layer*.conv*.weight",)}
        learner = SparCL(problem, SparCL.Config(granularity="unstructured", capacity_bytes=1 << 20, **masks), suffix=net)
        macs = nominal_macs(layers, learner.densities(), data=DATA)
        rows.append(
            {"sparsity": sparsity, "gradient_sparsity": GRADIENTS[sparsity], "data": DATA, "macs": macs, "times_less": dense / macs}
        )
    return {"dense_macs": dense, "rows": rows}


@dataclass(frozen=True)
class _Bench:
    first: Dataset
    then: Dataset
    plan: Plan
    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.plan.net}.pth"

    def timed(self, net: str) -> dict[str, Any]:
        return {"rows": measure(net, self.plan.forms, self.plan.repeats)}

    def trained(self) -> dict[str, Any]:
        """The network that every case starts from."""
        net, recipe = network(self.plan.net, len(self.first.class_names)), Recipe(epochs=self.plan.pretraining_epochs)
        generator, device = torch.Generator().manual_seed(0), self.plan.device
        train(net, self.first.x, self.first.y, preprocess=_scale(), recipe=recipe, generator=generator, device=device)
        save_network(self.weights, net.state_dict())
        with torch.no_grad():
            scores = torch.cat([net(_scale()(torch.from_numpy(part))) for part in np.array_split(self.first.x_test, 20)])
        return {"accuracy": float((scores.argmax(1).numpy() == self.first.y_test).mean())}

    def prepared(self, case: str) -> Prepared:
        """A case's learner, nothing learned; its codec has seen the whole range of bytes."""
        net = network(self.plan.net, len(self.first.class_names))
        net.load_state_dict(torch.load(self.weights, weights_only=True))
        with_head(net, "fc" if self.plan.net == WIDE else "linear", CLASSES)
        calibration = np.random.default_rng(1).integers(0, 256, (64, 3, 32, 32), np.uint8)
        calibration[0], calibration[1] = 0, 255
        config = SparCL.Config(**{**COMMON, "capacity_bytes": self.plan.capacity_bytes, **cases()[case]})
        made = prepare(cut(net), at="0", example=calibration[:1], method="sparcl", classes=CLASSES, config=config, preprocess=_scale())
        assert isinstance(made.learner, SparCL)
        made.learner.calibrate(torch.cat(made.encode(calibration)))
        return made

    def bundle(self, name: str) -> Cell:
        """A case's bundle, which is the same for every seed, and what it costs."""
        return Cell(self.folder / as_file(name) / "bundle.json", f"exporting {name}", partial(self.exported, name))

    def exported(self, name: str) -> dict[str, Any]:
        prepared = self.prepared(name)
        found = export(prepared, self.folder / as_file(name) / "bundle", ram_budget_bytes=1 << 30, overwrite=True).manifest
        macs = {step: spec.canonical_macs for step, spec in found.steps.items() if step != "gate"}
        assert prepared.memory is not None
        return {
            "update_macs": update_macs(macs, found.refresh_every),
            "gate_macs": found.steps["gate"].canonical_macs if "gate" in found.steps else 0,
            "beyond_trunk": found.ledger["beyond_trunk"],
            "activations_peak": found.ledger["activations_peak"],
            "memory_rows": prepared.memory.rows,
        }

    def run(self, name: str, seed: int) -> Cell:
        """A stream."""
        return Cell(self.folder / as_file(name) / f"seed{seed}.json", f"{name}, seed {seed}", partial(self.streamed, name, seed))

    def streamed(self, name: str, seed: int) -> dict[str, Any]:
        folder = self.folder / as_file(name) / "bundle"
        order = np.random.default_rng(seed).permutation(CLASSES).tolist()
        pairs = [order[i : i + 2] for i in range(0, CLASSES, 2)]
        stream = ClassIncremental(self.then, base_classes=[], steps=pairs, seed=seed, epochs=self.plan.epochs)
        manifest = read_manifest(folder)
        assert manifest.replay is not None
        manifest = dataclasses.replace(manifest, replay=dataclasses.replace(manifest.replay, seed=seed))
        if self.plan.device == "cpu":
            engine: Engine = OnnxEngine(folder, manifest)
        else:
            prepared = self.prepared(name)
            engine = EagerEngine(prepared.trunk, prepared.learner, self.plan.device)
        with Learner(manifest, engine, read_tensors(folder / manifest.state_file)) as learner:
            result = run_stream(learner, stream, every=len(stream), per_task=self.plan.tests)
            learned = learner.report()["session"]["learned"] / len(stream)
        return {
            "accuracy": result.accuracy,
            "average_incremental_accuracy": average_incremental_accuracy(result.matrix),
            "forgetting": forgetting(result.matrix),
            "learned": learned,
        }


def _scale() -> ImageU8:
    return ImageU8(*IMAGENET, "CHW")
