"""The ONNX Runtime engine: one session a step, all tensors pre-allocated, state swapped between two buffers.

A graph names its state inputs ``state.NAME`` and its new state ``next.NAME`` (an input and an output of one graph may not
share a name); the other inputs and outputs carry the names of the manifest. A graph may declare a state tensor in another shape with as
many values, and gets the same bytes so. Input and output never share a buffer: whether a reader would see the old or the new value then
depends on the runtime's own node order.
"""

from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgecl_device.checks import check_whole, entry, thread_count
from edgecl_device.errors import BundleError, EdgeclError, InputError
from edgecl_device.manifest import Array, Manifest, StepSpec, TensorSpec

STATE_IN = "state."
STATE_OUT = "next."
_TYPES = {"float32": "tensor(float)", "float64": "tensor(double)"}  # the others are called as numpy calls them


MEMORY: dict[str, dict[str, Any]] = {
    "fastest": {},
    "balanced": {"enable_mem_pattern": False},
    "smallest": {"enable_mem_pattern": False, "enable_cpu_mem_arena": False, "session.disable_prepacking": "1"},
}
"""Options of a session by the setting ``memory``; those with a dot are configuration entries."""

EQUAL_OPERATORS_STAY = ("optimization.disable_specified_optimizers", "CommonSubexpressionElimination")
"""A setting of sessions: equal operators are there on purpose, one computes again what would have to be kept."""

EXACT_INTEGERS = ("session.x64quantprecision", "1")
"""A setting of sessions: x86 processors without VNNI otherwise add products of 8 bits in 16, which overflow. It costs nothing elsewhere."""


class OnnxEngine:
    """Runs a bundle's steps on stock ONNX Runtime, on the CPU.

    Only tensors that some step writes get a second buffer. Which buffer is current is one bit a tensor; every pattern of
    bits that a step meets gets its own prepared binding, so that a run copies inputs and outputs and nothing else.

    Args:
        bundle: The bundle's folder.
        manifest: Its manifest.
        threads: Threads inside one operator, 1 to 64.
        memory: A key of :data:`MEMORY`.

    Raises:
        InputError: when ``threads`` is no such number, or ``memory`` no such setting.
        BundleError: when a graph cannot be loaded or does not have the manifest's inputs and outputs, or its tensors do not fit
            into memory.
    """

    name = "onnx"

    def __init__(self, bundle: Path, manifest: Manifest, threads: int = 1, memory: str = "fastest") -> None:
        threads = thread_count(threads)
        settings = entry("memory", memory, MEMORY)
        self._ort = _onnxruntime()
        self._specs = {spec.name: spec for spec in manifest.state}
        written = {name for step in manifest.steps.values() for name in step.state_out}
        self._bits = {name: 1 << i for i, name in enumerate(self._specs)}
        self._current = 0
        self._written = 0
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # not errors: they are raised
        options.add_session_config_entry(*EQUAL_OPERATORS_STAY)
        options.add_session_config_entry(*EXACT_INTEGERS)
        for name, value in settings.items():
            if "." in name:
                options.add_session_config_entry(name, value)
            else:
                setattr(options, name, value)
        self._steps = {name: _Step(self, Path(bundle) / step.file, step, options) for name, step in manifest.steps.items()}
        # After the graphs were matched with the manifest: its sizes are then no mere claim.
        self._values = {s.name: [self._allocate(s) for _ in range(1 + (s.name in written))] for s in manifest.state}
        self._views = {name: [value.numpy() for value in values] for name, values in self._values.items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Copy every state tensor in; drops an uncommitted result.

        Raises:
            InputError: when a tensor is missing or does not fit; the state is unchanged then.
        """
        check_whole(self._specs, state)
        for name, views in self._views.items():
            views[self._index(name)][...] = state[name]
        self._written = 0

    def state(self, names: Collection[str] | None = None) -> dict[str, Array]:
        """Copies of every state tensor, or of those named."""
        return {name: self._views[name][self._index(name)].copy() for name in (self._views if names is None else names)}

    def put(self, state: Mapping[str, Array]) -> None:
        """Copy some state tensors in, which fit."""
        for name, value in state.items():
            self._views[name][self._index(name)][...] = value

    def run(self, step: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one step and return copies of its outputs (new state not included).

        Raises:
            InputError: when an input has another shape or dtype.
        """
        runner = self._steps[step]
        for name, view in runner.inputs.items():
            value = inputs[name]
            if value.shape != view.shape or value.dtype != view.dtype:
                raise InputError(
                    f"{name}: step {step!r} takes {view.dtype} {list(view.shape)}, got {value.dtype} {list(value.shape)}; convert it"
                )
            view[...] = value
        runner.run(self._current)
        self._written = runner.writes
        return {name: view.copy() for name, view in runner.outputs.items()}

    def commit(self) -> None:
        """Make what the last ``run`` wrote the state."""
        self._current ^= self._written
        self._written = 0

    def close(self) -> None:
        """Release the runtime's memory."""
        self._steps.clear()
        self._views.clear()
        self._values.clear()

    def _value(self, name: str, index: int, shape: Sequence[int]) -> Any:
        """One buffer of a state tensor, in the shape that a graph declares."""
        view = self._views[name][index]
        return self._values[name][index] if view.shape == tuple(shape) else self._ort.OrtValue.ortvalue_from_numpy(view.reshape(shape))

    def _index(self, name: str) -> int:
        return int(self._current & self._bits[name] != 0)

    def _allocate(self, spec: TensorSpec) -> Any:
        try:
            return self._ort.OrtValue.ortvalue_from_shape_and_type(list(spec.shape), np.dtype(spec.dtype).type)
        except (MemoryError, RuntimeError) as error:
            raise BundleError(f"{spec.name}: this machine has no memory for its {spec.nbytes} bytes; use a smaller model") from error


class _Step:
    """One session with its pre-allocated tensors and its bindings by current buffers."""

    def __init__(self, engine: OnnxEngine, path: Path, spec: StepSpec, options: Any) -> None:
        try:
            self._session = engine._ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors share no base class of their own
            raise BundleError(f"{path}: ONNX Runtime cannot load it ({error}); copy the bundle again or update onnxruntime") from error
        inputs = [*((STATE_IN, engine._specs[name]) for name in spec.state_in), *(("", s) for s in spec.inputs)]
        outputs = [*((STATE_OUT, engine._specs[name]) for name in spec.state_out), *(("", s) for s in spec.outputs)]
        _match(path, "input", inputs, self._session.get_inputs())
        _match(path, "output", outputs, self._session.get_outputs())
        self._shapes = {node.name: node.shape for node in [*self._session.get_inputs(), *self._session.get_outputs()]}
        self._engine = engine
        self._spec = spec
        self._in = {s.name: engine._allocate(s) for s in spec.inputs}
        self._out = {s.name: engine._allocate(s) for s in spec.outputs}
        # The views stay valid as long as the values above live.
        self.inputs: dict[str, Array] = {name: value.numpy() for name, value in self._in.items()}
        self.outputs: dict[str, Array] = {name: value.numpy() for name, value in self._out.items()}
        self.writes = sum(engine._bits[name] for name in spec.state_out)
        self._mask = sum(engine._bits[name] for name in {*spec.state_in, *spec.state_out})
        self._bindings: dict[int, Any] = {}

    def run(self, current: int) -> None:
        key = current & self._mask
        if key not in self._bindings:
            self._bindings[key] = self._bind()
        self._session.run_with_iobinding(self._bindings[key])

    def _bind(self) -> Any:
        binding = self._session.io_binding()
        for name, value in self._in.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self._out.items():
            binding.bind_ortvalue_output(name, value)
        for name in self._spec.state_in:
            binding.bind_ortvalue_input(STATE_IN + name, self._state(STATE_IN + name, name, self._engine._index(name)))
        for name in self._spec.state_out:
            binding.bind_ortvalue_output(STATE_OUT + name, self._state(STATE_OUT + name, name, 1 - self._engine._index(name)))
        return binding

    def _state(self, port: str, name: str, index: int) -> Any:
        return self._engine._value(name, index, self._shapes[port])


def _match(path: Path, what: str, expected: Sequence[tuple[str, TensorSpec]], found: Sequence[Any]) -> None:
    wanted = {prefix + spec.name: (list(spec.shape), _TYPES.get(spec.dtype, f"tensor({spec.dtype})")) for prefix, spec in expected}
    got = {node.name: (node.shape, node.type) for node in found}
    states = {prefix + spec.name for prefix, spec in expected if prefix}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name) and not (name in states and name in got and _same_values(wanted[name], got[name])):
            raise BundleError(
                f"{path}: {what} {name!r} must be {wanted.get(name, 'absent')} as the manifest says, "
                f"got {got.get(name, 'none')}; export the bundle again"
            )


def _same_values(wanted: tuple[Any, str], got: tuple[Any, str]) -> bool:
    """Whether both are of one type and have equally many values; a graph may declare a dimension without a size."""
    return wanted[1] == got[1] and all(isinstance(n, int) for n in got[0]) and prod(wanted[0]) == prod(got[0])


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EdgeclError("onnxruntime is not installed; install it with: pip install 'edgecl[device]'") from error
    return onnxruntime
