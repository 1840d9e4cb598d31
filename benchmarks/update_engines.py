"""Engines of ``step_latency.py``: each makes the same update of the same weights."""

import copy
import json
import subprocess
import sys
import tempfile
import venv
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from update_cases import CLASSES, CUTS, LR, ROWS, Case, Loss, loss_inputs, trained_of

from edgecl import METHODS, prepare
from edgecl.prepare import Prepared
from edgecl_device.manifest import Manifest
from edgecl_export import Exported, export
from edgecl_export.targets import target_of

TRAINING_VERSION = "1.19.2"
"""Of ``onnxruntime-training``: the last release."""


class Engine(Protocol):
    """Something that makes updates."""

    name: str

    def update(self, label: int) -> float:
        """One update with this class as the sample's; returns its seconds."""

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name."""

    def close(self) -> None:
        """Let go of everything."""


class Eager:
    """PyTorch: autograd and ``torch.optim.SGD``; with ``compiled`` the forward pass and its gradient by ``torch.compile``."""

    def __init__(self, of: Case, compiled: bool = False) -> None:
        self.name = "torch.compile" if compiled else "eager PyTorch"
        self.module = Loss(of)
        self.inputs = [tensor.clone() for tensor in loss_inputs(of)]
        self.trained = trained_of(self.module)
        self.optimiser = torch.optim.SGD(list(self.trained.values()), LR)
        torch.compiler.reset()  # after eight modules of one class it would silently run the next ones eagerly
        self.loss: Callable[..., Tensor] = torch.compile(self.module, fullgraph=True) if compiled else self.module

    def update(self, label: int) -> float:
        """See :class:`Engine`."""
        relabel(self.inputs, label)
        start = perf_counter()
        self.optimiser.zero_grad()
        self.loss(*self.inputs).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return perf_counter() - start

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return {name: p.detach().clone() for name, p in self.trained.items()}

    def close(self) -> None:
        """See :class:`Engine`."""


def prepared_of(of: Case) -> Prepared:
    """The learner that makes an update."""
    method = "finetune" if of.rows is None else "latent_replay"
    settings: dict[str, Any] = {"lr": LR, "trainable": of.trained}
    if of.rows is not None:
        settings |= {"rows_per_step": ROWS, "codec": "float32", "capacity_bytes": 1 << 24}
    config = METHODS[method].Config(**settings)
    return prepare(of.model, at=of.cut, example=of.x.numpy(), method=method, classes=CLASSES, config=config)


def bundle_of(prepared: Prepared, path: Path, engine: str) -> Exported:
    """Its bundle; no budget is in the way of a whole network's second buffers."""
    return export(prepared, path, engine=engine, ram_budget_bytes=1 << 30)


class Step:
    """A bundle of edgecl: ``encode`` and ``learn`` of the device's engine, without store and log."""

    def __init__(self, of: Case, engine: str) -> None:
        self.name = {"onnx": "edgecl, ONNX Runtime", "executorch": "edgecl, ExecuTorch"}[engine]
        self.prepared = prepared_of(of)
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        start = perf_counter()
        exported = bundle_of(self.prepared, folder / "bundle", engine)
        self.export_seconds = perf_counter() - start
        self.path = exported.path
        self.manifest: Manifest = exported.manifest
        self.engine = target_of(engine).read(exported.path, exported.manifest).engine()
        self.stack.callback(self.engine.close)
        state = {name: tensor.numpy().copy() for name, tensor in self.prepared.state.items()}
        self.engine.load({**state, "count": np.ones(CLASSES, np.float32)})  # no class is masked
        self.x = {"x": of.x.numpy()}
        given: dict[str, Any] = {"weight": np.ones(1, np.float32), "lr": np.array(LR, np.float32)}
        if of.rows is not None:
            latents, labels = (tensor.numpy() for tensor in of.rows)
            given |= {"replay.z": latents, "replay.target": labels, "replay.weight": np.ones(ROWS, np.float32)}
        names = {spec.name for spec in self.manifest.steps["learn"].inputs}
        self.given = {name: value for name, value in given.items() if name in names}

    def update(self, label: int) -> float:
        """See :class:`Engine`."""
        target = np.array([label])
        start = perf_counter()
        z = self.engine.run("encode", self.x)
        self.engine.run("learn", {"z": z["z"], "target": target, **self.given})
        self.engine.commit()
        return perf_counter() - start

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return {name.removeprefix("param."): torch.tensor(a) for name, a in self.engine.state().items() if name.startswith("param.")}

    def close(self) -> None:
        """See :class:`Engine`."""
        self.stack.close()


class Forward:
    """The forward pass of the network with every weight frozen, on stock ONNX Runtime."""

    name = "forward pass"

    def __init__(self, of: Case) -> None:
        prepared = prepare(of.model, at=CUTS[of.net]["W1"], example=of.x.numpy(), method="frozen", classes=CLASSES)
        self.stack = ExitStack()
        exported = export(prepared, Path(self.stack.enter_context(tempfile.TemporaryDirectory())) / "bundle")
        self.macs = sum(exported.manifest.steps[step].canonical_macs for step in ("encode", "predict"))
        self.engine = target_of("onnx").read(exported.path, exported.manifest).engine()
        self.stack.callback(self.engine.close)
        self.engine.load({name: tensor.numpy().copy() for name, tensor in prepared.state.items()})
        self.x = {"x": of.x.numpy()}

    def update(self, label: int) -> float:
        """Seconds of one pass; nothing learns."""
        start = perf_counter()
        self.engine.run("predict", {"z": self.engine.run("encode", self.x)["z"]})
        return perf_counter() - start

    def weights(self) -> dict[str, Tensor]:
        """None is trained."""
        return {}

    def close(self) -> None:
        """See :class:`Engine`."""
        self.stack.close()


class ExecutorchTraining:
    """ExecuTorch's training extension, as its examples have it: the joint graph, then the SGD of its Python binding."""

    name = "ExecuTorch training extension"

    def __init__(self, of: Case) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the extension says on every call that it is experimental
            from executorch.exir import to_edge
            from executorch.extension.training import _load_for_executorch_for_training_from_buffer, get_sgd_optimizer
            from torch.export.experimental import _export_forward_backward

            module = _plain_shortcuts(_plain_pooling(Loss(of)))
            self.inputs = [tensor.clone() for tensor in loss_inputs(of)]
            program = to_edge(_export_forward_backward(torch.export.export(module, tuple(self.inputs), strict=False))).to_executorch()
            self.buffer = program.buffer  # kept: the module reads its memory
            self.module = _load_for_executorch_for_training_from_buffer(self.buffer)
            self.get_sgd_optimizer = get_sgd_optimizer
            self.optimiser: Any = None

    def update(self, label: int) -> float:
        """See :class:`Engine`."""
        relabel(self.inputs, label)
        start = perf_counter()
        self.module.forward_backward("forward", self.inputs)
        if self.optimiser is None:
            self.optimiser = self.get_sgd_optimizer(self.module.named_parameters(), LR)
        self.optimiser.step(self.module.named_gradients())
        return perf_counter() - start

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return {name.removeprefix("suffix."): p.clone() for name, p in self.module.named_parameters().items()}

    def close(self) -> None:
        """See :class:`Engine`."""


class OnnxTraining:
    """ONNX Runtime's own training build, 1.19.2, in a process and an environment of its own (:func:`training_environment`)."""

    def __init__(self, of: Case, python: Path, listed: bool = True) -> None:
        self.name = "ONNX Runtime training build" + ("" if listed else ", frozen weights as constants")
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        module = _plain_norms(Loss(of))
        names = list(trained_of(module))
        inputs = loss_inputs(of)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older exporter: the one of that release, and it keeps the parameters' names
            torch.onnx.export(
                module, inputs, str(folder / "loss.onnx"), dynamo=False, opset_version=17, do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=[f"x{i}" for i in range(len(inputs))], output_names=["loss"],
            )  # fmt: skip
        np.savez(folder / "inputs.npz", *[tensor.numpy() for tensor in inputs])
        (folder / "trained.json").write_text(json.dumps([f"suffix.{name}" for name in names]))
        child = Path(__file__).with_name("ort_training.py")
        command = [python, child, folder, str(LR), "listed" if listed else "constant"]
        self.errors = self.stack.enter_context((folder / "errors.txt").open("w+"))  # it prints a line for every pass over the graph
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.folder = folder
        self._ask("ready")

    def _ask(self, request: str) -> str:
        assert self.child.stdin is not None and self.child.stdout is not None
        print(request, file=self.child.stdin, flush=True)
        answer = self.child.stdout.readline()
        if not answer:
            self.child.wait()
            self.errors.seek(0)
            raise RuntimeError(f"{self.name}: its process ended with {self.child.returncode}:\n{self.errors.read()[-2000:]}")
        return answer

    def update(self, label: int) -> float:
        """See :class:`Engine`."""
        return float(self._ask(str(label)))

    def weights(self) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        self._ask("weights")
        with np.load(self.folder / "weights.npz") as found:
            return {name.removeprefix("suffix."): torch.tensor(found[name]) for name in found}

    def close(self) -> None:
        """See :class:`Engine`."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()
        self.stack.close()


def training_environment(folder: Path) -> Path:
    """The interpreter of an environment with ``onnxruntime-training``, made when it is not there; it finds this one's packages, too."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "host.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"onnxruntime-training=={TRAINING_VERSION}"], check=True)
    return python


def relabel(inputs: list[Tensor], label: int) -> None:
    """Give the sample another class, in place."""
    inputs[-1][0] = 0.0
    inputs[-1][0, label] = 1.0


class _Affine(nn.Module):
    """Batch norm in eval mode, written out."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("inverse", (norm.running_var + norm.eps).rsqrt())
        self.register_buffer("mean", norm.running_mean * self.inverse)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        scale = self.weight * self.inverse
        shift = self.bias - self.weight * self.mean
        result: Tensor = x * scale[None, :, None, None] + shift[None, :, None, None]
        return result


def _plain_norms(module: nn.Module) -> nn.Module:
    """Norms that the training build can differentiate: it has a gradient of batch norm in training mode only."""
    return _replaced(module, nn.BatchNorm2d, _Affine)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """The mean over all positions."""
        return x.mean((2, 3), keepdim=True)


def _plain_pooling(module: nn.Module) -> nn.Module:
    return _replaced(module, nn.AdaptiveAvgPool2d, lambda _: _Mean())


def _plain_shortcuts(module: nn.Module) -> nn.Module:
    """Channels of zeros that are joined on: the gradient of padding is padding by less than nothing, which ExecuTorch refuses."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.target is F.pad:
                    node.target, node.kwargs = _more_channels, {}
            part.recompile()
    return module


def _more_channels(x: Tensor, amounts: Sequence[int]) -> Tensor:
    """``F.pad`` of the channels [N, C, H, W] alone."""
    before, after = amounts[4:]
    zeros = torch.zeros(x.shape[0], max(before, after), *x.shape[2:])
    return torch.cat([zeros[:, :before], x, zeros[:, :after]], 1)


def _replaced(module: nn.Module, kind: type[nn.Module], by: Callable[[Any], nn.Module]) -> nn.Module:
    whole = copy.deepcopy(module)
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, kind):
            parent, _, last = name.rpartition(".")
            setattr(whole.get_submodule(parent), last, by(layer))
    return whole
