"""The bundle writer: graphs, shared weights, initial state and rows, and the manifest that ties them together.

A bundle is written beside its destination, checked by every gate of :mod:`edgecl_export.verify`, and only then moved
into place: a failed export leaves nothing behind and an existing bundle untouched.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from edgecl.graph.lowering import BuiltStep, build, within
from edgecl.ledger import RAM, ledger, ram_bytes, state_specs, table_bytes
from edgecl.prepare import Prepared
from edgecl_device.checks import as_int, as_path, short
from edgecl_device.errors import BundleError, InputError
from edgecl_device.manifest import (
    DEFAULT_LOG_BYTES,
    DEFAULT_PENDING,
    MANIFEST,
    FileEntry,
    Manifest,
    ReplaySpec,
    StepSpec,
    TaskSpec,
    read_manifest,
    sha256_file,
    to_json,
)
from edgecl_device.memory import memory_bytes
from edgecl_export.place import place
from edgecl_export.targets import Target, target_of
from edgecl_export.verify import Gate, verify

STATE_FILE = "state.safetensors"
REPLAY_FILE = "replay.safetensors"
FIRST_TASK = "base"
"""Name of the task that is the bundle's own state, for methods with tasks."""
SCRATCH = ".edgecl-new-"
"""Start of the scratch folder's name; the destination's own name with more before it could be too long for the file system."""


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        path: The bundle's folder.
        manifest: Its manifest.
        gates: What every check found.
    """

    path: Path
    manifest: Manifest
    gates: tuple[Gate, ...]


def export(
    prepared: Prepared,
    path: str | Path,
    *,
    engine: str = "onnx",
    overwrite: bool = False,
    log_capacity_bytes: int = DEFAULT_LOG_BYTES,
    pending_capacity: int = DEFAULT_PENDING,
    ram_budget_bytes: int = 128 << 20,
    rows_in_file: bool = False,
) -> Exported:
    """Write a bundle and check it.

    Args:
        prepared: What :func:`edgecl.prepare.prepare` returned, after ``fit``.
        path: Folder to make.
        engine: ``onnx`` or ``executorch``, the runtime on the device.
        overwrite: Replace an existing bundle; a folder that holds anything else is refused.
        log_capacity_bytes: Cap of the device's sample log, which bounds exact ``forget``.
        pending_capacity: Predictions that may wait for a delayed label.
        ram_budget_bytes: What the learner may take of the device's RAM: the sum over :data:`edgecl.ledger.RAM` of the manifest's ledger.
            A step whose activations do not fit into what is left for them computes cheap ones again instead of keeping them; executed
            costs count that.
        rows_in_file: Keep the replay rows in a file beside the store (``Learner.load(..., rows=)``): for memories beyond the device's RAM.

    Raises:
        InputError: when an argument does not fit, the folder exists or cannot be written, the method is for the host only, or the
            budget is exceeded.
        GraphError: when a step cannot be captured or has no translation, with its place in the model.
        ExportError: when a gate fails; nothing is written.
    """
    if not isinstance(prepared, Prepared):
        raise InputError(f"prepared: must be what edgecl.prepare returned, got {type(prepared).__name__}; call prepare(model, ...) first")
    destination = as_path("path", path).resolve()
    log_capacity_bytes = _at_least("log_capacity_bytes", log_capacity_bytes, 1)
    pending_capacity = _at_least("pending_capacity", pending_capacity, 1)
    ram_budget_bytes = _at_least("ram_budget_bytes", ram_budget_bytes, 0)
    target = target_of(engine)
    if rows_in_file and prepared.memory is None:
        raise InputError(f"rows_in_file: must be False for {prepared.learner.name}, which stores no rows, got True; leave it out")
    if rows_in_file and prepared.learner.tasks:
        raise InputError(
            f"rows_in_file: must be False for {prepared.learner.name}, whose rows are those of one task, got True; leave it out"
        )
    if prepared.learner.host_only:
        raise InputError(f"method: {prepared.learner.name!r} trains offline and has no step for the device; export another method")
    with _writing(destination):
        _check_free(destination, overwrite)
    steps = build(prepared, engine)
    graphs = {name: _graph_hash(step) for name, step in steps.items()}  # of any budget: what is computed again is the same to the bit
    replay, replay_bytes = _replay(prepared, rows_in_file)
    part = partial(_ledger, prepared, replay_bytes=replay_bytes, pending=pending_capacity)
    others = part(steps, 0, 0)
    room = ram_budget_bytes - (ram_bytes(others) - others["activations_peak"])
    steps = {name: within(step, room) for name, step in steps.items()} if room >= 0 else steps
    _check_budget(part(steps, 0, 0), ram_budget_bytes)
    with _writing(destination):
        # Missing parents are made last: a failed export leaves none behind.
        nearest = next(parent for parent in destination.parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=nearest, prefix=SCRATCH) as scratch:
            folder = Path(scratch) / "bundle"
            folder.mkdir()
            manifest = _write(prepared, engine, target, steps, folder, log_capacity_bytes, pending_capacity, replay, part, graphs)
            gates = verify(folder, manifest, prepared, steps)
            _check_free(destination, overwrite)  # the gates take time
            destination.parent.mkdir(parents=True, exist_ok=True)
            place(folder, destination)
    return Exported(destination, manifest, gates)


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    """Name the destination in whatever the file system has against it."""
    try:
        yield
    except OSError as error:
        why = f"{short(str(destination))} cannot be written ({error.strerror or error})"
        raise InputError(f"path: {why}; choose another folder, or make room and mend its permissions") from error


def _check_free(destination: Path, overwrite: bool) -> None:
    """Check that nothing is there, or a bundle and nothing else that may be replaced."""
    if not destination.exists():
        if not next(parent for parent in destination.parents if parent.exists()).is_dir():
            raise InputError(f"path: {destination} lies behind a file; choose another folder")
        return
    if not overwrite:
        raise InputError(f"path: {destination} exists; choose another folder or pass overwrite=True")
    if Path.cwd().is_relative_to(destination):
        raise InputError(f"path: {destination} is or holds the working directory; choose another folder")
    try:
        manifest = read_manifest(destination)
    except BundleError as error:
        raise InputError(f"path: {destination} exists; choose another folder, this one holds no bundle ({error})") from error
    others = sorted({p.name for p in destination.iterdir()} - {MANIFEST, *manifest.files})
    if others:
        raise InputError(f"path: {destination} holds {others}, which are not the bundle's; move them, or choose another folder")


def _at_least(name: str, value: Any, least: int) -> int:
    number = as_int(name, value)
    if number < least:
        raise InputError(f"{name}: must be at least {least}, got {number}; leave it out for the default")
    return number


def _check_budget(found: Mapping[str, Any], budget: int) -> None:
    parts = {name: found[name] for name in RAM}
    if sum(parts.values()) > budget:
        raise InputError(
            f"ram_budget_bytes (--ram-budget): must be at least {sum(parts.values()):,}, the sum of "
            f"{', '.join(f'{name} {size:,}' for name, size in parts.items())}, got {budget:,}; cut where the features are smaller, "
            "take a smaller replay memory or keep its rows in a file (rows_in_file), fewer pending predictions (pending_capacity), or "
            "raise the budget"
        )


def _replay(prepared: Prepared, rows_in_file: bool) -> tuple[ReplaySpec | None, tuple[int, int]]:
    """What the manifest says of the replay memory, and the bytes of its arrays and of its file."""
    memory = prepared.memory
    if memory is None:
        return None, (0, 0)
    replay = dataclasses.replace(
        memory.spec,
        counter=memory.generator.counter,
        seen=memory.seen,
        reconstruction=prepared.reconstruction,
        in_file=rows_in_file,
    )
    return replay, memory_bytes(replay, prepared.learner.problem.max_classes)


def _ledger(
    prepared: Prepared, steps: Mapping[str, BuiltStep], weight_bytes: int, graph_bytes: int, *, replay_bytes: tuple[int, int], pending: int
) -> dict[str, Any]:
    return ledger(
        steps,
        prepared.state,
        weight_bytes=weight_bytes,
        graph_bytes=graph_bytes,
        replay_bytes=replay_bytes,
        codebook_bytes=table_bytes(prepared.learner.codebooks),
        pending=pending,
        target=prepared.learner.problem.target.stored(prepared.learner.problem.max_classes),
    )


def _write(
    prepared: Prepared,
    engine: str,
    target: Target,
    steps: Mapping[str, BuiltStep],
    folder: Path,
    log_capacity_bytes: int,
    pending_capacity: int,
    replay: ReplaySpec | None,
    part: Callable[[Mapping[str, BuiltStep], int, int], dict[str, Any]],
    graphs: Mapping[str, str],
) -> Manifest:
    learner = prepared.learner
    written = target.write(steps, folder)
    files = written.steps
    all_bytes = sum(path.stat().st_size for path in folder.iterdir())
    (folder / STATE_FILE).write_bytes(save({name: tensor.detach().contiguous().numpy() for name, tensor in prepared.state.items()}))
    if prepared.memory is not None:
        (folder / REPLAY_FILE).write_bytes(save(prepared.memory.rows_by_name()))
    memory_ledger = part(steps, written.weight_bytes, all_bytes - written.weight_bytes)
    if written.planned_bytes is not None:
        memory_ledger["runtime_plan"] = written.planned_bytes
    specs = state_specs(prepared.state)
    config = json.loads(json.dumps(learner.config_dict()))
    # Every step's graph counts: a store's state and rows mean something else behind another frozen layer or another codec range.
    contents = {p.name: FileEntry(sha256_file(p), p.stat().st_size) for p in sorted(folder.iterdir())}
    start = [contents[name].sha256 for name in (STATE_FILE, REPLAY_FILE) if name in contents]
    kind = learner.problem.target
    if kind.kind == "multilabel":  # on the device its threshold is one of scores
        kind = dataclasses.replace(kind, threshold=learner.threshold(kind.threshold))
    in_file = ["rows in file"] if replay and replay.in_file else []
    identity = [learner.name, config, learner.problem.max_classes, dict(graphs), start, *in_file]
    if kind.kind != "class":  # bundles of classes keep the identity that they had before there were other kinds, and so their stores
        identity.append(dataclasses.asdict(kind))
    manifest = Manifest(
        method=learner.name,
        config=config,
        target=kind,
        max_classes=learner.problem.max_classes,
        class_names=prepared.known_names(),
        steps={name: _step_spec(files[name], step) for name, step in steps.items()},
        state=specs,
        state_file=STATE_FILE,
        replay=replay,
        replay_file=REPLAY_FILE if replay else None,
        learning_rate=learner.default_lr,
        bundle_id=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        log_capacity_bytes=log_capacity_bytes,
        pending_capacity=pending_capacity,
        forgets=learner.forgets_exactly,
        ledger=memory_ledger,
        files=contents,
        engine=engine,
        refresh_every=learner.refresh_every,
        adapt=learner.adaptation,
        tasks=TaskSpec(FIRST_TASK, learner.fresh) if learner.tasks else None,
        versions={name: version(name) for name in ("edgecl", "torch", *target.packages)},
    )
    (folder / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    return manifest


def _step_spec(file: str, step: BuiltStep) -> StepSpec:
    graph = step.graph
    return StepSpec(
        file=file,
        inputs=tuple(p.spec for p in graph.inputs if p.kind == "data"),
        state_in=tuple(p.name for p in graph.inputs if p.kind == "state"),
        outputs=tuple(p.spec for p in graph.outputs if p.kind == "data"),
        state_out=tuple(p.name for p in graph.outputs if p.kind == "state"),
        canonical_macs=step.canonical.total_macs,
        executed_macs=step.executed.total_macs,
        macs_by_phase=step.canonical.macs,
        elementwise=step.executed.elementwise,
        activation_bytes=step.plan.arena_bytes,
    )


def _graph_hash(step: BuiltStep) -> str:
    """SHA-256 over a lowered graph: its operators, their arguments and every frozen tensor."""
    digest = hashlib.sha256()
    constants = step.graph.constants()
    for node in step.graph.nodes:
        digest.update(f"{node.op} {node.target} {node.args} {node.kwargs}".encode())
    for name, tensor in constants.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
