"""Gates: what a bundle must prove before it may ship. They run at every export, on the target runtime itself."""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from edgecl.engine import EagerEngine
from edgecl.graph.lowering import BuiltStep
from edgecl.graph.passes.integers import stored
from edgecl.prepare import Prepared
from edgecl.targets import drawn_target
from edgecl.trees import flatten_tree
from edgecl_device.adapt_checks import ADAPT, TRACK
from edgecl_device.checks import REFRESH, REVISIONS
from edgecl_device.engines import Engine
from edgecl_device.errors import EdgeclError
from edgecl_device.manifest import AGE, Array, Manifest, TensorSpec, check_files, read_manifest
from edgecl_device.memory import row_of
from edgecl_device.targets import example_target
from edgecl_device.trial import tried
from edgecl_export.errors import refuse
from edgecl_export.latents import Latents
from edgecl_export.parity import MOMENTS, UNLESS, Tally, compare_outputs, compare_step
from edgecl_export.targets import Written, target_of

STATES = 24
"""States of a real trajectory from which every step is compared."""

LEAST = 8
"""Fewest states from which a step that writes state must have been compared: a state that both engines refuse tells nothing."""

DISTINCTIVE = 16
"""Elements from which on equal values are no coincidence."""

RANDOM = re.compile("rand|bernoulli|multinomial|dropout", re.IGNORECASE)
"""In the names of operators that draw random numbers, of every runtime."""


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
    written: Written


def verify(folder: Path, manifest: Manifest, prepared: Prepared, steps: Mapping[str, BuiltStep]) -> tuple[Gate, ...]:
    """Run every gate.

    Raises:
        ExportError: naming the gate, the step and the tensor.
    """
    case = _Case(folder, manifest, prepared, steps, target_of(manifest.engine).read(folder, manifest))
    return tuple(Gate(name, gate(case)) for name, gate in GATES.items())


def _kernels(case: _Case) -> str:
    """The runtime has a kernel for every operator."""
    for name in case.manifest.steps:
        lacking = case.written.lacking(name)
        if lacking is not None:
            raise refuse("kernels", f"step {name!r} uses {lacking} has no kernel for", "add a rule for it")
    used = set().union(*map(case.written.operators, case.manifest.steps))
    return f"{len(used)} kinds of operators, all with kernels"


def _no_random(case: _Case) -> str:
    for name in case.manifest.steps:
        for kind in sorted(case.written.operators(name)):
            if RANDOM.search(kind):
                raise refuse("no random operator", f"step {name!r} draws random numbers ({kind})", "pass the numbers as an input")
    return "none"


def _state_is_input(case: _Case) -> str:
    """No trainable tensor is baked into a graph, in whatever layout."""
    names = {spec.name for spec in case.manifest.state}
    state = {name: tensor.detach().numpy() for name, tensor in case.prepared.state.items()}
    baked = {_values(a): name for name, a in state.items() if a.size >= DISTINCTIVE and a.min() < a.max()}
    read: set[str] = set()
    for name, step in case.steps.items():
        misfit = case.written.misfit(name)
        if misfit is not None:
            raise refuse("state is input", f"step {name!r}: {misfit}", "report this as a defect")
        for tensor in step.graph.constants().values() if name != "encode" else ():
            if _values(tensor.numpy()) in baked:
                raise refuse(
                    "state is input",
                    f"step {name!r} holds the values of state {baked[_values(tensor.numpy())]!r} as a constant",
                    "read them from the state that the step is given",
                )
        read |= set(case.manifest.steps[name].state_in)
    for name in sorted(names - read):
        raise refuse("state is input", f"no step reads state {name!r}", "drop it from init()")
    return f"{len(names)} state tensors"


def _values(array: Array) -> bytes:
    """What two arrays share that differ by a reshape or a transpose."""
    return np.sort(array, axis=None).tobytes()


def _initial_state(case: _Case) -> str:
    check_files(case.folder, read_manifest(case.folder))
    saved = load_file(case.folder / case.manifest.state_file)
    for name, tensor in case.prepared.state.items():
        if name not in saved or saved[name].tobytes() != tensor.contiguous().numpy().tobytes():
            raise refuse("initial state", f"{name!r} in the bundle differs from the learner's", "report this as a defect")
    return f"{sum(a.nbytes for a in saved.values()):,} bytes, bit-identical"


def _frozen(case: _Case) -> str:
    """Frozen tensors in the bundle are the learner's, to the bit; runs after the steps have run."""
    check_files(case.folder, case.manifest)
    count = 0
    for name, step in case.steps.items():
        for key, tensor in stored(step.graph).items():
            count += 1
            if not case.written.holds(name, tensor.contiguous().numpy()):
                raise refuse("frozen tensors", f"step {name!r}: {key} differs in the bundle", "report this as a defect")
    return f"{count} tensors, bit-identical"


def _parity(case: _Case) -> str:
    """Outputs and new state equal eager's from many states, with zero gradients and a used arena among them."""
    eager = EagerEngine(case.prepared.trunk, case.prepared.learner)
    target = case.written.engine()
    steps = [step for step in case.manifest.steps if step != "encode"]
    latents, tally, compared = Latents(), Tally(), dict.fromkeys(case.manifest.steps, 0)
    state: Mapping[str, Array] = {name: t.detach().numpy().copy() for name, t in case.prepared.state.items()}
    inputs: Mapping[str, Array] = {}
    for state_index, drawn in zip(range(STATES), _inputs(case), strict=False):
        earlier, inputs = inputs, drawn
        learned = _learned(case, eager, state, inputs)
        for step in steps:
            start = learned if step in REVISIONS else state  # only what was learned can be taken out
            found = compare_step(step, start, inputs, eager, target, tally)
            if step in REVISIONS and not found:  # the only sample of its direction or class: with another like it, it can go
                found = compare_step(step, _learned(case, eager, learned, inputs), inputs, eager, target, tally)
            compared[step] += found
        if state_index == 0:
            _check_clean_runs(case, state, inputs, target)
        state = learned
    # With the inputs before the last: statistics of rows that this state has just taken would not change again, and the last rate is 0.
    blank = {name: np.zeros_like(a) if name.partition(".")[0] == "z" or name == "replay.weight" else a for name, a in earlier.items()}
    for step in steps:
        compared[step] += compare_step(step, state, blank, eager, target, tally)
    frames = _samples(case, eager)
    if case.manifest.stream:  # each frame from the state that the ones before have left
        for x in itertools.islice(itertools.cycle(frames), STATES):
            compared["encode"] += compare_step("encode", state, x, eager, target, tally)
            state = eager.state()
    else:
        in_float = case.prepared.trunk.in_float
        exact = EagerEngine(in_float[0], case.prepared.learner) if in_float else None
        for x in frames:
            pair = eager.run("encode", x), target.run("encode", x)
            if exact is None:
                compare_outputs("encode", *pair, tally)
            else:
                latents.add(*pair, exact.run("encode", x))
            compared["encode"] += 1
    target.close()
    for step in steps:
        if case.manifest.steps[step].state_out and compared[step] < LEAST:
            why = f"step {step!r} could be compared from {compared[step]} states, must be from {LEAST}: both engines refuse the others"
            raise refuse("parity", why, UNLESS)
    int8 = latents.check(MOMENTS)
    return f"{tally}; {int8}states: {', '.join(f'{step} {count}' for step, count in compared.items())}"


def _learned(case: _Case, eager: EagerEngine, state: Mapping[str, Array], inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """The state after learning a sample, or adapting to it, or the same state where there is no such step or it refuses."""
    for step in (TRACK, ADAPT):
        if step in case.manifest.steps:
            eager.load(state)
            if bool(eager.run(step, inputs).get("finite", True)):
                eager.commit()
            state = eager.state()
    if "learn" not in case.manifest.steps:
        return state
    eager.load(state)
    outputs = eager.run("learn", inputs)
    if not (bool(outputs["finite"]) and bool(outputs.get("guard", True))):
        return state
    eager.commit()
    learned, every = eager.state(), case.manifest.refresh_every
    if not every or learned[AGE] < every:
        return learned
    eager.run(REFRESH, inputs)
    eager.commit()
    return eager.state()


def _samples(case: _Case, eager: EagerEngine) -> list[dict[str, Array]]:
    """Inputs [1, ...] of the trunk: those that ``fit`` has seen, and random ones where the model takes them."""
    seen, generator = flatten_tree({"x": case.prepared.samples}), np.random.default_rng(0)
    real = [{name: part[i : i + 1] for name, part in seen.items()} for i in range(len(next(iter(seen.values()))))]
    drawn = {}
    for name, spec in flatten_tree({"x": case.prepared.x}).items():
        if np.dtype(spec.dtype).kind == "f":
            drawn[name] = _example_of(spec, generator)
        else:
            drawn[name] = generator.integers(0, 2 if spec.dtype == "bool" else 256, spec.shape).astype(spec.dtype)
    try:
        taken = all(np.isfinite(z).all() for z in eager.run("encode", drawn).values())
    except Exception:  # integers may be rows of a table in the user's code, which may raise anything for others
        taken = False
    return [*real, drawn] if taken else real


def _loads(case: _Case) -> str:
    """The device's own loop loads the bundle, predicts, and learns or adapts."""
    try:
        with tried(case.folder) as learner:
            seen = learner.predict(case.prepared.example)
            done = []
            if "learn" in case.manifest.steps:
                report = learner.learn(seen.sample_id, example_target(case.manifest) if seen.label is None else seen.label)
                if not report.learned and seen.label is not None:  # known already: its gate lets another class pass
                    report = learner.learn(learner.predict(case.prepared.example).sample_id, (seen.label + 1) % case.manifest.max_classes)
                done.append("learned" if report.learned else "left out by its gate")
            if ADAPT in case.manifest.steps and seen.outcome is not None:  # without source samples no class is known
                learner.adapt(seen.sample_id)
                done.append("adapted")
    except EdgeclError as error:
        raise refuse("loads", f"the device's loop refuses the bundle or its first sample ({error})", UNLESS) from error
    return ", ".join(["loaded", "predicted", *done])


def _check_clean_runs(case: _Case, state: Mapping[str, Array], inputs: Mapping[str, Array], target: Engine) -> None:
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
                raise refuse("parity", f"step {step!r}: {name} depends on earlier runs", "report this as a defect")


def _inputs(case: _Case) -> Any:
    """Inputs of real and of random samples, with learning rate zero and empty or partly filled replay among them."""
    generator = np.random.default_rng(0)
    prepared, learner = case.prepared, case.prepared.learner
    classes = learner.problem.max_classes
    features = flatten_tree({"z": learner.problem.features})
    target, examples = learner.problem.target, list[tuple[Any, Array] | None](prepared.examples) or [None]
    specs = {spec.name: spec for step in case.manifest.steps.values() for spec in step.inputs}
    stored = prepared.memory.rows_by_name() if prepared.memory is not None else {}
    stored |= _tracked(case)
    draws = prepared.memory.spec.draws if prepared.memory is not None else ()
    for i, example in enumerate(itertools.cycle(examples)):
        if example is None:
            z = {name: _example_of(spec, generator) for name, spec in features.items()}
            own = None
        else:
            z = {name: t.numpy() for name, t in flatten_tree({"z": example[0]}).items()}
            own = example[1] if i % 2 else None
        inputs: dict[str, Array] = {
            **z,
            "target": drawn_target(target, classes, i % classes, generator) if own is None else own,
            "new_target": drawn_target(target, classes, (i + 1) % classes, generator),
            "weight": np.array([1.0 + i % 3], np.float32),
            "lr": np.array(0.0 if i % 8 == 7 else learner.default_lr, np.float32),
        }
        inputs |= {draw.tensor.name: generator.integers(0, draw.below, draw.shape) for draw in draws}
        for name, spec in specs.items():
            if name.startswith("replay."):
                rows = spec.shape[0]
                if name == "replay.weight":
                    inputs[name] = (np.arange(rows) < (rows if i % 3 else i % rows)).astype(np.float32)
                elif len(stored.get(name, ())) >= (1 if ADAPT in case.manifest.steps else rows):
                    picked = np.random.default_rng(i).integers(0, len(stored[name]), rows)
                    inputs[name] = stored[name][picked]
                elif name == "replay.target":
                    drawn = [drawn_target(target, classes, int(k), generator) for k in generator.integers(0, classes, rows)]
                    inputs[name] = np.concatenate(drawn).astype(spec.dtype)
                else:
                    inputs[name] = _example_of(spec, generator)
        yield inputs


def _tracked(case: _Case) -> dict[str, Array]:
    """Rows [n, ...] of the base samples kept, of methods whose memory is empty at the start."""
    if TRACK not in case.manifest.steps:
        return {}
    eager = EagerEngine(case.prepared.trunk, case.prepared.learner)
    eager.load({name: t.detach().numpy() for name, t in case.prepared.state.items()})
    found = [row_of(eager.run(TRACK, {n: t.numpy() for n, t in flatten_tree({"z": z}).items()})) for z, _ in case.prepared.examples]
    together = {f"replay.{name}": np.stack([row[name] for row in found]) for name in (found[0] if found else {})}
    if all((rows == rows[0]).all() for rows in together.values()):
        # The same rows in every state: statistics that took them before change by roundings alone. What the latent has as integers stays,
        # as it may be rows of a table; the rest is drawn.
        latent = flatten_tree({"z": case.prepared.learner.problem.features})
        drawn = {f"replay.{name}" for name, spec in latent.items() if np.dtype(spec.dtype).kind == "f"}
        return {name: rows for name, rows in together.items() if name not in drawn}
    return together


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
    "loads": _loads,
}
"""Every gate by name, in the order in which they run."""
