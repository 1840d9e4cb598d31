"""The bundle's manifest: the only contract between the host that writes a bundle and the device that runs it.

The classes here are plain data. :func:`read_manifest` checks the schema, the manifest's own SHA-256 and the structure,
:func:`check_files` the SHA-256 of every other file; both name what is wrong and how to mend it.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecl_device.errors import BundleError, InputError, SchemaError

SCHEMA = 4
"""Version of the manifest that is written.

Versions 1, in which ``target`` is the word ``class``, 2, without ``refresh_every``, and 3, without ``adapt`` and ``tasks`` and with
all draws for ``learn``, are read as well."""

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest_sha256"
DEFAULT_LOG_BYTES = 16 << 20
DEFAULT_PENDING = 256
DTYPES = ("float32", "float64", "int16", "int32", "int64", "uint8", "bool")
"""Types that a tensor of a bundle may have, by NumPy's names."""
STREAM = "encode."
"""Start of the names of state that ``encode`` carries from frame to frame, and that no other step reads or writes."""
AGE = "age"
"""State float32 []: updates since the last ``refresh``, for methods that have such a step."""
WHOLE = ("ring", "balanced")
"""Policies of replay memories all of whose rows ``adapt`` gets (:mod:`edgecl_device.whole`)."""
UNSEEN_SCORE = -1e30
"""Score of a class that has not been learned yet: finite, so that it passes every check, and below any real score."""

Array = NDArray[Any]
_FILE_NAME = re.compile(r"\w[\w.-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of fixed shape.

    Attributes:
        name: Dotted name, for instance ``replay.z``.
        shape: Sizes of all dimensions, the batch dimension included; ``()`` is a scalar.
        dtype: NumPy's name, one of :data:`DTYPES`: ``float32``, ``float64``, ``int16``, ``int32``, ``int64``, ``uint8`` or ``bool``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of one such array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def zeros(self) -> Array:
        """A new array of zeros."""
        return np.zeros(self.shape, self.dtype)

    def check(self, value: Array) -> Array:
        """Return ``value`` as it is when it fits, with finite values.

        Raises:
            InputError: on another shape or dtype, NaN or infinity, or a masked array.
        """
        if not isinstance(value, np.ndarray):
            raise InputError(f"{self.name}: expected a numpy array, got {type(value).__name__}; convert it with numpy.asarray")
        if isinstance(value, np.ma.MaskedArray):
            raise InputError(f"{self.name}: must not be a masked array, whose mask no graph heeds; put values there with .filled(value)")
        if value.shape != self.shape:
            raise InputError(f"{self.name}: shape must be {list(self.shape)}, got {list(value.shape)}; reshape or resize the input")
        if value.dtype != np.dtype(self.dtype):
            raise InputError(f"{self.name}: dtype must be {self.dtype}, got {value.dtype}; convert it with .astype('{self.dtype}')")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            bad = int(value.size - np.isfinite(value).sum())
            raise InputError(f"{self.name}: values must be finite, got {bad} NaN or infinite of {value.size}; drop or repair this sample")
        return value


@dataclass(frozen=True)
class TargetSpec:
    """What a sample's target is.

    Attributes:
        kind: ``class`` (one class index), ``vector`` (real values), ``multilabel`` (any number of labels) or ``map`` (a class a pixel).
        shape: Shape of one target, batch dimension of 1 included: [1], [1, D], [1, K] or [1, H, W].
        dtype: ``int64`` for classes, ``float32`` else; a label is 1 or 0.
        ignore: Value of the pixels of a map that count for nothing, or None.
        threshold: A label whose score is above it is predicted.
    """

    kind: str = "class"
    shape: tuple[int, ...] = (1,)
    dtype: str = "int64"
    ignore: int | None = None
    threshold: float = 0.0

    def spec(self, name: str) -> TensorSpec:
        """One target as the input ``name`` of a step."""
        return TensorSpec(name, self.shape, self.dtype)

    def scores(self, classes: int) -> TensorSpec:
        """The output ``scores``: float32 [1, K], for a map [1, K, H, W]."""
        return TensorSpec("scores", (1, classes, *(self.shape[1:] if self.kind == "map" else ())), "float32")

    def stored(self, classes: int) -> TensorSpec | None:
        """One target as log and replay rows keep it, without a batch dimension; None for a class index, which costs no bytes there."""
        if self.kind == "class":
            return None
        small = 0 <= (0 if self.ignore is None else self.ignore) < 256 and classes <= 256
        dtype = {"vector": "float32", "multilabel": "uint8", "map": "uint8" if small else "int32"}[self.kind]
        return TensorSpec("target", self.shape[1:], dtype)


@dataclass(frozen=True)
class StepSpec:
    """One step of the learner: a pure function from state and inputs to outputs and new state.

    Attributes:
        file: Path of its graph inside the bundle; for ExecuTorch of the program that has the step as a method of its name.
        inputs: Named inputs besides the state, as the graph takes them. A method takes ``state_in``, then these, in this order.
        state_in: Names of the state tensors that the graph reads.
        outputs: Named outputs besides the state. A ``bool []`` output called ``finite`` or ``guard`` says whether the
            new state may be kept; outputs called ``row.NAME`` are the replay row of this sample.
        state_out: Names of the state tensors that the graph writes. A method gives ``outputs``, then these, in this order.
        canonical_macs: Multiply-accumulates of the step's mathematics.
        executed_macs: Multiply-accumulates of the graph in ``file``.
        macs_by_phase: Canonical count by phase (encode, replay_encode, replay_decode, augment, forward,
            input_gradient, weight_gradient, update).
        elementwise: Elementwise operations of the graph in ``file``, counted apart from the MACs.
        activation_bytes: Planned peak of the graph's intermediate tensors.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    state_in: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    state_out: tuple[str, ...]
    canonical_macs: int
    executed_macs: int
    macs_by_phase: dict[str, int]
    elementwise: int
    activation_bytes: int


@dataclass(frozen=True)
class DrawSpec:
    """Random integers that a step takes, drawn anew for each of its runs from the replay memory's generator.

    Attributes:
        name: The input is ``draw.NAME``, int64.
        shape: Its shape; integers are drawn in row-major order.
        below: Each is in [0, below), with 1 <= below <= 2**32.
        step: ``learn``, ``refresh`` or ``adapt``.
    """

    name: str
    shape: tuple[int, ...]
    below: int
    step: str = "learn"

    @property
    def tensor(self) -> TensorSpec:
        """Spec of the input."""
        return TensorSpec(f"draw.{self.name}", self.shape, "int64")


@dataclass(frozen=True)
class ReplaySpec:
    """Replay memory: what one row holds, how many fit, and which row goes when it is full.

    Attributes:
        fields: One row's tensors as the step ``learn`` or ``track`` returns them (``row.NAME``), without a batch dimension. A field
            ``target`` comes from the loop: the sample's target (:meth:`TargetSpec.stored`) where that is no class index.
        rows_per_step: Rows drawn for one update.
        capacity_bytes: Budget for the whole memory, labels and bookkeeping included.
        policy: ``reservoir`` or ``largest-class``, of which ``learn`` gets rows by chance; ``ring`` or ``balanced``, of which ``adapt``
            gets all.
        seed: Key of the counter-based generator.
        counter: Words of the generator already drawn when the bundle was written.
        seen: Samples already offered to the memory when the bundle was written.
        reconstruction: Squared error of the calibration latents as rows hold them, over their square.
        draws: Random integers that ``learn``, ``refresh`` or ``adapt`` takes beside the rows, in the order in which they are drawn.
        in_file: Whether the rows lie in a file beside the store, not in memory.
    """

    fields: tuple[TensorSpec, ...]
    rows_per_step: int
    capacity_bytes: int
    policy: str
    seed: int
    counter: int = 0
    seen: int = 0
    reconstruction: float = 0.0
    draws: tuple[DrawSpec, ...] = ()
    in_file: bool = False


@dataclass(frozen=True)
class AdaptSpec:
    """When the loop runs ``adapt``, and when it goes back to the start.

    Attributes:
        every: Samples that enter the memory from one update to the next; 1 for methods without a memory, which adapt on every sample.
        reset: ``never``; ``every``: behind so many updates (``reset_every``); ``loss``: when the running mean of the loss falls below
            ``reset_below`` (a collapse, after which every sample is of one class).
        reset_every: Updates.
        reset_below: Loss.
    """

    every: int = 1
    reset: str = "never"
    reset_every: int = 0
    reset_below: float = 0.0


@dataclass(frozen=True)
class TaskSpec:
    """How the device keeps several tasks: each is a state of its own, but for what a stream carries from frame to frame.

    Attributes:
        first: Name of the task that the bundle's state is.
        fresh: State tensors that a new task starts with zeros; the others start as in the bundle.
    """

    first: str
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything the device needs to know about a bundle.

    Attributes:
        schema: Version of this structure.
        method: Registered name of the method, for instance ``ridge``.
        config: The method's hyperparameters.
        target: What a sample's target is.
        max_classes: Classes or labels that the state has room for; of real vectors the number of values.
        class_names: Names of the first classes; the others are free for new ones.
        steps: The steps by name; ``encode`` maps ``x`` to ``z``.
        state: Every state tensor.
        state_file: Initial state (safetensors).
        replay: Replay memory, if the method has one.
        replay_file: Initial replay rows (safetensors), if any.
        learning_rate: Default of the ``lr`` input.
        bundle_id: SHA-256 over method, config, graphs, initial state and rows: which stores belong to this bundle.
        log_capacity_bytes: Cap of the sample log, which bounds exact ``forget``.
        pending_capacity: Predictions that wait for a delayed label at most.
        forgets: Whether ``forget`` is exact and offered.
        ledger: Memory in bytes by name (see ``docs/costs.md``).
        files: Size and hash of every other file.
        versions: Versions of what wrote the bundle.
        engine: ``onnx`` or ``executorch``: which runtime the graphs are for.
        refresh_every: Updates after which the loop runs the step ``refresh``; 0 without one.
        adapt: When the loop runs the step ``adapt``; None without one.
        tasks: Set for methods whose whole state is one task's, of which the device may then keep several.
    """

    method: str
    config: dict[str, Any]
    target: TargetSpec
    max_classes: int
    class_names: tuple[str, ...]
    steps: dict[str, StepSpec]
    state: tuple[TensorSpec, ...]
    state_file: str
    bundle_id: str
    replay: ReplaySpec | None = None
    replay_file: str | None = None
    learning_rate: float = 0.0
    log_capacity_bytes: int = DEFAULT_LOG_BYTES
    pending_capacity: int = DEFAULT_PENDING
    forgets: bool = False
    ledger: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    engine: str = "onnx"
    refresh_every: int = 0
    adapt: AdaptSpec | None = None
    tasks: TaskSpec | None = None
    schema: int = SCHEMA

    @property
    def features(self) -> tuple[TensorSpec, ...]:
        """What ``encode`` gives of a sample: ``z``, or each ``z.NAME``."""
        return tuple(spec for spec in self.steps["encode"].outputs if spec.name != "finite")

    @property
    def stream(self) -> tuple[TensorSpec, ...]:
        """The state that ``encode`` carries from frame to frame; none but for streams."""
        return tuple(spec for spec in self.state if spec.name.startswith(STREAM))


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON text, keys in a fixed order, with its own SHA-256."""
    return json.dumps(sealed(dataclasses.asdict(manifest)), indent=1, sort_keys=True) + "\n"


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """A manifest's fields with ``manifest_sha256``: SHA-256 over the JSON of all others, keys sorted, no white space, ASCII.

    It tells damage and changes by hand; it is no signature, as anybody can compute it.

    >>> sealed({"schema": 1})["manifest_sha256"] == hashlib.sha256(b'{"schema":1}').hexdigest()
    True
    """
    others = {name: value for name, value in data.items() if name != MANIFEST_HASH}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return {**others, MANIFEST_HASH: hashlib.sha256(text.encode()).hexdigest()}


def from_json(text: str, where: str = MANIFEST) -> Manifest:
    """Parse and check the manifest: its schema, its own hash, its structure.

    Raises:
        SchemaError: when the manifest is of a newer schema.
        BundleError: when it is not JSON, was altered, or a field is missing, unknown or of a wrong type.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({error}); export the bundle again") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BundleError(f"{where}: schema must be a positive integer, got {schema!r}; export the bundle again")
    if schema > SCHEMA:
        raise SchemaError(
            f"{where}: schema is {schema}, this package reads up to {SCHEMA}; update edgecl on the device or export with an older one"
        )
    if data.get(MANIFEST_HASH) != sealed(data)[MANIFEST_HASH]:
        raise BundleError(f"{where}: does not match its own {MANIFEST_HASH}, the file was altered; copy or export the bundle again")
    del data[MANIFEST_HASH]
    if schema == 1 and data.get("target") == "class":
        data["target"] = {}
    return typing.cast(Manifest, _parse(Manifest, data, where))


def read_manifest(bundle: Path) -> Manifest:
    """Read ``manifest.json`` of a bundle folder.

    Raises:
        BundleError: when the folder or the file is missing or wrong.
    """
    path = Path(bundle) / MANIFEST
    try:
        if not path.is_file():
            raise BundleError(f"{path}: no manifest; pass the folder that edgecl export wrote")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy the bundle again") from error
    return from_json(text, str(path))


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Check size and SHA-256 of every file that the manifest names, and that there is no other.

    A graph may read any file beside it. So each one must be named; hidden ones, which file managers leave, may be there.

    Raises:
        BundleError: naming the first file that is missing or altered, or has no hash.
    """
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise BundleError(
                f"{MANIFEST}: files: names must be of letters, digits, '_', '-' and '.', at most 200, got {name[:80]!r}; export again"
            )
    inside = (path.relative_to(bundle) for path in Path(bundle).rglob("*") if not path.is_dir())
    there = [path.as_posix() for path in inside if not path.name.startswith(".")]
    used = [step.file for step in manifest.steps.values()] + [manifest.state_file, manifest.replay_file or manifest.state_file]
    for name in sorted({*used, *there} - {MANIFEST}):
        if name not in manifest.files:
            mend = "export the bundle again" if name in used else "move it elsewhere, or copy the bundle again"
            raise BundleError(f"{MANIFEST}: {name[:80]!r} has no entry in files, its content cannot be checked; {mend}")
    for name, entry in manifest.files.items():
        path = Path(bundle) / name
        if not path.is_file():
            raise BundleError(f"{path}: file is missing; copy the whole bundle again")
        if path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
            raise BundleError(f"{path}: SHA-256 differs from the manifest's, the file was altered; copy the bundle again")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(kind: Any, data: Any, where: str) -> Any:
    """``data`` as ``kind``, a type built of dataclasses, tuples, dicts, unions with None and JSON's own types."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin is types.UnionType:
        return None if data is None else _parse(args[0], data, where)
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(data, dict), where, "an object", data)
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        unknown = sorted(set(data) - {f.name for f in fields})
        _expect(not unknown, where, "no other fields", unknown)
        for f in fields:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            _expect(f.name in data or not required, where, f"a field {f.name!r}", sorted(data))
        make = typing.cast(typing.Callable[..., Any], kind)
        return make(**{name: _parse(hints[name], value, f"{where}: {name}") for name, value in data.items()})
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        return {key: _parse(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float:
        finite = isinstance(data, (int, float)) and not isinstance(data, bool) and abs(data) < 1e300
        _expect(finite, where, "a finite number", data)
        return float(data)
    _expect(type(data) is kind, where, f"a value of type {kind.__name__}", data)
    return data


def _expect(ok: bool, where: str, what: str, got: Any) -> None:
    if not ok:
        raise BundleError(f"{where}: expected {what}, got {str(got)[:80]}; export the bundle again")
