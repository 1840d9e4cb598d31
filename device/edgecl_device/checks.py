"""Checks of what callers and bundles hand to the loop."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgecl_device.adapt_checks import ADAPT, TRACK, adapting_fault, adapting_outputs
from edgecl_device.errors import BundleError, InputError, PredictionError
from edgecl_device.generator import WORD
from edgecl_device.manifest import AGE, DTYPES, UNSEEN_SCORE, WHOLE, Array, Manifest, TargetSpec, TensorSpec

TARGET = "target"
REVISIONS = ("forget", "relabel")
REFRESH = "refresh"
IDENTIFY = "identify"
LIKELIHOOD = "likelihood"
GATE = "gate"
MOST_ELEMENTS = 1 << 40
MOST_THREADS = 64
MOST_DRAWS = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_Entry = TypeVar("_Entry")


def check_manifest(manifest: Manifest) -> None:
    """Check everything that can be told before a file is read: values, tensors, names, and what the loop can feed.

    Raises:
        BundleError: naming the field, step or tensor.
    """
    if not 1 <= manifest.max_classes <= 1 << 24 or manifest.pending_capacity < 0:
        got = f"{manifest.max_classes} and {manifest.pending_capacity}"
        raise BundleError(
            f"manifest: must have max_classes in [1, 2**24] and pending_capacity at least 0, got {got}; export the bundle again"
        )
    _check_target(manifest.target, manifest.max_classes)
    if not _SHA256.fullmatch(manifest.bundle_id):
        raise BundleError(f"manifest: bundle_id must be a SHA-256 in hexadecimal, got {short(manifest.bundle_id)}; export the bundle again")
    if manifest.forgets and "forget" not in manifest.steps:
        raise BundleError("manifest: forgets must be false without a step 'forget', got true; export the bundle again")
    try:
        as_float32("learning_rate", manifest.learning_rate, positive=False)
    except InputError as error:
        raise BundleError(f"manifest: {error}") from error
    _check_tensors("state", manifest.state)
    _check_tensors("replay", manifest.replay.fields if manifest.replay is not None else ())
    draws = manifest.replay.draws if manifest.replay is not None else ()
    _check_tensors("draws", [draw.tensor for draw in draws])
    for draw in draws:
        if draw.step not in ("learn", REFRESH, ADAPT):
            got = short(draw.step)
            raise BundleError(f"draws: {draw.name!r} must be of step learn, {REFRESH} or {ADAPT}, got {got}; export the bundle again")
        if not 1 <= draw.below <= WORD or math.prod(draw.shape) > MOST_DRAWS:
            raise BundleError(
                f"draws: {draw.name!r} must be at most {MOST_DRAWS:,} integers below a bound in [1, 2**32], got {short(draw.shape)} below "
                f"{draw.below}; export the bundle again"
            )
    known = {spec.name for spec in manifest.state}
    for name, step in manifest.steps.items():
        _check_tensors(f"step {name!r}", step.inputs)
        _check_tensors(f"step {name!r}", step.outputs)
        for used in (step.state_in, step.state_out):
            if len(set(used)) < len(used) or not known.issuperset(used):
                raise BundleError(
                    f"step {name!r}: must use tensors of the state, each once, got {short(used)}, the state has {short(sorted(known))}; "
                    "export the bundle again"
                )
    check_steps(manifest)


def _check_target(spec: TargetSpec, classes: int) -> None:
    height_width = (spec.shape * 3)[1:3]
    known = {
        "class": TargetSpec(),
        "vector": TargetSpec("vector", (1, classes), "float32"),
        "multilabel": TargetSpec("multilabel", (1, classes), "float32", threshold=spec.threshold),
        "map": TargetSpec("map", (1, *height_width), "int64", spec.ignore),
    }
    if known.get(spec.kind) != spec or min(spec.shape) < 1 or not -(1 << 31) <= (spec.ignore or 0) < 1 << 31:
        raise BundleError(
            f"manifest: target must be one of {', '.join(known)} with the shape, type and values of its kind, got {short(spec)} for "
            f"max_classes {classes}; export the bundle again"
        )


def _check_tensors(where: str, specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names) or "" in names:
        raise BundleError(f"{where}: tensors must have different names, none of them empty, got {short(names)}; export the bundle again")
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise BundleError(f"{where}: dtype of {spec.name!r} must be one of {', '.join(DTYPES)}, got {short(spec.dtype)}; export again")
        if min(spec.shape, default=0) < 0 or math.prod(spec.shape) > MOST_ELEMENTS:
            raise BundleError(
                f"{where}: sizes of {spec.name!r} must be at least 0 and at most 2**40 in all, got {short(spec.shape)}; export again"
            )


def check_steps(manifest: Manifest) -> None:
    """Check that the loop can feed every step and finds the outputs that it needs.

    Raises:
        BundleError: naming the step and the input or output.
    """
    for name in ("encode", "predict"):
        if name not in manifest.steps:
            raise BundleError(f"steps: {name!r} is missing, got {', '.join(sorted(manifest.steps))}; export the bundle again")
    stream = {spec.name for spec in manifest.stream}
    for name, step in manifest.steps.items():
        written = set(step.state_out) - (stream if name == "encode" else set())
        if name in ("encode", "predict", IDENTIFY, GATE) and written:
            raise BundleError(f"step {name!r}: must not write state, got {short(sorted(written))}; export the bundle again")
        heard = stream & {*step.state_in, *step.state_out}
        if name != "encode" and heard:
            raise BundleError(
                f"step {name!r}: must leave the stream's state to encode, got {short(sorted(heard))}; export the bundle again"
            )
    _check_refresh(manifest)
    _check_tasks(manifest)
    classes, names = manifest.max_classes, list(manifest.class_names)
    replay = manifest.replay
    needed = {
        "encode": [TensorSpec("finite", (), "bool")] if stream else [],
        "predict": [manifest.target.scores(classes)],
        "learn": [manifest.target.scores(classes), TensorSpec("loss", (), "float32"), TensorSpec("finite", (), "bool")],
        GATE: [manifest.target.scores(classes), TensorSpec("loss", (), "float32"), TensorSpec("worth", (), "bool")],
        **{name: [TensorSpec("finite", (), "bool")] for name in (*REVISIONS, REFRESH)},
        **adapting_outputs(manifest),
        IDENTIFY: [TensorSpec(LIKELIHOOD, (), "float32")],
    }
    fault = adapting_fault(manifest)
    if fault:
        raise BundleError(f"{fault}; export the bundle again")
    if replay is not None and replay.policy not in WHOLE:
        stored = manifest.target.stored(classes)
        if [f for f in replay.fields if f.name == TARGET] != ([] if stored is None else [stored]):
            raise BundleError(
                f"replay: rows must have the field {stored} for such targets, got {list(replay.fields)}; export the bundle again"
            )
        needed["learn"] += [TensorSpec(f"row.{f.name}", (1, *f.shape), f.dtype) for f in replay.fields if f.name != TARGET]
    inputs = [spec.name for spec in manifest.steps["encode"].inputs]
    if inputs != ["x"] and not (inputs and all(name.startswith("x.") and len(name) > 2 for name in inputs)):
        raise BundleError(f"step 'encode': inputs must be x, or x.NAME each, got {short(inputs)}; export the bundle again")
    for name, step in manifest.steps.items():
        known = {} if name == "encode" else _fed(manifest, name)
        for spec in step.inputs if name != "encode" else ():
            if known.get(spec.name) != spec:
                raise BundleError(
                    f"step {name!r}: the loop cannot feed {spec}, it feeds {known.get(spec.name) or sorted(known)}; export the bundle again"
                )
        for spec in needed.get(name, ()):
            if spec not in step.outputs:
                raise BundleError(f"step {name!r}: output {spec} is missing, got {list(step.outputs)}; export the bundle again")
    if len(names) > classes or len(set(names)) < len(names) or "" in names:
        raise BundleError(f"class_names: must be at most {classes} different names, got {names}; export the bundle again")


def _fed(manifest: Manifest, step: str) -> dict[str, TensorSpec]:
    """What the loop feeds to a step other than ``encode``, by name."""
    replay = manifest.replay
    whole = replay is not None and replay.policy in WHOLE
    sample = [] if step == REFRESH or (step == ADAPT and whole) else list(manifest.features)
    if step in ("learn", GATE, *REVISIONS):
        sample += [manifest.target.spec("target"), TensorSpec("weight", (1,), "float32")]
    if step in ("learn", GATE, TRACK, ADAPT, *REVISIONS):
        sample.append(TensorSpec("lr", (), "float32"))
    if step == "relabel":
        sample.append(manifest.target.spec("new_target"))
    fed = {spec.name: spec for spec in sample}
    if replay is not None and step in ("learn", REFRESH, *([ADAPT] if whole else [])):
        r = replay.rows_per_step
        fed |= {f"replay.{f.name}": TensorSpec(f"replay.{f.name}", (r, *f.shape), f.dtype) for f in replay.fields}
        if not whole:
            fed.setdefault("replay.target", TensorSpec("replay.target", (r,), "int64"))
            fed["replay.weight"] = TensorSpec("replay.weight", (r,), "float32")
        fed |= {draw.tensor.name: draw.tensor for draw in replay.draws if draw.step == step}
    return fed


def _check_refresh(manifest: Manifest) -> None:
    """The step that the loop runs by itself is told when, takes nothing but state and what the loop draws, and resets its age."""
    step, every = manifest.steps.get(REFRESH), manifest.refresh_every
    if (step is None) != (every == 0) or every < 0:
        got = f"{every} and {'such' if step else 'no such'} step"
        raise BundleError(f"refresh_every: must be at least 1 with a step {REFRESH!r}, else 0, got {got}; export the bundle again")
    if step is None:
        return
    given = [spec.name for spec in step.inputs if not spec.name.startswith(("replay.", "draw."))]
    if TensorSpec(AGE, (), "float32") not in manifest.state or given or AGE not in step.state_out:
        got = short([*(spec.name for spec in step.inputs), *step.state_out])
        raise BundleError(
            f"step {REFRESH!r}: must take state, rows and draws alone, and write {AGE!r}, float32 [], got {got}; export again"
        )
    if ADAPT in manifest.steps or (step.inputs and set(REVISIONS) & set(manifest.steps)):
        got = short(sorted(manifest.steps))
        why = "be there beside adapt, nor take rows beside forget or relabel, whose sample may be one of them"
        raise BundleError(f"step {REFRESH!r}: must not {why}, got steps {got}; export the bundle again")


def _check_tasks(manifest: Manifest) -> None:
    """What is done for a task that is not the present one can be done without running a step on each."""
    if manifest.tasks is None:
        if IDENTIFY in manifest.steps:
            raise BundleError(f"step {IDENTIFY!r}: must not be there without tasks, of which it tells one; export the bundle again")
        return
    fresh, known = manifest.tasks.fresh, {spec.name for spec in manifest.state} - {spec.name for spec in manifest.stream}
    if len(set(fresh)) < len(fresh) or not known.issuperset(fresh):
        raise BundleError(f"tasks: fresh must name state tensors, each once, got {short(fresh)}; export the bundle again")
    if {*REVISIONS, ADAPT} & set(manifest.steps) or manifest.refresh_every:
        got = short(sorted(manifest.steps))
        raise BundleError(f"tasks: must be null for a method that forgets, relabels, refreshes or adapts, got steps {got}; export again")
    if manifest.replay is not None and manifest.replay.in_file:
        raise BundleError("tasks: must be null where replay rows lie in a file, which holds those of one task; export the bundle again")
    try:
        as_name(manifest.tasks.first)
    except InputError as error:
        raise BundleError(f"tasks: first: {error}") from error


def check_state(manifest: Manifest, state: Mapping[str, Array]) -> None:
    """Check names, shapes, dtypes and finite values of a whole state.

    Raises:
        BundleError: naming the tensor.
    """
    expected = {spec.name for spec in manifest.state}
    if set(state) != expected:
        raise BundleError(f"state: tensors must be {sorted(expected)}, got {sorted(state)}; export the bundle again")
    for spec in manifest.state:
        try:
            spec.check(state[spec.name])
        except InputError as error:
            raise BundleError(f"state: {error}; export the bundle again") from error


def as_sample(x: Any, spec: TensorSpec) -> Array:
    """One input sample with its batch dimension of 1, which the caller may leave out.

    Raises:
        InputError: when shape, dtype or values do not fit.
    """
    if isinstance(x, np.ndarray) and x.shape == spec.shape[1:] and len(spec.shape) > x.ndim:
        x = x[None]
    return spec.check(x)


def as_inputs(x: Any, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """One sample as ``encode`` takes it: of a model of several inputs a mapping of their names.

    Raises:
        InputError: when an input is missing or unknown, or its shape, dtype or values do not fit.
    """
    if specs[0].name == "x":
        return {"x": as_sample(x, specs[0])}
    names = [spec.name.removeprefix("x.") for spec in specs]
    if not isinstance(x, Mapping) or set(x) != set(names):
        got = list(x) if isinstance(x, Mapping) else type(x).__name__
        raise InputError(f"x: must be a mapping with the inputs {', '.join(names)}, got {short(got)}; pass each as a numpy array")
    return {spec.name: as_sample(x[name], spec) for spec, name in zip(specs, names, strict=True)}


def as_int(name: str, value: Any) -> int:
    """A Python or NumPy integer as an int; booleans and floats are refused.

    >>> as_int("label", np.int64(3))
    3
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name}: must be an integer, got {short(value)} of type {type(value).__name__}; convert it with int()")
    if int(value).bit_length() > 4096:  # Python makes no text of much longer ones, which the errors behind this would need
        raise InputError(f"{name}: must have at most 4,096 bits, got {short(value)}; pass a smaller number")
    return int(value)


def thread_count(threads: Any) -> int:
    """Threads of a runtime, 1 to 64."""
    number = as_int("threads", threads)
    if not 1 <= number <= MOST_THREADS:
        raise InputError(f"threads: must be at least 1 and at most {MOST_THREADS}, got {short(threads)}; 1 is the default")
    return number


def check_whole(specs: Mapping[str, TensorSpec], state: Mapping[str, Array]) -> None:
    """Check that a state has every tensor, each of its shape and dtype and finite.

    Raises:
        InputError: naming the tensor.
    """
    missing = sorted(set(specs) - set(state))
    if missing:
        raise InputError(f"state: {', '.join(missing)} missing; pass every tensor of the manifest's state")
    for name, spec in specs.items():
        spec.check(state[name])


def entry(name: str, key: Any, table: Mapping[str, _Entry]) -> _Entry:
    """An entry of a table, by what the parameter ``name`` was given.

    Raises:
        InputError: when there is none.

    >>> entry("engine", "abacus", {"onnx": 1, "executorch": 2})
    Traceback (most recent call last):
    edgecl_device.errors.InputError: engine: must be one of onnx, executorch, got 'abacus'; pass one of them
    """
    if key not in tuple(table):  # a tuple: what is given may have no hash
        raise InputError(f"{name}: must be one of {', '.join(table)}, got {short(key)}; pass one of them")
    return table[key]


def as_name(value: Any) -> str:
    """A string of 1 to 200 characters, all of which UTF-8 has; of a subclass of str (NumPy's, an enumeration's) its characters."""
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise InputError(f"name: must be a string of 1 to 200 characters, got {short(value)}; pass the name")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"name: must be valid Unicode, got {short(value)}; decode it with the right encoding")
    return "".join(value)


def as_path(name: str, value: Any) -> Path:
    """A path that a file could have."""
    try:
        path = Path(value)
        path.resolve().exists()
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{name}: must be a path, got {short(value)} ({short(error)}); pass a string or a pathlib.Path") from error
    return path


def short(value: Any) -> str:
    """``repr`` of a value for a message, cut at 100 characters.

    >>> short("a" * 200) == "'" + "a" * 96 + "..."
    True
    """
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        text = f"a number of type {type(value).__name__} with very many digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def as_float32(name: str, value: Any, positive: bool) -> float:
    """A finite number as a float that float32 can hold, above zero when ``positive`` and not below it otherwise."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError(f"{name}: must be a number, got {short(value)} of type {type(value).__name__}; convert it with float()")
    with np.errstate(over="ignore", under="ignore"):
        try:
            result = float(np.float32(value)) + 0.0  # no negative zero, which SQLite does not keep
        except OverflowError:  # an integer beyond float64
            result = math.inf
    if not np.isfinite(result) or result < 0 or (positive and result == 0):
        bound = "above 0" if positive else "at least 0"
        raise InputError(f"{name}: must be finite in float32 and {bound}, got {short(value)}; pass such a number")
    return result


def as_weight(value: Any, method: str, taken: Collection[str]) -> float:
    """A sample weight: above 0, and 1 where it is none of the inputs ``taken`` by the method's ``learn``."""
    weight = as_float32("weight", value, positive=True)
    if weight != 1 and "weight" not in taken:
        raise InputError(f"weight: {method} takes no sample weight, got {weight}; leave it at 1")
    return weight


def read_tensors(path: Path) -> dict[str, Array]:
    """Read a safetensors file.

    Raises:
        BundleError: when it is missing or not one.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:  # the last four: types numpy lacks
        raise BundleError(f"{path}: cannot be read as safetensors ({error}); copy the bundle again") from error


def check_scores(scores: Array) -> None:
    """Check that every score is finite.

    Raises:
        PredictionError: when one is not.
    """
    if not np.isfinite(scores).all():
        raise PredictionError(
            f"scores: must be finite, got {short(scores.tolist())}; the state has grown too large: roll back, and lower the learning rate"
        )


def best_class(scores: Array) -> int | None:
    """Index of the highest score float32 [K] of a class that was learned, or None when there is none yet.

    Raises:
        PredictionError: when a score is NaN or infinite.

    >>> best_class(np.array([UNSEEN_SCORE, -3, -2], np.float32))
    2
    """
    check_scores(scores)
    learned = scores != np.float32(UNSEEN_SCORE)
    return int(np.where(learned, scores, -np.inf).argmax()) if learned.any() else None


def has_length(value: Array) -> bool:
    """Whether a sum of squares is finite: no NaN, no infinity, and no length that a method would round to infinity."""
    flat = value.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return value.dtype.kind != "f" or bool(np.isfinite(flat @ flat))
