"""The ExecuTorch engine: one program, every step a method, state in and state out as tensors.

ExecuTorch's binding for Python takes and gives PyTorch tensors, so this engine alone needs PyTorch; it is imported when the engine
is made. A C++ program needs neither. A program's inputs and outputs have no names: they come in the manifest's order, which is state
then data for inputs, data then state for outputs.
"""

import functools
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_device.checks import check_whole, short, thread_count
from edgecl_device.errors import BundleError, EdgeclError, InputError
from edgecl_device.manifest import Array, Manifest, StepSpec, TensorSpec


class ExecutorchEngine:
    """Runs a bundle's steps on stock ExecuTorch, on the CPU.

    The runtime gives new tensors for all outputs, so that new state lies beside the old until :meth:`commit`.

    Args:
        bundle: The bundle's folder.
        manifest: Its manifest.
        threads: Threads of the runtime, 1 to 64; one number for the whole process, as ExecuTorch has one pool.
        memory: ``fastest`` alone, as memory is planned at export.

    Raises:
        InputError: when ``threads`` is no such number, or ``memory`` another setting.
        BundleError: when the program cannot be loaded or does not have the manifest's inputs and outputs.
    """

    name = "executorch"

    def __init__(self, bundle: Path, manifest: Manifest, threads: int = 1, memory: str = "fastest") -> None:
        threads = thread_count(threads)
        if memory != "fastest":
            raise InputError(f"memory: must be fastest on ExecuTorch, which plans memory at export, got {short(memory)}; leave it out")
        self._torch, runtime, library = _executorch()
        if library._threadpool_get_thread_count() != threads:
            with _without_notes():
                library._unsafe_reset_threadpool(threads)
        self._specs = {spec.name: spec for spec in manifest.state}
        self._state: dict[str, Array] = {spec.name: spec.zeros() for spec in manifest.state}
        self._new: dict[str, Array] = {}
        self._programs: dict[Path, Any] = {}  # kept: a method does not keep the program whose memory it uses
        self._steps: dict[str, _Step] = {}
        for name, step in manifest.steps.items():
            path = Path(bundle) / step.file
            try:
                if path not in self._programs:
                    self._programs[path] = runtime.load_program(path.read_bytes())
                method = self._programs[path].load_method(name)
            except Exception as error:  # the runtime's errors share no base class of their own
                raise BundleError(
                    f"{path}: ExecuTorch cannot load step {name!r} ({error}); copy the bundle again or update executorch"
                ) from error
            self._steps[name] = _Step(path, name, step, self._specs, method)

    def load(self, state: Mapping[str, Array]) -> None:
        """Copy every state tensor in; drops an uncommitted result.

        Raises:
            InputError: when a tensor is missing or does not fit; the state is unchanged then.
        """
        check_whole(self._specs, state)
        self._state = {name: np.array(state[name], order="C") for name in self._specs}
        self._new = {}

    def state(self, names: Collection[str] | None = None) -> dict[str, Array]:
        """Copies of every state tensor, or of those named."""
        return {name: self._state[name].copy() for name in (self._state if names is None else names)}

    def put(self, state: Mapping[str, Array]) -> None:
        """Copy some state tensors in, which fit."""
        self._state.update({name: np.array(value, order="C") for name, value in state.items()})

    def run(self, step: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one step and return its outputs (new state not included).

        Raises:
            InputError: when an input has another shape or dtype.
        """
        runner = self._steps[step]
        values = [self._state[name] for name in runner.spec.state_in]
        for spec in runner.spec.inputs:
            value = inputs[spec.name]
            if value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
                raise InputError(
                    f"{spec.name}: step {step!r} takes {spec.dtype} {list(spec.shape)}, got {value.dtype} {list(value.shape)}; convert it"
                )
            values.append(value)
        self._new = {}
        # An array in a tensor shares memory, and PyTorch warns of one that cannot be written.
        found = runner.method.execute([self._torch.from_numpy(np.require(v, requirements=["C", "W"])) for v in values])
        outputs = [tensor.numpy() for tensor in found]
        count = len(runner.spec.outputs)
        self._new = dict(zip(runner.spec.state_out, outputs[count:], strict=True))
        return {spec.name: value for spec, value in zip(runner.spec.outputs, outputs[:count], strict=True)}

    def commit(self) -> None:
        """Make what the last ``run`` wrote the state."""
        self._state.update(self._new)
        self._new = {}

    def close(self) -> None:
        """Release the runtime's memory."""
        self._steps.clear()
        self._programs.clear()
        self._state.clear()
        self._new.clear()


class _Step:
    """A method, after its inputs and outputs were compared with the manifest's."""

    def __init__(self, path: Path, name: str, spec: StepSpec, state: Mapping[str, TensorSpec], method: Any) -> None:
        self.spec = spec
        self.method = method
        meta = method.metadata
        ports = {
            "input": ([*(state[n] for n in spec.state_in), *spec.inputs], meta.num_inputs(), meta.input_tensor_meta),
            "output": ([*spec.outputs, *(state[n] for n in spec.state_out)], meta.num_outputs(), meta.output_tensor_meta),
        }
        for what, (expected, count, tensor) in ports.items():
            wanted = [(s.shape, _CODES[s.dtype]) for s in expected]
            found = [(tuple(tensor(i).sizes()), tensor(i).dtype()) for i in range(count)]
            for i in range(max(len(wanted), len(found))):
                if wanted[i : i + 1] != found[i : i + 1]:
                    named = f"{what} {i}" + (f" ({expected[i].name})" if i < len(expected) else "")
                    raise BundleError(
                        f"{path}: step {name!r}: {named} must be {wanted[i : i + 1] or 'absent'} as the manifest says, "
                        f"got {found[i : i + 1] or 'none'}; export the bundle again"
                    )


_CODES = {"uint8": 0, "int16": 2, "int32": 3, "int64": 4, "float32": 6, "float64": 7, "bool": 11}
"""ExecuTorch's numbers of the types, as PyTorch has them: https://docs.pytorch.org/executorch (ScalarType)."""


def registered() -> frozenset[str]:
    """Names of all kernels and delegates of the installed runtime."""
    _, runtime, _ = _executorch()
    return frozenset(runtime.operator_registry.operator_names) | frozenset(runtime.backend_registry.registered_backend_names)


@functools.cache
def _executorch() -> tuple[Any, Any, Any]:
    """PyTorch, ExecuTorch's runtime and its library."""
    try:
        with _without_notes():
            import torch  # noqa: TID251  # the binding's own tensors
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            portable_lib._threadpool_get_thread_count()  # makes the pool
    except ImportError as error:
        raise EdgeclError("executorch is not installed; install it with: pip install 'edgecl[executorch]'") from error
    return torch, Runtime.get(), portable_lib


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep ExecuTorch's notes on itself, the processor and its threads, most of them written past Python, off the user's screen."""
    try:
        screen = os.dup(2)
    except OSError:  # there is none: 2>&-
        screen = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if screen is not None:
                with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
                    os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        if screen is not None:
            os.dup2(screen, 2)
            os.close(screen)
