"""Gates: what a bundle must prove before it may ship. They run at every export, on the target runtime itself."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from edgecl.engine import EagerEngine
from edgecl.graph.lowering import BuiltStep
from edgecl.learner import UNSEEN
from edgecl.prepare import Prepared
from edgecl.trees import flatten_tree
from edgecl_device.engines.onnx import STATE_IN, STATE_OUT, OnnxEngine
from edgecl_device.errors import EdgeclError
from edgecl_device.manifest import Array, Manifest, TensorSpec, check_files, read_manifest
from safetensors.numpy import load_file

STATES = 24
"""States of a real trajectory from which every step is compared."""

WEIGHTS, MOMENTS, CHANGE = 1e-5, 1e-4, 1e-3
"""Largest relative differences: of weights and analytic state; of optimiser moments, losses and scores; of an update."""

ROUNDING = {"float32": 2.0**-23, "float64": 2.0**-52}
"""Two roundings of a stored value: a change cannot be known better than the numbers that it lies between."""

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}


class ExportError(EdgeclError):
    """A bundle failed a gate and was not written."""


@dataclass(frozen=True)
class Gate:
    """A gate that was passed.

    Attributes:
        name: What was checked.
        found: The figures that it found.
    """

    name: str
    found: str


@dataclass(frozen=True)
class _Case:
    folder: Path
    manifest: Manifest
    prepared: Prepared
    steps: Mapping[str, BuiltStep]
    models: Mapping[str, ir.Model]


def verify(folder: Path, manifest: Manifest, prepared: Prepared, steps: Mapping[str, BuiltStep]) -> tuple[Gate, ...]:
    """Run every gate.

    Raises:
        ExportError: naming the gate, the step and the tensor.
    """
    models = {name: ir.load(folder / step.file) for name, step in manifest.steps.items()}
    case = _Case(folder, manifest, prepared, steps, models)
    return tuple(Gate(name, gate(case)) for name, gate in GATES.items())


def _refuse(gate: str, why: str, mend: str) -> ExportError:
    return ExportError(f"gate {gate!r}: {why}; {mend}")


def _kernels(case: _Case) -> str:
    """Every operator has a kernel in the runtime, at the opset that the graph declares."""
    known: dict[str, list[tuple[int, int]]] = {}
    for definition in onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def():
        if definition.provider == "CPUExecutionProvider" and definition.domain == "":
            known.setdefault(definition.op_name, []).append(tuple(definition.version_range))
    used = set()
    for name, model in case.models.items():
        opset = model.opset_imports[""]
        for node in model.graph:
            used.add(node.op_type)
            if not any(low <= opset <= high for low, high in known.get(node.op_type, [])):
                raise _refuse("kernels", f"step {name!r} uses {node.op_type}, opset {opset}, which ONNX Runtime has no kernel for", "add a rule for it")
    return f"{len(used)} kinds of operators, all with kernels"


def _no_random(case: _Case) -> str:
    for name, model in case.models.items():
        for node in model.graph:
            if node.op_type in RANDOM:
                raise _refuse("no random operator", f"step {name!r} draws random numbers ({node.op_type})", "pass the numbers as an input")
    return "none"


def _state_is_input(case: _Case) -> str:
    """No trainable tensor is baked into a graph."""
    names = {spec.name for spec in case.manifest.state}
    read: set[str] = set()
    for name, model in case.models.items():
        spec = case.manifest.steps[name]
        inputs = {v.name for v in model.graph.inputs}
        outputs = {v.name for v in model.graph.outputs}
        frozen = set(model.graph.initializers)
        wanted = {STATE_IN + s for s in spec.state_in}
        if not wanted <= inputs or wanted & frozen or not {STATE_OUT + s for s in spec.state_out} <= outputs:
            raise _refuse("state is input", f"step {name!r}: state {sorted(wanted - inputs)} is not an input of the graph", "report this as a defect")
        read |= set(spec.state_in)
    for name in sorted(names - read):
        raise _refuse("state is input", f"no step reads state {name!r}", "drop it from init()")
    return f"{len(names)} state tensors"


def _initial_state(case: _Case) -> str:
    check_files(case.folder, read_manifest(case.folder))
    saved = load_file(case.folder / case.manifest.state_file)
    for name, tensor in case.prepared.state.items():
        if name not in saved or saved[name].tobytes() != tensor.contiguous().numpy().tobytes():
            raise _refuse("initial state", f"{name!r} in the bundle differs from the learner's", "report this as a defect")
    return f"{sum(a.nbytes for a in saved.values()):,} bytes, bit-identical"


def _frozen(case: _Case) -> str:
    """Frozen tensors in the bundle are the learner's, to the bit; runs after the steps have run."""
    check_files(case.folder, case.manifest)
    count = 0
    for name, step in case.steps.items():
        tensors = (value.const_value for value in case.models[name].graph.initializers.values())
        shipped = {tensor.numpy().tobytes() for tensor in tensors if tensor is not None}
        for key, tensor in step.graph.constants().items():
            count += 1
            if tensor.contiguous().numpy().tobytes() not in shipped:
                raise _refuse("frozen tensors", f"step {name!r}: {key} differs in the bundle", "report this as a defect")
    return f"{count} tensors, bit-identical"


def _parity(case: _Case) -> str:
    """Outputs and new state equal eager's from many states, with zero gradients and a used arena among them."""
    eager = EagerEngine(case.prepared.trunk, case.prepared.learner)
    target = OnnxEngine(case.folder, case.manifest)
    worst: dict[str, float] = {}
    state = {name: t.detach().numpy().copy() for name, t in case.prepared.state.items()}
    for state_index, inputs in zip(range(STATES), _inputs(case), strict=False):
        for step in case.manifest.steps:
            if step != "encode":
                compare_step(step, state, inputs, eager, target, worst)
        if "learn" in case.manifest.steps:
            eager.load(state)
            outputs = eager.run("learn", inputs)
            if bool(outputs["finite"]) and bool(outputs.get("guard", True)):
                eager.commit()
                state = eager.state()
        if state_index == 0:
            _check_clean_runs(case, state, inputs, target)
    x = _example_of(case.prepared.x, np.random.default_rng(0))
    compare_outputs("encode", eager.run("encode", {"x": x}), target.run("encode", {"x": x}), worst)
    target.close()
    return ", ".join(f"{kind} {value:.0e}" for kind, value in sorted(worst.items()))


def compare_step(
    step: str, state: Mapping[str, Array], inputs: Mapping[str, Array], eager: Any, target: Any, worst: dict[str, float] | None = None
) -> None:
    """Run one step on two engines from the same state and compare outputs, new state and the change itself.

    Args:
        step: Name of the step.
        state: Every state tensor.
        inputs: At least the inputs that the step takes.
        eager: The reference engine.
        target: The engine to check.
        worst: Collects the largest relative difference by kind.

    Raises:
        ExportError: naming the tensor, the difference and the bar.
    """
    worst = {} if worst is None else worst
    eager.load(state)
    target.load(state)
    compare_outputs(step, eager.run(step, inputs), target.run(step, inputs), worst)
    eager.commit()
    target.commit()
    new, other = eager.state(), target.state()
    for name, reference in new.items():
        kind = "moments" if name.startswith(("momentum.", "adam_")) else "state"
        _compare(step, name, reference, other[name], MOMENTS if kind == "moments" else WEIGHTS, kind, worst)
        if reference.dtype.kind == "f":
            old = state[name].astype(np.float64)
            change, change_other = reference - old, other[name] - old
            floor = ROUNDING[str(reference.dtype)] * np.linalg.norm(reference)
            difference = float(np.linalg.norm(change - change_other)) - floor
            relative = max(difference, 0.0) / max(float(np.linalg.norm(change)), np.finfo(np.float64).tiny)
            _judge(step, f"the change of {name}", relative if difference > 0 else 0.0, CHANGE, "change", worst)


def compare_outputs(step: str, reference: Mapping[str, Array], other: Mapping[str, Array], worst: dict[str, float]) -> None:
    """Compare the outputs of one step; integers and truth values must be equal, codes may differ by one rounding."""
    for name, value in reference.items():
        got = other[name]
        if name == "scores":
            seen = value > UNSEEN / 2
            if ((got > UNSEEN / 2) != seen).any():
                raise _refuse("parity", f"step {step!r}: other classes are masked", "report this as a defect")
            value, got = value[seen], got[seen]
        if value.dtype == np.uint8:
            if np.abs(value.astype(int) - got).max(initial=0) > 1:
                raise _refuse("parity", f"step {step!r}: codes {name} differ", "report this as a defect")
        elif value.dtype.kind == "f":
            _compare(step, name, value, got, MOMENTS, "outputs", worst)
        elif not np.array_equal(value, got):
            raise _refuse("parity", f"step {step!r}: output {name} is {got}, eager gives {value}", "report this as a defect")


def _compare(step: str, name: str, reference: Array, other: Array, bar: float, kind: str, worst: dict[str, float]) -> None:
    if reference.dtype.kind != "f":
        if not np.array_equal(reference, other):
            raise _refuse("parity", f"step {step!r}: {name} differs", "report this as a defect")
        return
    size = float(np.linalg.norm(reference))
    # a value that should be zero (a loss, say) has rounding of the terms that cancelled
    relative = float(np.linalg.norm(reference.astype(np.float64) - other)) / max(size, 1e-3 if kind == "outputs" else 1e-30)
    _judge(step, name, relative if size or relative > bar else 0.0, bar, kind, worst)


def _judge(step: str, name: str, relative: float, bar: float, kind: str, worst: dict[str, float]) -> None:
    worst[kind] = max(worst.get(kind, 0.0), relative)
    if not relative <= bar:
        raise _refuse("parity", f"step {step!r}: {name} differs from eager by {relative:.2e}, more than {bar:.0e}", "report this as a defect")


def _check_clean_runs(case: _Case, state: Mapping[str, Array], inputs: Mapping[str, Array], target: OnnxEngine) -> None:
    """A run must not depend on what ran before: the same step from the same state, before and after other runs."""
    scale = {k: np.asarray(v * 100).astype(v.dtype) if v.dtype == np.float32 else v for k, v in inputs.items()}
    for step in case.manifest.steps:
        if step == "encode":
            continue
        results = []
        for _ in range(2):
            target.load(state)
            outputs = target.run(step, inputs)
            target.commit()
            results.append({**outputs, **target.state()})
            target.load(state)
            for other in case.manifest.steps:
                if other != "encode":
                    target.run(other, scale)
        for name, value in results[0].items():
            if value.tobytes() != results[1][name].tobytes():
                raise _refuse("parity", f"step {step!r}: {name} depends on earlier runs", "report this as a defect")


def _inputs(case: _Case) -> Any:
    """Inputs of real and of random samples, with learning rate zero and empty replay among them."""
    generator = np.random.default_rng(0)
    prepared, learner = case.prepared, case.prepared.learner
    classes = learner.problem.max_classes
    features = flatten_tree({"z": learner.problem.features})
    examples = list(prepared.examples) or [None]
    specs = {spec.name: spec for step in case.manifest.steps.values() for spec in step.inputs}
    stored = prepared.memory.rows_by_name() if prepared.memory is not None else {}
    for i, example in enumerate(itertools.cycle(examples)):
        if example is None:
            z = {name: _example_of(spec, generator) for name, spec in features.items()}
            label = i % classes
        else:
            z = {name: t.numpy() for name, t in flatten_tree({"z": example[0]}).items()}
            label = example[1] if i % 2 else i % classes
        inputs: dict[str, Array] = {
            **z,
            "target": np.array([label], np.int64),
            "new_target": np.array([(label + 1) % classes], np.int64),
            "weight": np.array([1.0 + i % 3], np.float32),
            "lr": np.array(0.0 if i % 8 == 7 else learner.default_lr, np.float32),
        }
        for name, spec in specs.items():
            if name.startswith("replay."):
                rows = spec.shape[0]
                if name == "replay.weight":
                    inputs[name] = (np.arange(rows) < (rows if i % 3 else i % rows)).astype(np.float32)
                elif len(stored.get("replay.target", ())) >= rows:
                    picked = np.random.default_rng(i).integers(0, len(stored["replay.target"]), rows)
                    inputs[name] = stored[name][picked]
                elif name == "replay.target":
                    inputs[name] = generator.integers(0, classes, rows)
                else:
                    inputs[name] = _example_of(spec, generator)
        yield inputs


def _example_of(spec: TensorSpec, generator: np.random.Generator) -> Array:
    if np.dtype(spec.dtype).kind == "f":
        return generator.standard_normal(spec.shape).astype(spec.dtype)
    return generator.integers(0, 100, spec.shape).astype(spec.dtype)


GATES: dict[str, Callable[[_Case], str]] = {
    "kernels": _kernels,
    "no random operator": _no_random,
    "state is input": _state_is_input,
    "initial state": _initial_state,
    "parity": _parity,
    "frozen tensors": _frozen,
}
"""Every gate by name, in the order in which they run."""
