"""Targets: how the steps of a bundle are written for a runtime, and read back from the files for the gates."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgecl.graph.lowering import BuiltStep
from edgecl_device.checks import entry
from edgecl_device.engines import Engine
from edgecl_device.manifest import Array, Manifest


@dataclass(frozen=True)
class Files:
    """What a target wrote.

    Attributes:
        steps: File of each step.
        weight_bytes: Bytes of frozen tensors in them, each once.
        planned_bytes: What the runtime reserves for tensors when it loads all steps, where the files say so.
    """

    steps: dict[str, str]
    weight_bytes: int
    planned_bytes: int | None = None


class Written(Protocol):
    """The graphs of a bundle, read back from its files."""

    def operators(self, step: str) -> Set[str]:
        """Names of the operators that a step runs."""

    def lacking(self, step: str) -> str | None:
        """What of a step the runtime has no kernel for, or None."""

    def misfit(self, step: str) -> str | None:
        """An input or output that is not the manifest's, or None."""

    def holds(self, step: str, constant: Array) -> bool:
        """Whether the file holds a frozen tensor of a step, to the bit."""

    def engine(self) -> Engine:
        """A new engine on the files."""


class Target(Protocol):
    """A runtime that bundles can be written for."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions the manifest tells."""

    def write(self, steps: Mapping[str, BuiltStep], folder: Path) -> Files:
        """Write the graphs of all steps into a folder.

        Raises:
            GraphError: for an operator that the runtime cannot have, with its place in the model.
        """

    def read(self, folder: Path, manifest: Manifest) -> Written:
        """Read them back."""


def _onnx() -> Target:
    from edgecl_export.targets.onnx import OnnxTarget

    return OnnxTarget()


def _executorch() -> Target:
    from edgecl_export.targets.executorch import ExecutorchTarget

    return ExecutorchTarget()


TARGETS: dict[str, Callable[[], Target]] = {"onnx": _onnx, "executorch": _executorch}
"""Every target by the name of its engine; a runtime is imported when it is asked for."""


def target_of(engine: str) -> Target:
    """The target of an engine.

    Raises:
        InputError: when there is none of that name.
    """
    return entry("engine", engine, TARGETS)()
