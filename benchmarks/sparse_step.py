"""Time of one structured sparse update on stock ONNX Runtime, beside that of the dense one, and beside its own reduction of work.

    python benchmarks/sparse_step.py [--nets resnet18 resnet20] [--sparsities 0.75 0.9] [--repeats 15] [--profile] [--out FILE]

A whole network learns one new sample and 8 replayed ones, one thread: ER dense (``latent_replay``) and with structured masks (``sparcl``).
ResNet-18 is the one for 32x32 images, with a 3x3 stem; stem, shortcuts, norms and classifier stay dense. The graphs are those of a bundle.
Forms take turns of three updates; a speed-up is the median over the turns of dense over sparse, ``share`` is that over the reduction of
canonical MACs.
``--profile`` adds the runtime's own times by operator.

Writes ``benchmarks/results/sparse_step.json``; rows of other networks stay.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from torch import nn

from edgecl import METHODS, prepare
from edgecl.backbones.resnet import resnet18
from edgecl.backbones.resnet_cifar import resnet20
from edgecl.figures import machine
from edgecl.graph.capture import capture
from edgecl.graph.lowering import BuiltStep, build_step
from edgecl.prepare import Prepared
from edgecl_export.targets import target_of

OUT = Path(__file__).parent / "results" / "sparse_step.json"
CLASSES, ROWS = 10, 8
IN_TURN = 3
"""Updates of a form in its turn, of which the median counts: on a device, too, updates of one learner follow each other."""
GRADIENTS = {0.0: 0.0, 0.75: 0.8, 0.9: 0.92, 0.95: 0.9575}
"""Gradient sparsity by sparsity, as the paper's."""


def network(name: str) -> nn.Module:
    """A network for 32x32 images behind an identity, where it is cut."""
    net: nn.Module = resnet20(classes=CLASSES) if name == "resnet20" else resnet18(classes=CLASSES)
    if name == "resnet18":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return nn.Sequential(nn.Identity(), net).eval()


class Form:
    """One form of the update as a session.

    Args:
        net: Name of the network.
        sparsity: Share of the masked weights; None is dense ER.
        block: Channels of a unit.
        profile: Whether the runtime notes the time of every operator.
    """

    def __init__(self, net: str, sparsity: float | None, block: int = 1, profile: bool = False) -> None:
        self.prepared = self._prepared(net, sparsity, block)
        self.built: BuiltStep = build_step(capture(self.prepared.learner, "learn"))
        self.folder = tempfile.TemporaryDirectory()
        target_of("onnx").write({"learn": self.built}, Path(self.folder.name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = profile
        options.profile_file_prefix = f"{self.folder.name}/profile"
        self.session = onnxruntime.InferenceSession(f"{self.folder.name}/learn.onnx", options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        values = self._values()
        for port in self.session.get_inputs():
            self.binding.bind_ortvalue_input(port.name, onnxruntime.OrtValue.ortvalue_from_numpy(values[port.name].reshape(port.shape)))
        self.outputs = []  # bound buffers, as the engine has them
        for port in self.session.get_outputs():
            kind = {"tensor(float)": np.float32, "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}[port.type]
            self.outputs.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(port.shape, kind))
            self.binding.bind_ortvalue_output(port.name, self.outputs[-1])

    def _prepared(self, net: str, sparsity: float | None, block: int) -> Prepared:
        x = np.random.default_rng(0).standard_normal((ROWS + 1, 3, 32, 32)).astype(np.float32)
        common = {"rows_per_step": ROWS, "capacity_bytes": 1 << 20, "policy": "reservoir", "loss": "er-ace"}
        if sparsity is None:
            method, config = "latent_replay", METHODS["latent_replay"].Config(**common)
        else:
            method = "sparcl"
            config = METHODS[method].Config(
                **common, sparsity=sparsity, gradient_sparsity=GRADIENTS[sparsity], block=block, sparse=("1.layer*.conv*.weight",)
            )
        prepared = prepare(network(net), at="0", example=x[:1], method=method, classes=CLASSES, config=config)
        return prepared.fit(x, np.arange(ROWS + 1) % CLASSES)

    def _values(self) -> dict[str, np.ndarray[Any, Any]]:
        rows = self.prepared.memory.draw() if self.prepared.memory is not None else {}
        z = self.prepared.examples[0][0].numpy()
        given = {"z": z, "target": np.array([1]), "weight": np.ones(1, np.float32), "lr": np.array(0.001, np.float32), **rows}
        return {**given, **{f"state.{name}": tensor.numpy().copy() for name, tensor in self.prepared.state.items()}}

    def update(self) -> tuple[float, float]:
        """Milliseconds of one update, and those of them that it was computing: on a busy machine the rest is waiting."""
        start, own = perf_counter(), thread_time()
        self.session.run_with_iobinding(self.binding)
        return (perf_counter() - start) * 1e3, (thread_time() - own) * 1e3

    def operators(self) -> dict[str, float]:
        """Milliseconds of an update by type of operator, the longest first."""
        times: dict[str, list[float]] = defaultdict(list)
        kinds = {}
        for event in json.loads(Path(self.session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times[event["name"]].append(event["dur"] / 1e3)
                kinds[event["name"]] = event["args"]["op_name"]
        found: dict[str, float] = defaultdict(float)
        for name, values in times.items():
            found[kinds[name]] += statistics.median(values)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(net: str, sparsities: list[float], block: int, repeats: int, profile: bool) -> list[dict[str, Any]]:
    """Rows of one network: the dense form first."""
    forms = {sparsity: Form(net, sparsity, block) for sparsity in (None, *sparsities)}
    times: dict[float | None, list[float]] = {sparsity: [] for sparsity in forms}
    computing: dict[float | None, list[float]] = {sparsity: [] for sparsity in forms}
    for turn in range(repeats + 1):
        for sparsity, form in forms.items():
            updates = [form.update() for _ in range(IN_TURN)]
            if turn:  # the first warms up
                times[sparsity].append(statistics.median(wall for wall, _ in updates))
                computing[sparsity].append(statistics.median(own for _, own in updates))
    dense = forms[None].built
    rows = []
    for sparsity, form in forms.items():
        ratios = [a / b for a, b in zip(times[None], times[sparsity], strict=True)]
        own = statistics.median(a / b for a, b in zip(computing[None], computing[sparsity], strict=True))
        reduction = dense.canonical.total_macs / form.built.canonical.total_macs
        row = {
            "net": net,
            "sparsity": sparsity,
            "gradient_sparsity": None if sparsity is None else GRADIENTS[sparsity],
            "block": block,
            "canonical_macs": form.built.canonical.total_macs,
            "executed_macs": form.built.executed.total_macs,
            "elementwise": form.built.executed.elementwise,
            "activation_bytes": form.built.plan.arena_bytes,
            "state_bytes": sum(t.numel() * t.element_size() for t in form.prepared.state.values()),
            "ms": statistics.median(times[sparsity]),
            "speed_up": statistics.median(ratios),
            "speed_ups": [min(ratios), max(ratios)],
            "mac_reduction": reduction,
            "share": statistics.median(ratios) / reduction,
            "computing_ms": statistics.median(computing[sparsity]),
            "computing_speed_up": own,
            "computing_share": own / reduction,
        }
        if profile:
            traced = Form(net, sparsity, block, profile=True)
            for _ in range(max(3, repeats // 3)):
                traced.update()
            row["operators_ms"] = traced.operators()
        rows.append(row)
    return rows


def main() -> None:
    """Measure every network and write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet18", "resnet20"], choices=["resnet18", "resnet20"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.75, 0.9], choices=list(GRADIENTS))
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for net in args.nets:
        before = os.getloadavg()[0]
        found = measure(net, args.sparsities, args.block, args.repeats, args.profile)
        rows = [row for row in rows if row["net"] != net] + [{**row, "load_before": before} for row in found]
        result = {
            "rows": rows,
            "repeats": args.repeats,
            "threads": 1,
            "versions": {name: version(name) for name in ("edgecl", "torch", "onnxruntime")},
            "machine": machine(),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        for row in found:
            gain = (
                f"{row['speed_up']:.2f}x of {row['mac_reduction']:.2f}x, share {row['share']:.0%}; computing {row['computing_share']:.0%}"
            )
            Console().print(f"{net} {row['sparsity']}: {row['ms']:.1f} ms, {gain}")


if __name__ == "__main__":
    main()
