"""Figures of a run as plain values, for JSON: accuracies, costs, tasks, and the conditions under which they came about."""

import hashlib
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from edgecl.evaluate import StreamResult, named
from edgecl.learner import update_macs
from edgecl.methods import METHODS
from edgecl.metrics import average_incremental_accuracy, backward_transfer, forgetting
from edgecl.streams import Dataset, DomainIncremental, Stream
from edgecl_device.manifest import Manifest

FORGETTING = "max_before_last"
"""Variant of forgetting that is reported, see :func:`edgecl.metrics.forgetting`."""

ENGINE_PACKAGES = {"onnx": "onnxruntime", "executorch": "executorch"}
"""The package of each engine's runtime."""

BASELINES = ("frozen", "finetune", "ncm")
"""Methods to compare with."""


def figures(found: StreamResult) -> dict[str, Any]:
    """What a run over a stream found, as plain values; of other targets than classes, figures are called by their score."""
    classes = found.right is not None
    plain = {
        "accuracy": found.accuracy,
        "base_accuracy": found.matrix.values[-1][0] if found.trace.current[0] == 0 else None,  # else the stream's first task is task 0
        "forgetting": forgetting(found.matrix, FORGETTING) if found.matrix.tasks > 1 else None,
        "backward_transfer": backward_transfer(found.matrix) if found.matrix.tasks > 1 else None,
        "average_incremental_accuracy": average_incremental_accuracy(found.matrix),
        "prequential": found.prequential,
        "last_label": found.last_label,
        "update_bytes": statistics.fmean(found.update_bytes) if found.update_bytes else None,
        "update_ms": statistics.median(found.update_seconds) * 1e3 if found.update_seconds else None,
        "matrix": [list(row) for row in found.matrix.values],
        "curve": found.curve,
    }
    return {**{named(name, classes): value for name, value in plain.items()}, **({} if classes else {"parts": found.parts})}


def costs(manifest: Manifest) -> dict[str, Any]:
    """What a bundle's learner costs, from its manifest: MACs of one update and of the trunk, bytes by the ledger."""
    canonical = {name: step.canonical_macs for name, step in manifest.steps.items()}
    executed = {name: step.executed_macs for name, step in manifest.steps.items()}
    updates, shares = {"learn", "adapt"} & set(canonical), (manifest.refresh_every, manifest.adapt.every if manifest.adapt else 1)
    return {
        "learns": METHODS[manifest.method].summary,
        "update_macs": update_macs(canonical, *shares) if updates else None,
        "update_executed_macs": update_macs(executed, *shares) if updates else None,
        "encode_macs": canonical["encode"],
        "bytes": manifest.ledger["beyond_trunk"],
        "second_buffer_bytes": manifest.ledger["state_second_buffers"],
        "replay_bytes": manifest.ledger["replay"],
        "trunk_bytes": manifest.ledger["frozen_weights"],
    }


def tasks_of(data: Dataset, stream: Stream) -> list[dict[str, Any]]:
    """Name, classes, test images and first stream sample of every task, the base set's first where there is one.

    Args:
        data: For its class names.
        stream: Whose tasks.
    """
    first: dict[int, int] = {0: 0}
    for done, sample in enumerate(stream):
        first.setdefault(sample.task, done)
    labels = [stream.test(task)[1] for task in first]
    classes = [sorted(set(y.tolist())) if data.kind == "class" else [] for y in labels]
    alike = data.kind != "class" or (len(classes) > 1 and all(some == classes[0] for some in classes))
    tasks = []
    for (task, start), mine, y in zip(first.items(), classes, labels, strict=True):
        names = [data.class_names[c] for c in mine]
        base = task == 0 and len(stream.base[1]) > 0 and len(first) > 1
        name = f"{len(names)} base classes" if base else f"{len(names)} classes"
        if alike:  # classes say nothing about a task
            name = "base" if base else _domains(data, stream, task)
        elif len(names) <= (1 if base else 2):
            name = ", ".join(names)
        tasks.append({"name": name, "classes": names, "test_images": len(y), "first_sample": start})
    return tasks


def _domains(data: Dataset, stream: Stream, task: int) -> str:
    """The groups of a task of the stream, where few groups make a task, else its number."""
    if not isinstance(stream, DomainIncremental):
        return f"task {task}"
    groups = stream.steps[task - (1 if len(stream.base_groups) else 0)]
    return ", ".join(data.group_names[g] for g in groups) if len(groups) <= 2 else f"task {task}"


def summarise(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of every figure, with its standard deviation from two seeds on; curves of the first seed.

    A figure that some seed lacks, as its stream does not define it, is None: the rest of the row is of all seeds.

    >>> summarise([{"accuracy": 0.5}, {"accuracy": 0.7, "stability_gap": 0.1}])["stability_gap"] is None
    True
    """
    row: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in found for key in one):
        values = [one.get(key) for one in found]
        numbers = [value for value in values if isinstance(value, float)]
        if not numbers:
            row[key] = values[0]
        elif len(numbers) < len(values):
            row[key] = None
        else:
            row[key] = statistics.fmean(numbers)
            if len(numbers) > 1:
                row[f"{key}_sd"] = statistics.stdev(numbers)
    score = "accuracy" if "accuracy" in row else "score"
    return {**row, f"{score}_by_seed": [one[score] for one in found]}


def weight_hash(net: nn.Module) -> str:
    """SHA-256 over the names and values of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def versions(engine: str) -> dict[str, str]:
    """Versions of the packages that a figure depends on."""
    return {name: version(name) for name in ("edgecl", "torch", ENGINE_PACKAGES[engine], "numpy")}


def machine(device: str = "cpu") -> str:
    """The machine in words: system, processor architecture, cores, PyTorch's device if it is another one, Python."""
    kind = torch.device(device).type
    other = [] if kind == "cpu" else [torch.cuda.get_device_name(device) if kind == "cuda" else kind]
    return ", ".join(
        [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} cores", *other, f"Python {platform.python_version()}"]
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads in PyTorch: with one, sums come out alike whatever the number of cores, and small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
