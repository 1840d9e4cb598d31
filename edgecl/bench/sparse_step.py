"""Time of one structured sparse update on stock ONNX Runtime, beside that of the dense one, and beside its own reduction of work.

A whole network learns one new sample and 8 replayed ones, one thread: ER dense (``latent_replay``) and with structured masks (``sparcl``).
ResNet-18 is the one for 32x32 images, with a 3x3 stem; stem, shortcuts, norms and classifier stay dense. The graphs are those of a bundle.
Forms take turns of three updates; a speed-up is the median over the turns of dense over sparse, ``share`` is that over the reduction of
canonical MACs.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from edgecl.backbones.resnet import resnet18
from edgecl.backbones.resnet_cifar import ResNetCifar
from edgecl.graph.capture import capture
from edgecl.graph.lowering import BuiltStep, build_step
from edgecl.ledger import table_bytes
from edgecl.methods import METHODS
from edgecl.prepare import Prepared, prepare
from edgecl_export.targets import target_of

CLASSES, ROWS = 10, 8
SPARSE = ("1.layer*.conv*.weight",)
"""Weights that are masked, of a network that is cut in front."""
IN_TURN = 3
"""Updates of a form in its turn, of which the median counts: on a device, too, updates of one learner follow each other."""
GRADIENTS = {0.0: 0.0, 0.75: 0.8, 0.9: 0.92, 0.95: 0.9575}
"""Gradient sparsity by sparsity, as the paper's."""


def network(name: str, classes: int = CLASSES) -> nn.Module:
    """``resnet18`` with a stem for 32x32 images, or ``resnet8``, ``resnet20``, ... for them."""
    if name != "resnet18":
        return ResNetCifar((int(name.removeprefix("resnet")) - 2) // 6, classes).eval()
    net = resnet18(classes=classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu", generator=torch.Generator().manual_seed(0))
    net.register_module("maxpool", nn.Identity())
    return net.eval()


def cut(net: nn.Module) -> nn.Module:
    """The network behind an identity, where it is cut."""
    return nn.Sequential(nn.Identity(), net).eval()


class Form:
    """One form of the update as a session.

    Args:
        net: Name of the network.
        sparsity: Share of the masked weights; None is dense ER.
        block: Channels of a unit.
    """

    def __init__(self, net: str, sparsity: float | None, block: int = 1) -> None:
        self.sparsity, self.block = sparsity, block
        self.prepared = self._prepared(net, sparsity, block)
        self.built: BuiltStep = build_step(capture(self.prepared.learner, "learn"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            target_of("onnx").write({"learn": self.built}, Path(folder))
            self.session = onnxruntime.InferenceSession(f"{folder}/learn.onnx", options, providers=["CPUExecutionProvider"])
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
            config = METHODS[method].Config(**common, sparsity=sparsity, gradient_sparsity=GRADIENTS[sparsity], block=block, sparse=SPARSE)
        prepared = prepare(cut(network(net)), at="0", example=x[:1], method=method, classes=CLASSES, config=config)
        return prepared.fit(x, np.arange(ROWS + 1) % CLASSES)

    def _values(self) -> dict[str, np.ndarray[Any, Any]]:
        rows = self.prepared.memory.draw() if self.prepared.memory is not None else {}
        z = self.prepared.examples[0][0].numpy()
        given = {"z": z, "target": np.array([1]), "weight": np.ones(1, np.float32), "lr": np.array(0.001, np.float32), **rows}
        return {**given, **{f"state.{name}": tensor.numpy().copy() for name, tensor in self.prepared.state.items()}}

    def said(self) -> dict[str, Any]:
        """What it is, and what it counts."""
        return {
            "sparsity": self.sparsity,
            "gradient_sparsity": None if self.sparsity is None else GRADIENTS[self.sparsity],
            "block": self.block,
            "canonical_macs": self.built.canonical.total_macs,
            "executed_macs": self.built.executed.total_macs,
            "elementwise": self.built.executed.elementwise,
            "activation_bytes": self.built.plan.arena_bytes,
            "state_bytes": table_bytes(self.prepared.state.values()),
        }

    def update(self) -> tuple[float, float]:
        """Milliseconds of one update, and those of them that it was computing: on a busy machine the rest is waiting."""
        start, own = perf_counter(), thread_time()
        self.session.run_with_iobinding(self.binding)
        return (perf_counter() - start) * 1e3, (thread_time() - own) * 1e3


def measure(net: str, forms: Sequence[tuple[float, int]], repeats: int) -> list[dict[str, Any]]:
    """Rows of one network: the dense form first, then each sparsity with its channels of a unit."""
    made: list[Form] = [Form(net, None), *(Form(net, sparsity, block) for sparsity, block in forms)]
    times: list[list[float]] = [[] for _ in made]
    computing: list[list[float]] = [[] for _ in made]
    for turn in range(repeats + 1):
        for i, form in enumerate(made):
            updates = [form.update() for _ in range(IN_TURN)]
            if turn:  # the first warms up
                times[i].append(statistics.median(wall for wall, _ in updates))
                computing[i].append(statistics.median(own for _, own in updates))
    dense = made[0].built.canonical.total_macs
    return [
        {"net": net, **form.said(), **_faster(dense / form.built.canonical.total_macs, times[0], times[i], computing[0], computing[i])}
        for i, form in enumerate(made)
    ]


def _faster(
    reduction: float, dense: Sequence[float], sparse: Sequence[float], dense_own: Sequence[float], sparse_own: Sequence[float]
) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(dense, sparse, strict=True)]
    own = statistics.median(a / b for a, b in zip(dense_own, sparse_own, strict=True))
    return {
        "ms": statistics.median(sparse),
        "speed_up": statistics.median(ratios),
        "speed_ups": [min(ratios), max(ratios)],
        "mac_reduction": reduction,
        "share": statistics.median(ratios) / reduction,
        "computing_ms": statistics.median(sparse_own),
        "computing_share": own / reduction,
    }
