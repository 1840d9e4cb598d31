"""A small model, its data and its bundles, shared by the host's tests through the fixture ``toy``."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl import METHODS, EagerEngine, Prepared, prepare
from edgecl.figures import machine
from edgecl_device import Learner
from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.manifest import Array, read_manifest
from edgecl_export import Exported, ExportError, export
from edgecl_export.verify import Gate

CLASSES = 5
CONFIG: dict[str, dict[str, Any]] = {
    "latent_replay": {"rows_per_step": 4, "capacity_bytes": 4096},
    "joint": {"epochs": 3},
    "tent": {"rows_per_step": 6, "every": 4, "lr": 0.01},
    "cotta": {"rows_per_step": 6, "every": 4, "views": 2, "lr": 0.05, "optimizer": "sgd"},
    "affine_warmup": {"rows_per_step": 6, "every": 4, "lr": 0.01, "batch": 12},
    "ecotta": {"rows_per_step": 6, "every": 4, "batch": 12, "margin": 2.0, "optimizer": "adam", "lr": 1e-3},
    "eata": {"rows_per_step": 6, "every": 4, "lr": 0.01, "margin": 1.0, "redundancy": 1.1},  # the toy is sure of nothing
    "sparcl": {
        "rows_per_step": 4,
        "capacity_bytes": 4096,
        "sparsity": 0.5,
        "gradient_sparsity": 0.6,
        "refresh_every": 20,
        "policy": "largest-class",
        "loss": "er",
        "grow_for": 20,
        "grow": 0.1,
        "exchange": 0.1,
    },
}
"""Where the toy differs from a method's defaults: a memory that is full after some 30 samples."""


class Net(nn.Module):
    """8x8 grey images: a stem, a depthwise block, a linear head. Batch norm has statistics of its own."""

    def __init__(self, classes: int = CLASSES, seed: int = 0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.mid = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 8, 1))
        self.fc = nn.Linear(8, classes)
        settle(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(F.adaptive_avg_pool2d(self.mid(self.stem(x)), 1).flatten(1))
        return scores


def settle(model: nn.Module, seed: int = 0) -> None:
    """Weights and batch norm statistics from one generator."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2)):
                nn.init.uniform_(tensor, low, high, generator=generator)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    model.eval()


def samples(count: int, seed: int = 0, classes: int = CLASSES) -> tuple[Array, Array]:
    """Noisy copies of one pattern a class, classes in turn: float32 [N, 1, 8, 8] and int64 [N]."""
    patterns = np.random.default_rng(99).standard_normal((classes, 1, 8, 8))
    y = np.arange(count) % classes
    return (patterns[y] + 0.5 * np.random.default_rng(seed).standard_normal((count, 1, 8, 8))).astype(np.float32), y


def arrays(state: dict[str, Tensor]) -> dict[str, Array]:
    """A state as NumPy arrays of their own."""
    return {name: tensor.detach().numpy().copy() for name, tensor in state.items()}


def same(left: dict[str, Array], right: dict[str, Array]) -> bool:
    """Whether two mappings hold the same arrays, to the bit."""
    alike = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in left.items()}
    return alike == {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in right.items()}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def sources() -> str:
    """SHA-256 of everything that makes a bundle what it is: the project's code, this file, the machine, all packages."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for folder in ("edgecl", "export", "device") for path in (root / folder).rglob("*.py"))
    packages = sorted(f"{package.metadata['Name']} {package.version}" for package in distributions())
    found = hashlib.sha256(" ".join([machine(), *packages]).encode())
    for path in (*files, Path(__file__)):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()


class Toy:
    """Prepared learners and bundles of :class:`Net` or of another model.

    A bundle is exported, and its gates run, once for the same code: it is kept from run to run, and the workers of a run share it.

    Args:
        folder: Where bundles are kept, by the hash of the sources; those of other sources are deleted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / sources()
        for other in folder.iterdir():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self._bundles: dict[str, tuple[Exported, Prepared]] = {}

    def config(self, method: str, **changes: Any) -> Any:
        """The toy's hyperparameters of a method."""
        return METHODS[method].Config(**{**CONFIG.get(method, {}), **changes})

    def prepared(self, method: str, fit: bool = True, **changes: Any) -> Prepared:
        """A learner on :class:`Net`, fitted on classes 0 and 1."""
        x, y = samples(60)
        ready = prepare(Net(), at="stem", example=x[:1], method=method, classes=CLASSES, config=self.config(method, **changes))
        return ready.fit(x[y < 2], y[y < 2]) if fit else ready

    def bundle(self, method: str, engine: str = "onnx", **changes: Any) -> tuple[Exported, Prepared]:
        """Its bundle, which no test may change, and the learner that it was made from."""
        key = json.dumps([method, engine, dataclasses.asdict(self.config(method, **changes))], sort_keys=True)
        if key not in self._bundles:
            ready = self.prepared(method, **changes)
            self._bundles[key] = self._exported(ready, self.folder / hashlib.sha256(key.encode()).hexdigest()[:16], engine), ready
        return self._bundles[key]

    def _exported(self, ready: Prepared, folder: Path, engine: str) -> Exported:
        """Export to a folder, unless an earlier run or another worker has; a folder is there whole or not at all."""
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as new:
                exported = export(ready, Path(new, "whole", "bundle"), engine=engine)
                Path(new, "whole", "gates.json").write_text(json.dumps([dataclasses.asdict(gate) for gate in exported.gates]))
                try:
                    Path(new, "whole").rename(folder)
                except OSError:
                    if not folder.exists():  # else another worker was faster
                        raise
        gates = [Gate(**gate) for gate in json.loads((folder / "gates.json").read_text())]
        return Exported(folder / "bundle", read_manifest(folder / "bundle"), tuple(gates))

    def refused(self, folder: Path, learner: str | Prepared, match: str, error: type[Exception] = ExportError, **changes: Any) -> None:
        """The export of a method, or of a learner, fails with this error and leaves nothing behind, not even a missing parent."""
        ready = self.prepared(learner, **changes) if isinstance(learner, str) else learner
        before = {name: tensor.clone() for name, tensor in ready.state.items()}
        with pytest.raises(error, match=match):
            export(ready, folder / "new" / "bundle")
        assert list(folder.iterdir()) == []
        assert all(torch.equal(tensor, before[name]) for name, tensor in ready.state.items())

    def device(self, method: str, engine: str, store: Path | None = None, **changes: Any) -> Learner:
        """The device's learner on an engine, as the bundle starts it."""
        exported, ready = self.bundle(method, "onnx" if engine == "eager" else engine, **changes)
        if engine != "eager":
            return Learner.load(exported.path, store)
        assert store is None
        return Learner(exported.manifest, EagerEngine(ready.trunk, ready.learner), arrays(ready.state), rows_of(ready))

    def onnx(self, method: str, **changes: Any) -> OnnxEngine:
        """The bare engine, with the bundle's initial state."""
        exported, ready = self.bundle(method, **changes)
        engine = OnnxEngine(exported.path, exported.manifest)
        engine.load(arrays(ready.state))
        return engine


def rows_of(ready: Prepared) -> dict[str, Array] | None:
    """Replay rows of a prepared learner, or None without a memory."""
    return None if ready.memory is None else ready.memory.rows_by_name()


class Spoiled:
    """An engine whose new state is spoiled before it is handed over."""

    def __init__(self, inner, spoil):
        self.inner, self.spoil = inner, spoil

    def load(self, state):
        self.before = dict(state)
        self.inner.load(state)

    def run(self, step, inputs):
        return self.inner.run(step, inputs)

    def commit(self):
        self.inner.commit()

    def state(self):
        return {name: self.spoil(name, self.before[name], value) for name, value in self.inner.state().items()}


def scaled(target, factor):
    """The change of the tensors whose name begins with ``target``, times ``factor``."""

    def spoil(name, old, new):
        wide = old.astype(np.float64)
        return (wide + factor * (new - wide)).astype(new.dtype) if name.startswith(target) else new

    return spoil
