"""Checks of what callers and bundles hand to the loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgecl_device.errors import BundleError, InputError
from edgecl_device.manifest import Array, Manifest, TensorSpec

REVISIONS = ("forget", "relabel")


def check_steps(manifest: Manifest) -> None:
    """Check that the loop can feed every step and finds the outputs that it needs.

    Raises:
        BundleError: naming the step and the input or output.
    """
    for name in ("encode", "predict"):
        if name not in manifest.steps:
            raise BundleError(f"steps: {name!r} is missing, got {', '.join(sorted(manifest.steps))}; export the bundle again")
        if manifest.steps[name].state_out:
            raise BundleError(f"step {name!r}: must not write state, writes {manifest.steps[name].state_out}; export the bundle again")
    classes, names = manifest.max_classes, list(manifest.class_names)
    known = {
        spec.name: spec
        for spec in (
            *manifest.steps["encode"].outputs,
            TensorSpec("target", (1,), "int64"),
            TensorSpec("new_target", (1,), "int64"),
            TensorSpec("weight", (1,), "float32"),
            TensorSpec("lr", (), "float32"),
        )
    }
    replay = manifest.replay
    if replay is not None:
        r = replay.rows_per_step
        known |= {f"replay.{f.name}": TensorSpec(f"replay.{f.name}", (r, *f.shape), f.dtype) for f in replay.fields}
        known["replay.target"] = TensorSpec("replay.target", (r,), "int64")
        known["replay.weight"] = TensorSpec("replay.weight", (r,), "float32")
    needed = {
        "predict": [TensorSpec("scores", (1, classes), "float32")],
        "learn": [TensorSpec("scores", (1, classes), "float32"), TensorSpec("loss", (), "float32"), TensorSpec("finite", (), "bool")],
        **{name: [TensorSpec("finite", (), "bool")] for name in REVISIONS},
    }
    if replay is not None:
        needed["learn"] += [TensorSpec(f"row.{f.name}", (1, *f.shape), f.dtype) for f in replay.fields]
    if [spec.name for spec in manifest.steps["encode"].inputs] != ["x"]:
        raise BundleError("step 'encode': must have one input, x; export the bundle again")
    for name, step in manifest.steps.items():
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


def check_listed(manifest: Manifest) -> None:
    """Check that every file that is going to be read has a hash in the manifest.

    Raises:
        BundleError: naming the files that have none.
    """
    read = {step.file for step in manifest.steps.values()} | {manifest.state_file, manifest.replay_file or manifest.state_file}
    if missing := sorted(read - set(manifest.files)):
        raise BundleError(f"files: {', '.join(missing)} must have a SHA-256 in the manifest, got none; export the bundle again")


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


def as_int(name: str, value: Any) -> int:
    """A Python or NumPy integer as an int; booleans and floats are refused.

    >>> as_int("label", np.int64(3))
    3
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name}: must be an integer, got {value!r} of type {type(value).__name__}; convert it with int()")
    return int(value)


def as_name(value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise InputError(f"name: must be a string that is not empty, got {value!r}; pass the name")
    return value


def as_float32(name: str, value: Any, positive: bool) -> float:
    """A finite number as a float that float32 can hold, above zero when ``positive`` and not below it otherwise."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError(f"{name}: must be a number, got {value!r} of type {type(value).__name__}; convert it with float()")
    with np.errstate(over="ignore", under="ignore"):
        result = float(np.float32(value))
    if not np.isfinite(result) or result < 0 or (positive and result == 0):
        bound = "above 0" if positive else "at least 0"
        raise InputError(f"{name}: must be finite in float32 and {bound}, got {value!r}; pass such a number")
    return result


def read_tensors(path: Path) -> dict[str, Array]:
    """Read a safetensors file.

    Raises:
        BundleError: when it is missing or not one.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: cannot be read as safetensors ({error}); copy the bundle again") from error


def has_length(value: Array) -> bool:
    """Whether a sum of squares is finite: no NaN, no infinity, and no length that a method would round to infinity."""
    flat = value.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return value.dtype.kind != "f" or bool(np.isfinite(flat @ flat))
