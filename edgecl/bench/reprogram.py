"""``edgecl bench reprogram``: tasks of several sources on one frozen network, each with a small set of parameters of its own.

Beside :mod:`CLR <edgecl.methods.clr>` stand a linear head on the frozen network, ridge regression on its features, and a copy of the whole
network, trained, for each task. The learning rate of a row is chosen on a further task. Then all tasks go into one learner on ONNX Runtime.
"""

import copy
import math
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgecl.backbones import MobileNetV2
from edgecl.bench.cells import Cell, as_file, fill, one_setting
from edgecl.bench.heads import with_head
from edgecl.bench.reprogram_tasks import CLASSES, Task
from edgecl.console import Step, silent
from edgecl.figures import weight_hash
from edgecl.graph.capture import capture
from edgecl.graph.lowering import build_step, within
from edgecl.graph.memory import kept_for_backward
from edgecl.learner import State
from edgecl.ledger import table_bytes
from edgecl.methods import METHODS
from edgecl.methods._losses import cross_entropy
from edgecl.methods.clr import Clr
from edgecl.methods.joint import Joint
from edgecl.prepare import Prepared, prepare
from edgecl.preprocess import IMAGENET, ImageU8
from edgecl.reprogram import Recipe, train_task, write_task
from edgecl_device import Learner
from edgecl_export import export

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
"""MobileNetV2's: ``net`` is the network, ``input`` what stands in front of it."""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        size: Pixels a side that images are resized to.
        epochs: Of training on the workstation.
        choose: Whether learning rates are chosen; else the first of each row.
        switches: Of tasks that are timed.
    """

    size: int = 96
    epochs: int = 12
    choose: bool = True
    switches: int = 52


def whole(net: MobileNetV2, classes: int) -> nn.Module:
    """A MobileNetV2 with a new head of zeros, as ``net`` behind an identity ``input``, where it can be cut."""
    return nn.Sequential(OrderedDict(input=nn.Identity(), net=with_head(net, "classifier.1", classes))).eval()


def run_reprogram(
    net: nn.Module, tasks: Sequence[Task], choice: Task, plan: Plan, folder: Path, jobs: int = 1, progress: Step = silent
) -> dict[str, Any]:
    """Every figure, and the result that the tables are drawn from.

    Args:
        net: MobileNetV2 for :data:`CLASSES` classes as ``net`` behind an identity ``input``, in eval mode.
        tasks: In their order.
        choice: The task on which learning rates are chosen.
        plan: How much is done.
        folder: Of the figures.
        jobs: Processes that train tasks.
        progress: Called with what runs, how much of it is done, and how much there is.

    Raises:
        InputError: when the folder's figures are of another network, plan, tasks, version or machine.
    """
    known: dict[str, Any] = {name: getattr(plan, name) for name in ("size", "epochs", "choose", "switches")}
    known |= {"network": weight_hash(net), "tasks": [_said(task) for task in (*tasks, choice)]}
    with one_setting(folder, **known) as setting:
        bench = _Bench(net, tuple(tasks), choice, plan, folder)
        trials = {row: [bench.cell(row, choice, rate) for rate in row.rates] for row in ROWS if plan.choose}
        fill([cell for cells in trials.values() for cell in cells], jobs, progress)
        found = {row: [cell.read()["accuracy"] for cell in cells] for row, cells in trials.items()}
        rates = {row: row.rates[int(np.argmax(found[row]))] if row in found else row.rates[0] for row in ROWS}
        cells = {row: [bench.cell(row, task, rate) for task in tasks] for row, rate in rates.items()}
        memory = bench.memory()
        fill([*memory, *(cell for some in cells.values() for cell in some)], jobs, progress)
        devices = [bench.device(row, rates[row]) for row in ROWS if row.method == "clr"]
        fill(devices, 1, progress)  # switches are timed
        return {
            "rows": [_row(row, rates[row], [cell.read() for cell in some]) for row, some in cells.items()],
            "memory": [one for cell in memory for one in cell.read()["rows"]],
            "device": [cell.read() for cell in devices],
            "choice": choice.name,
            **setting,
            "tasks": [_said(task) for task in tasks],
        }


def _said(task: Task) -> dict[str, Any]:
    sizes = {"training_images": len(task.x), "test_images": len(task.x_test)}
    return {"task": task.name, "source": task.source, "classes": list(task.class_names), **sizes, "sha256": task.sha256()}


def _row(row: Row, rate: float, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [one["accuracy"] for one in found]
    return {
        "row": row.label,
        "method": row.method,
        "at": row.at,
        "rate": rate,
        "accuracy": statistics.fmean(accuracies),
        "accuracies": accuracies,
        "bytes_a_task": statistics.fmean(one["bytes"] for one in found),
        "seconds": math.fsum(one["seconds"] for one in found),
    }


@dataclass(frozen=True)
class _Bench:
    net: nn.Module
    tasks: tuple[Task, ...]
    choice: Task
    plan: Plan
    folder: Path

    def cell(self, row: Row, task: Task, rate: float) -> Cell:
        """Accuracy, bytes and seconds of one row on one task."""
        path = self.folder / as_file(row.label) / f"{as_file(task.name)} {rate:g}.json"
        beside = path.with_suffix(".safetensors") if row.method == "clr" else None
        return Cell(path, f"{row.label}: {task.name}, rate {rate:g}", partial(self.learned, row, task, rate, path), beside)

    def learned(self, row: Row, task: Task, rate: float, path: Path) -> dict[str, Any]:
        """A trained task lies beside its figure."""
        if row.method == "copy":
            accuracy, kept = self._copied(task, rate)
            return {"accuracy": accuracy, "bytes": kept}
        prepared = self.prepared(row, rate)
        if isinstance(prepared.learner, Clr):
            state = train_task(prepared, task.x, task.y, self._recipe(rate))
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in state.items()}, path.with_suffix(".safetensors"))
        elif isinstance(prepared.learner, Joint):
            state = prepared.learner.fit(torch.cat(prepared.encode(task.x)), torch.tensor(task.y))
        else:
            state = prepared.fit(task.x, task.y).state
        with torch.no_grad():
            scores = [prepared.learner.predict(state, z)[0]["scores"] for z in prepared.encode(task.x_test)]
        kept = table_bytes(state.values())
        return {"accuracy": _accuracy(torch.cat(scores), task), "bytes": kept}

    def prepared(self, row: Row, rate: float) -> Prepared:
        """The learner of a row, nothing learned."""
        settings = {"joint": {"lr": rate, "epochs": 4 * self.plan.epochs}, "ridge": {"gamma": rate}, "finetune": {"trainable": ("*",)}}
        return prepare(
            self.net,
            at=row.at,
            example=self.choice.x[:1],
            method=row.method,
            classes=CLASSES,
            config=METHODS[row.method].Config(**settings.get(row.method, {})),  # type: ignore[arg-type]
            preprocess=self._resize(),
        )

    def _copied(self, task: Task, rate: float) -> tuple[float, int]:
        """A copy of the whole network, norms in training mode, nothing dropped, as where CLR is trained."""
        plan, net, resize = self._recipe(rate), copy.deepcopy(self.net), self._resize()
        x, y, known = resize(torch.tensor(task.x)), torch.tensor(task.y), torch.arange(CLASSES) < len(task.class_names)
        net.requires_grad_(True).train()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        optimiser = torch.optim.Adam(net.parameters(), rate)
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
            scores = torch.cat([net(part) for part in resize(torch.tensor(task.x_test)).split(64)])
        kept = sum(4 * tensor.numel() for tensor in net.state_dict().values() if tensor.is_floating_point())
        return _accuracy(torch.where(known, scores, -math.inf), task), kept

    def _recipe(self, rate: float) -> Recipe:
        """The authors' schedule, shrunk to this number of epochs."""
        return Recipe(epochs=self.plan.epochs, lr=rate, every=max(1, self.plan.epochs // 3))

    def _resize(self) -> ImageU8:
        return ImageU8(*IMAGENET, "CHW", (self.plan.size, self.plan.size))

    def memory(self) -> list[Cell]:
        """What a learning step keeps for its backward pass, counted: as it is, and with half of its peak for activations."""
        whole = Row("all weights", "finetune", "input", (1e-3,))
        rows = [*(row for row in ROWS if row.method == "clr"), whole]
        return [Cell(self.folder / "memory" / f"{as_file(r.label)}.json", f"memory: {r.label}", partial(self.kept, r)) for r in rows]

    def kept(self, row: Row) -> dict[str, Any]:
        step = build_step(capture(self.prepared(row, row.rates[0]).learner, "learn"), "onnx")
        found = []
        for label, built in ((row.label, step), (f"{row.label}, recomputed", within(step, step.plan.arena_bytes // 2))):
            macs = {"canonical_macs": built.canonical.total_macs, "executed_macs": built.executed.total_macs}
            kept = sum(kept_for_backward(built.graph).values())
            found.append({"row": label, "kept_for_backward": kept, "activations_peak": built.plan.arena_bytes, **macs})
        return {"rows": found}

    def device(self, row: Row, rate: float) -> Cell:
        """All tasks of a row in one learner."""
        path = self.folder / "device" / f"{as_file(row.label)} {rate:g}.json"
        return Cell(path, f"device: {row.label}", partial(self.on_device, row, rate))

    def on_device(self, row: Row, rate: float) -> dict[str, Any]:
        """Bits of earlier tasks behind all later ones, identification, time of a switch."""
        prepared = self.prepared(row, rate)
        assert isinstance(prepared.learner, Clr)
        trained = [self._trained(row, task, rate) for task in self.tasks]
        with tempfile.TemporaryDirectory() as scratch:
            exported = export(prepared, Path(scratch) / "bundle", pending_capacity=8, ram_budget_bytes=1 << 30)
            with Learner.load(exported.path, Path(scratch) / "l.db") as learner:
                first = {}
                for task, state in zip(self.tasks, trained, strict=True):
                    path = Path(scratch) / "task"
                    write_task(prepared, state, path, task.class_names)
                    learner.add_task(task.name, file=path)
                    learner.switch_task(task.name)
                    for i in range(4):
                        learner.learn(task.x[i], int(task.y[i]))
                    first[task.name] = _some_scores(learner, task)
                learner.drop_task("base")
                equal, alone, together = True, list[bool](), list[bool]()
                for task in self.tasks:
                    learner.switch_task(task.name)
                    equal &= first[task.name] == _some_scores(learner, task)
                    order = np.random.default_rng(0).permutation(len(task.x_test))[: 2 * RUN]
                    for sample in order:
                        alone.append(learner.identify(task.x_test[sample]).task == task.name)
                    for i, sample in enumerate(order, start=1):
                        told = learner.identify(task.x_test[sample], last=RUN)  # by this one and those before it
                        if i % RUN == 0:
                            together.append(told.task == task.name)
                seconds = self._switched(learner)
                blob = learner.tasks()[self.tasks[0].name].nbytes
        return {
            "row": row.label,
            "at": row.at,
            "bits_equal": equal,
            "identified_by_1": statistics.fmean(alone),
            f"identified_by_{RUN}": statistics.fmean(together) if together else None,
            "switch_ms": {"median": statistics.median(seconds) * 1e3, "worst": max(seconds) * 1e3},
            "task_bytes": blob,
            "task_values": prepared.learner.task_values(),
        }

    def _trained(self, row: Row, task: Task, rate: float) -> State:
        cell = self.cell(row, task, rate)
        assert cell.beside is not None
        cell.read()  # it must be as it was written
        return load_file(cell.beside)

    def _switched(self, learner: Learner) -> list[float]:
        """Seconds of switches; a task that has learned before is written when it is left."""
        seconds = []
        for i in range(self.plan.switches):
            if i % 2:
                learner.learn(self.tasks[0].x[0], 0)
            began = time.perf_counter()
            learner.switch_task(self.tasks[i % len(self.tasks)].name)
            seconds.append(time.perf_counter() - began)
        return seconds


def _accuracy(scores: Tensor, task: Task) -> float:
    """Share of a task's test images that scores [N, K] tell right."""
    return float((scores.argmax(1).numpy() == task.y_test).mean())


def _some_scores(learner: Learner, task: Task) -> list[bytes]:
    """Scores of some test images, to the bit."""
    return [learner.predict(x).scores.tobytes() for x in task.x_test[:: max(1, len(task.x_test) // 4)]]
