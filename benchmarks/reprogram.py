"""CLR on a sequence of tasks: accuracy and bytes a task beside frozen features, ridge and a fine-tuned copy; then all tasks on the device.

    python benchmarks/reprogram.py --data FOLDER --weights FILE [--shots 50] [--epochs 12] [--work FOLDER] [--out FILE]
    python benchmarks/reprogram.py --quick [--out FILE]

FOLDER holds CIFAR-100, CIFAR-10, Fashion-MNIST and the spoken digits (``edgecl.streams.fetch`` gets them), FILE MobileNetV2's weights
of ImageNet. Thirteen tasks of four sources, at 96 pixels. Learning rates are chosen on a task of CIFAR-100 that is not among them. Each
cell (row, task, rate) is written to the result as soon as it is there and is not computed again; trained tasks lie in ``--work``.
Then every task is added to one learner on ONNX Runtime and learns on there for a few samples: scores of earlier tasks are compared bit
for bit after all later ones, the task of runs of test samples is identified, and switches are timed. ``--quick`` takes a small network
of random weights and needs no data. Writes ``benchmarks/results/reprogram.json``.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from reprogram_tasks import CLASSES, Task, sequence, small_sequence
from safetensors.torch import load_file, save_file
from torch import nn

from edgecl import METHODS, ImageU8, Prepared, prepare
from edgecl.backbones import MobileNetV2, load_weights
from edgecl.figures import machine
from edgecl.graph.capture import capture
from edgecl.graph.lowering import build_step, within
from edgecl.graph.memory import kept_for_backward
from edgecl.methods._losses import cross_entropy
from edgecl.reprogram import Recipe, train_task, write_task
from edgecl_device import Learner
from edgecl_export import export

OUT = Path(__file__).parent / "results" / "reprogram.json"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RUN = 16
"""Test samples by which a task is identified together."""


@dataclass(frozen=True)
class Row:
    """A way to learn a task.

    Attributes:
        label: Its name.
        method: ``clr``, ``joint`` (the head of the frozen network), ``ridge``, or ``copy``: the whole network, trained.
        at: Where the network is cut.
        rates: Learning rates to choose from; of ridge its regulariser.
    """

    label: str
    method: str
    at: str
    rates: tuple[float, ...]


ROWS = (
    Row("linear head", "joint", "net.pool", (3e-3, 3e-2)),
    Row("ridge", "ridge", "net.pool", (0.1, 1.0)),
    Row("CLR", "clr", "input", (1e-3, 3e-3)),
    Row("CLR, last stages", "clr", "net.features.10", (1e-3, 3e-3)),
    Row("fine-tuned copy", "copy", "input", (1e-4, 5e-4)),
)


@dataclass
class Bench:
    """The network, the tasks and the result file."""

    net: nn.Module
    size: int
    tasks: list[Task]
    choice: Task
    epochs: int
    work: Path
    out: Path
    result: dict[str, Any] = field(default_factory=dict)

    def prepared(self, row: Row, rate: float) -> Prepared:
        """The learner of a row, nothing learned."""
        kind = METHODS[row.method]
        settings = {"joint": {"lr": rate, "epochs": 4 * self.epochs}, "ridge": {"gamma": rate}, "finetune": {"trainable": ("*",)}}
        fields: dict[str, Any] = settings.get(row.method, {})
        example, resize = self.choice.x[:1], ImageU8(MEAN, STD, "CHW", (self.size, self.size))
        return prepare(
            self.net, at=row.at, example=example, method=row.method, classes=CLASSES, config=kind.Config(**fields), preprocess=resize
        )

    def file(self, row: Row, task: Task, rate: float) -> Path:
        """Where a trained task lies."""
        return self.work / f"{row.label} {task.name} {rate:g}.safetensors"

    def cell(self, row: Row, task: Task, rate: float) -> dict[str, Any]:
        """Accuracy, bytes and seconds of one row on one task, computed once."""
        cells = self.result.setdefault("cells", [])
        key = {"row": row.label, "task": task.name, "rate": rate, "epochs": self.epochs, "samples": len(task.x)}
        for found in cells:
            if key.items() <= found.items() and (row.method != "clr" or self.file(row, task, rate).exists()):
                return dict(found)
        begin = time.perf_counter()
        accuracy, nbytes = LEARN[row.method](self, row, task, rate)
        cells[:] = [found for found in cells if not key.items() <= found.items()]
        cells.append({**key, "source": task.source, "accuracy": accuracy, "bytes": nbytes, "seconds": time.perf_counter() - begin})
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print(f"{row.label:<18} {task.name:<18} rate {rate:g}: {100 * accuracy:.1f}", flush=True)
        return dict(cells[-1])


def recipe(bench: Bench, rate: float) -> Recipe:
    """The authors' schedule, shrunk to this number of epochs."""
    return Recipe(epochs=bench.epochs, lr=rate, every=max(1, bench.epochs // 3))


def scored(prepared: Prepared, state: dict[str, Any], task: Task) -> float:
    """Share of a task's test images that are told right."""
    latents = torch.cat(prepared.encode(task.x_test))
    with torch.no_grad():
        found = torch.cat([prepared.learner.predict(state, part)[0]["scores"].argmax(1) for part in latents.split(64)])
    return float((found.numpy() == task.y_test).mean())


def joint(bench: Bench, row: Row, task: Task, rate: float) -> tuple[float, int]:
    """A linear head on the frozen network."""
    prepared = bench.prepared(row, rate)
    state = prepared.learner.fit(torch.cat(prepared.encode(task.x)), torch.tensor(task.y))  # type: ignore[attr-defined]
    return scored(prepared, state, task), _bytes(state)


def ridge(bench: Bench, row: Row, task: Task, rate: float) -> tuple[float, int]:
    """Ridge regression on the frozen network's features, which goes on learning."""
    prepared = bench.prepared(row, rate).fit(task.x, task.y)
    latents = prepared.encode(task.x_test)
    with torch.no_grad():
        found = [int(prepared.learner.predict(prepared.state, z)[0]["scores"].argmax()) for z in latents]
    return float((np.array(found) == task.y_test).mean()), _bytes(prepared.state)


def clr(bench: Bench, row: Row, task: Task, rate: float) -> tuple[float, int]:
    """The task's kernels, norms and head."""
    prepared = bench.prepared(row, rate)
    state = train_task(prepared, task.x, task.y, recipe(bench, rate))
    save_file({name: value.contiguous() for name, value in state.items()}, bench.file(row, task, rate))
    return scored(prepared, state, task), _bytes(state)


def fine_tuned(bench: Bench, row: Row, task: Task, rate: float) -> tuple[float, int]:
    """A copy of the whole network, norms in training mode."""
    torch.manual_seed(0)
    plan, net, resize = recipe(bench, rate), copy.deepcopy(bench.net), ImageU8(MEAN, STD, "CHW", (bench.size, bench.size))
    x, y, known = resize(torch.tensor(task.x)), torch.tensor(task.y), torch.arange(CLASSES) < len(task.class_names)
    optimiser = torch.optim.Adam(net.requires_grad_(True).train().parameters(), rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, plan.every, plan.factor)
    generator = torch.Generator().manual_seed(plan.seed)
    for _ in range(plan.epochs):
        for rows in torch.tensor_split(torch.randperm(len(x), generator=generator), -(-len(x) // plan.batch)):
            loss = cross_entropy(net(x[rows]), y[rows], known).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(part)[:, : len(task.class_names)].argmax(1) for part in resize(torch.tensor(task.x_test)).split(64)])
    kept = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    return float((found.numpy() == task.y_test).mean()), sum(tensor.numel() * 4 for tensor in kept)


LEARN = {"joint": joint, "ridge": ridge, "clr": clr, "copy": fine_tuned}


def on_device(bench: Bench, row: Row, rate: float, switches: int) -> dict[str, Any]:
    """All tasks in one learner: bits of earlier ones behind all later ones, identification, time of a switch."""
    prepared = bench.prepared(row, rate)
    with tempfile.TemporaryDirectory() as scratch:
        exported = export(prepared, Path(scratch) / "bundle", pending_capacity=8, ram_budget_bytes=1 << 30)
        with Learner.load(exported.path, Path(scratch) / "l.db") as learner:
            first: dict[str, list[bytes]] = {}
            for task in bench.tasks:
                path = Path(scratch) / "task"
                write_task(prepared, load_file(bench.file(row, task, rate)), path, task.class_names)
                learner.add_task(task.name, file=path)
                learner.switch_task(task.name)
                for i in range(4):
                    learner.learn(task.x[i], int(task.y[i]))
                first[task.name] = [learner.predict(x).scores.tobytes() for x in task.x_test[:: len(task.x_test) // 4]]
            learner.drop_task("base")
            equal, right, decided, seconds = True, [0, 0], 0, []
            for task in bench.tasks:
                learner.switch_task(task.name)
                equal &= first[task.name] == [learner.predict(x).scores.tobytes() for x in task.x_test[:: len(task.x_test) // 4]]
                order = np.random.default_rng(0).permutation(len(task.x_test))[: 2 * RUN]
                for i, sample in enumerate(order):
                    right[0] += learner.identify(task.x_test[sample]).task == task.name
                    decided += 1
                    if (i + 1) % RUN == 0:
                        seen = learner.predict(task.x_test[sample])
                        right[1] += learner.identify(seen.sample_id, last=RUN).task == task.name
            runs = sum(min(len(task.x_test), 2 * RUN) // RUN for task in bench.tasks)
            for i in range(switches):
                name = bench.tasks[i % len(bench.tasks)].name
                if i % 2:
                    learner.learn(bench.tasks[0].x[0], 0)  # so that leaving it writes it
                begin = time.perf_counter()
                learner.switch_task(name)
                seconds.append(time.perf_counter() - begin)
            blob = learner.tasks()[bench.tasks[0].name].nbytes
    return {
        "row": row.label,
        "at": row.at,
        "bits_equal": equal,
        "identified_by_one": right[0] / decided,
        f"identified_by_{RUN}": right[1] / runs if runs else None,
        "switch_ms": {"median": statistics.median(seconds) * 1e3, "worst": max(seconds) * 1e3},
        "task_bytes": blob,
        "task_values": prepared.learner.task_values(),  # type: ignore[attr-defined]
    }


def settle(net: nn.Module, x: torch.Tensor, size: int) -> None:
    """Give all norms the statistics of images."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over batches
    with torch.no_grad():
        net.train()(ImageU8(MEAN, STD, "CHW", (size, size))(x))
    net.eval()


def memory(bench: Bench) -> list[dict[str, Any]]:
    """What a learning step keeps for its backward pass, counted: as it is, and with half of its peak for activations."""
    found = []
    whole = Row("all weights, fine-tuned", "finetune", "input", (1e-3,))
    for row in (*(row for row in ROWS if row.method == "clr"), whole):
        learner = bench.prepared(row, row.rates[0]).learner
        step = build_step(capture(learner, "learn"), "onnx")
        for label, built in ((row.label, step), (f"{row.label}, recomputed", within(step, step.plan.arena_bytes // 2))):
            macs = {"canonical_macs": built.canonical.total_macs, "executed_macs": built.executed.total_macs}
            kept = sum(kept_for_backward(built.graph).values())
            found.append({"row": label, "kept_for_backward": kept, "activations_peak": built.plan.arena_bytes, **macs})
            print(json.dumps(found[-1]), flush=True)
    return found


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def made(args: argparse.Namespace) -> Bench:
    """The network and the tasks that the arguments ask for."""
    if args.quick:
        net: nn.Module = MobileNetV2(CLASSES, width=0.25)
        tasks, choice = small_sequence()
        size = 32
    else:
        net = MobileNetV2()
        load_weights(net, args.weights)
        net.classifier[1] = nn.Linear(net.classifier[1].in_features, CLASSES)
        tasks, choice = sequence(args.data, args.shots, args.tests)
        size = 96
    for parameter in net.classifier.parameters():  # type: ignore[union-attr]
        nn.init.zeros_(parameter)
    if args.quick:  # random weights: norms need statistics of what comes in
        settle(net, torch.tensor(np.concatenate([task.x for task in tasks])), size)
    whole = nn.Sequential(OrderedDict(input=nn.Identity(), net=net)).eval()
    args.work.mkdir(parents=True, exist_ok=True)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    return Bench(whole, size, tasks, choice, 2 if args.quick else args.epochs, args.work, args.out, result)


def main() -> None:
    """Choose rates, learn every task with every row, put them on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--shots", type=int, default=50, help="training images a class")
    parser.add_argument("--tests", type=int, default=50, help="test images a class")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("reprogram-work"))
    parser.add_argument("--out", type=Path, help=f"{OUT.name} among the results; with --quick a file of its own here")
    args = parser.parse_args()
    args.out = args.out or (Path(f"{OUT.stem}-quick.json") if args.quick else OUT)
    if not args.quick and (args.data is None or args.weights is None):
        parser.error("--data and --weights are needed, or --quick")
    torch.set_num_threads(args.threads)
    bench = made(args)
    rows = []
    for row in ROWS:
        rates = row.rates[:1] if args.quick else row.rates
        chosen = max(rates, key=lambda rate, row=row: bench.cell(row, bench.choice, rate)["accuracy"]) if len(rates) > 1 else rates[0]
        cells = [bench.cell(row, task, chosen) for task in bench.tasks]
        mean = statistics.fmean(cell["accuracy"] for cell in cells)
        rows.append({"row": row.label, "rate": chosen, "accuracy": mean, "bytes_a_task": statistics.fmean(c["bytes"] for c in cells)})
        print(f"{row.label:<18} mean {100 * mean:.1f}  {rows[-1]['bytes_a_task']:,.0f} bytes a task", flush=True)
    bench.result |= {"rows": rows, "memory": memory(bench)}
    clr_rows = [(row, found["rate"]) for row, found in zip(ROWS, rows, strict=True) if row.method == "clr"]
    bench.result["device"] = [on_device(bench, row, rate, 8 if args.quick else 52) for row, rate in clr_rows[-1 if args.quick else 0 :]]
    bench.result |= {
        "tasks": [{"task": t.name, "source": t.source, "classes": list(t.class_names)} for t in bench.tasks],
        "choice": bench.choice.name, "epochs": bench.epochs, "size": bench.size, "machine": machine(),
        "versions": {name: version(name) for name in ("edgecl", "torch", "onnxruntime", "numpy")},
    }  # fmt: skip
    args.out.write_text(json.dumps(bench.result, indent=1) + "\n")
    for found in bench.result["device"]:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
