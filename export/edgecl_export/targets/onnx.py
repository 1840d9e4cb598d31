"""Stock ONNX Runtime: one graph a step, frozen tensors once in a file beside them."""

from collections.abc import Mapping, Set
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from edgecl.graph.lowering import BuiltStep
from edgecl_device.engines.onnx import STATE_IN, STATE_OUT, OnnxEngine
from edgecl_device.manifest import Array, Manifest
from edgecl_export.onnx import Emitter, WeightFile
from edgecl_export.targets import Files

WEIGHT_FILE = "weights.bin"


class OnnxTarget:
    """See :class:`edgecl_export.targets.Target`."""

    packages = ("onnx-ir", "onnxruntime")

    def write(self, steps: Mapping[str, BuiltStep], folder: Path) -> Files:
        """``<step>.onnx`` for each step, and ``weights.bin``."""
        weights = WeightFile(folder / WEIGHT_FILE)
        files = {}
        for name, step in steps.items():
            files[name] = f"{name}.onnx"
            model = Emitter(step.graph, weights).emit()
            (folder / files[name]).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        weights.close()
        return Files(files, weights.path.stat().st_size)

    def read(self, folder: Path, manifest: Manifest) -> "OnnxFiles":
        """Read them back."""
        return OnnxFiles(folder, manifest)


class OnnxFiles:
    """See :class:`edgecl_export.targets.Written`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.models = {name: ir.load(folder / step.file) for name, step in manifest.steps.items()}
        self._held: dict[str, set[bytes]] = {}
        self._kernels: dict[str, list[tuple[int, int]]] = {}
        for definition in onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def():
            if definition.provider == "CPUExecutionProvider" and definition.domain == "":
                self._kernels.setdefault(definition.op_name, []).append(tuple(definition.version_range))

    def operators(self, step: str) -> Set[str]:
        """Operator types of a graph."""
        return {node.op_type for node in self.models[step].graph}

    def lacking(self, step: str) -> str | None:
        """An operator without a kernel at the opset that the graph declares."""
        opset = self.models[step].opset_imports[""]
        for kind in sorted(self.operators(step)):
            if not any(low <= opset <= high for low, high in self._kernels.get(kind, [])):
                return f"{kind}, opset {opset}, which ONNX Runtime"
        return None

    def misfit(self, step: str) -> str | None:
        """State that is no input or no output of the graph; the engine checks the other ports when it loads."""
        spec, graph = self.manifest.steps[step], self.models[step].graph
        wanted_in, wanted_out = {STATE_IN + s for s in spec.state_in}, {STATE_OUT + s for s in spec.state_out}
        lost = sorted(wanted_in - {v.name for v in graph.inputs} | wanted_out - {v.name for v in graph.outputs})
        return f"{lost} must be inputs and outputs of the graph" if lost else None

    def holds(self, step: str, constant: Array) -> bool:
        """Whether an initializer has these bytes."""
        if step not in self._held:  # each is read once; all steps together may hold more than fits into memory
            found = (value.const_value for value in self.models[step].graph.initializers.values())
            self._held[step] = {sha256(tensor.tobytes()).digest() for tensor in found if tensor is not None}
        return sha256(constant.tobytes()).digest() in self._held[step]

    def engine(self) -> OnnxEngine:
        """A new engine on the files."""
        return OnnxEngine(self.folder, self.manifest)
