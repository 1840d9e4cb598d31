"""The bundle writer: graphs, shared weights, initial state and rows, and the manifest that ties them together.

A bundle is written beside its destination, checked by every gate of :mod:`edgecl_export.verify`, and only then moved
into place: a failed export leaves nothing behind and an existing bundle untouched.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from safetensors.numpy import save

from edgecl.graph.lowering import BuiltStep, build
from edgecl.ledger import ledger, state_specs
from edgecl.prepare import Prepared
from edgecl_device.errors import InputError
from edgecl_device.manifest import MANIFEST, FileEntry, Manifest, StepSpec, sha256_file, to_json
from edgecl_export.onnx import Emitter, WeightFile
from edgecl_export.verify import Gate, verify

STATE_FILE = "state.safetensors"
REPLAY_FILE = "replay.safetensors"
WEIGHT_FILE = "weights.bin"


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
    overwrite: bool = False,
    log_capacity_bytes: int = 16 << 20,
    pending_capacity: int = 256,
    ram_budget_bytes: int = 128 << 20,
) -> Exported:
    """Write a bundle and check it.

    Args:
        prepared: What :func:`edgecl.prepare.prepare` returned, after ``fit``.
        path: Folder to make.
        overwrite: Replace an existing bundle.
        log_capacity_bytes: Cap of the device's sample log, which bounds exact ``forget``.
        pending_capacity: Predictions that may wait for a delayed label.
        ram_budget_bytes: What the state, held twice, and the replay memory may take on the device.

    Raises:
        InputError: when the folder exists, the method is for the host only, or state and replay exceed the budget.
        GraphError: when a step cannot be captured or has no translation, with its place in the model.
        ExportError: when a gate fails; nothing is written.
    """
    destination = Path(path)
    if destination.exists() and not (overwrite and (destination / MANIFEST).is_file()):
        mend = ", this one holds no bundle" if overwrite else " or pass overwrite=True"
        raise InputError(f"path: {destination} exists; choose another folder{mend}")
    if prepared.learner.name == "joint":
        raise InputError("method: 'joint' trains offline and has no step for the device; export another method")
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in prepared.state.values())
    needed = 2 * state_bytes + (prepared.memory.nbytes if prepared.memory is not None else 0)
    if needed > ram_budget_bytes:
        raise InputError(
            f"ram_budget_bytes: state twice and replay take {needed:,} bytes, the budget is {ram_budget_bytes:,}; "
            "split where the features are smaller, or raise the budget"
        )
    steps = build(prepared)
    # Missing parents are made last: a failed export leaves none behind.
    nearest = next(parent for parent in destination.parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=nearest, prefix=f".{destination.name}-") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        manifest = _write(prepared, steps, folder, log_capacity_bytes, pending_capacity)
        gates = verify(folder, manifest, prepared, steps)
        if destination.exists():
            shutil.rmtree(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(destination)
    return Exported(destination, manifest, gates)


def _write(prepared: Prepared, steps: Mapping[str, BuiltStep], folder: Path, log_capacity_bytes: int, pending_capacity: int) -> Manifest:
    learner, memory = prepared.learner, prepared.memory
    weights = WeightFile(folder / WEIGHT_FILE)
    files = {}
    for name, step in steps.items():
        files[name] = f"{name}.onnx"
        model = Emitter(step.graph, weights).emit()
        (folder / files[name]).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    weights.close()
    (folder / STATE_FILE).write_bytes(save({name: tensor.detach().cpu().numpy() for name, tensor in prepared.state.items()}))
    replay = None
    if memory is not None:
        (folder / REPLAY_FILE).write_bytes(save(memory.rows_by_name()))
        spec = memory.spec
        replay = dataclasses.replace(spec, counter=memory.generator.counter, seen=memory.seen)
    graph_bytes = sum((folder / name).stat().st_size for name in files.values())
    memory_ledger = ledger(
        steps,
        prepared.state,
        weight_bytes=(folder / WEIGHT_FILE).stat().st_size,
        graph_bytes=graph_bytes,
        replay_bytes=memory.nbytes if memory is not None else 0,
        pending=pending_capacity,
    )
    trunk_hash = _graph_hash(steps["encode"])
    specs = state_specs(prepared.state)
    config = json.loads(json.dumps(learner.config_dict()))
    # Every step counts: a store's state and rows mean something else behind another frozen layer or another codec range.
    graphs = {name: _graph_hash(step) for name, step in steps.items()}
    contents = {p.name: FileEntry(sha256_file(p), p.stat().st_size) for p in sorted(folder.iterdir())}
    start = [contents[name].sha256 for name in (STATE_FILE, REPLAY_FILE) if name in contents]
    identity = [learner.name, config, learner.problem.max_classes, graphs, start]
    manifest = Manifest(
        method=learner.name,
        config=config,
        target=learner.problem.target,
        max_classes=learner.problem.max_classes,
        class_names=prepared.known_names(),
        steps={name: _step_spec(files[name], step) for name, step in steps.items()},
        state=specs,
        state_file=STATE_FILE,
        replay=replay,
        replay_file=REPLAY_FILE if replay else None,
        learning_rate=learner.default_lr,
        trunk_hash=trunk_hash,
        bundle_id=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        log_capacity_bytes=log_capacity_bytes,
        pending_capacity=pending_capacity,
        forgets=learner.forgets_exactly,
        ledger=memory_ledger,
        files=contents,
        versions={name: version(name) for name in ("edgecl", "torch", "onnx-ir", "onnxruntime")},
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
