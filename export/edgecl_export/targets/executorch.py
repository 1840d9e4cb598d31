"""Stock ExecuTorch: one program with every step as a method; what is static runs in XNNPACK, what learns outside of it or as operands.

State goes in and comes out as tensors. So no delegate can take a trained tensor for a constant, no buffer loses its initial
value, and nothing is shared between methods but constants.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from edgecl.graph.lowering import BuiltStep
from edgecl.graph.passes.integers import stored
from edgecl.graph.step import GraphError
from edgecl.quiet import quiet
from edgecl_device.engines.executorch import ExecutorchEngine, registered
from edgecl_device.errors import EdgeclError
from edgecl_device.manifest import Array, Manifest
from edgecl_export.targets import Files
from edgecl_export.targets.exported import exported

PROGRAM_FILE = "steps.pte"


class ExecutorchTarget:
    """See :class:`edgecl_export.targets.Target`."""

    packages = ("executorch",)

    def __init__(self) -> None:
        with quiet():
            try:
                import executorch.exir  # noqa: F401  # a clear error before any work
            except ImportError as error:
                raise EdgeclError("executorch is not installed; install it with: pip install 'edgecl[host,executorch]'") from error

    def write(self, steps: Mapping[str, BuiltStep], folder: Path) -> Files:
        """One ``steps.pte``."""
        program = program_of(steps)
        (folder / PROGRAM_FILE).write_bytes(program.buffer)
        frozen = {tensor.contiguous().numpy().tobytes() for step in steps.values() for tensor in stored(step.graph).values()}
        plans = program.executorch_program.execution_plan
        return Files(
            dict.fromkeys(steps, PROGRAM_FILE), sum(map(len, frozen)), planned_bytes=sum(sum(plan.non_const_buffer_sizes) for plan in plans)
        )

    def read(self, folder: Path, manifest: Manifest) -> "ExecutorchFiles":
        """Read it back."""
        return ExecutorchFiles(folder, manifest)


def program_of(steps: Mapping[str, BuiltStep], *, delegate: bool = True, planning: Any = None) -> Any:
    """ExecuTorch's program of some steps.

    Args:
        steps: Steps by name, lowered for ``executorch``.
        delegate: Whether XNNPACK runs what it can; else the portable kernels run everything.
        planning: The pass that plans memory; by default :func:`edgecl_export.targets.planning.planner`.

    Raises:
        GraphError: when ExecuTorch refuses them.
    """
    with quiet():
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

        from edgecl_export.targets.planning import planner

        if not delegate:  # the portable forms of what XNNPACK does with int8
            import executorch.kernels.quantized  # noqa: F401

        programs = {name: exported(step.graph) for name, step in steps.items()}
        try:
            edge = to_edge_transform_and_lower(
                programs,
                transform_passes=[_drop_copies()],
                partitioner=[_partitioner()] if delegate else None,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning or planner()))
        except Exception as error:  # its errors share no base class
            raise GraphError(f"engine: ExecuTorch cannot lower these steps ({error}); export for onnx, or report the model") from error


class ExecutorchFiles:
    """See :class:`edgecl_export.targets.Written`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        with quiet():
            from executorch.exir._serialize._program import deserialize_pte_binary

            self.folder = folder
            self.manifest = manifest
            self.content = (folder / PROGRAM_FILE).read_bytes()
            file: Any = deserialize_pte_binary(self.content)
        self.program: Any = file.program
        self._plans = {plan.name: plan for plan in self.program.execution_plan}
        self._sizes: dict[bytes, int] = {}
        named = file.named_data.buffers if file.named_data is not None else []
        for tensor in (*(buffer.storage for buffer in self.program.constant_buffer), *named):  # some are padded with zeros
            bare = tensor.rstrip(b"\0")
            self._sizes[bare] = max(len(tensor), self._sizes.get(bare, 0))

    def operators(self, step: str) -> Set[str]:
        """Kernels that a method calls, ``aten::addmm.out`` for instance, and its delegates."""
        plan = self._plans[step]
        return {f"{o.name}.{o.overload}" if o.overload else o.name for o in plan.operators} | {d.id for d in plan.delegates}

    def lacking(self, step: str) -> str | None:
        """A kernel or delegate that the runtime does not have."""
        missing = sorted(self.operators(step) - registered())
        return f"{', '.join(missing)}, which ExecuTorch" if missing else None

    def misfit(self, step: str) -> str | None:
        """None: inputs and outputs have no names in a program; the engine compares number, shapes and types when it loads."""
        return None

    def holds(self, step: str, constant: Array) -> bool:
        """Whether the program holds these bytes, in one of the layouts of a kernel or matrix."""
        layouts = [constant]
        if constant.ndim > 2:
            last = tuple(range(2, constant.ndim))
            layouts += [constant.transpose(0, *last, 1), constant.transpose(1, *last, 0)]
        elif constant.ndim == 2:
            layouts.append(constant.T)
        contents = [np.ascontiguousarray(layout).tobytes() for layout in layouts]
        if any(self._sizes.get(content.rstrip(b"\0"), -1) >= len(content) for content in contents):
            return True
        return any(content in self.content for content in contents)  # a small one may be written into a delegate's own data

    def engine(self) -> ExecutorchEngine:
        """A new engine on the file."""
        return ExecutorchEngine(self.folder, self.manifest)


def _partitioner() -> Any:
    """The module is read late: it needs the package."""
    from edgecl_export.targets.xnnpack import Partitioner

    return Partitioner()


def _drop_copies() -> Any:
    """Read late as well."""
    from edgecl_export.targets.xnnpack import DropCopies

    return DropCopies()
