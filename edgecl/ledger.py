"""Memory of a learner in bytes, by what it is for. What cannot be known before a runtime loads is named, not guessed."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from edgecl.graph.lowering import BuiltStep
from edgecl.graph.memory import kept_for_backward
from edgecl.learner import State, dtype_name
from edgecl_device.adapt_checks import ADAPT, TRACK
from edgecl_device.manifest import TensorSpec

RAM = ("state", "state_second_buffers", "adaptation_start", "replay", "activations_peak", "inputs_outputs", "pending_features")
"""Entries that are written on the device and so lie in RAM: what every limit on RAM is about, in export, runs and plans.

Frozen weights are read only, and count as flash; a runtime may copy them into RAM."""

MASKS = ("bool", "int8")
"""Types of the masks that an update keeps: of comparisons, or packed (:mod:`edgecl.graph.passes.masks`)."""

NOT_COUNTED = (
    "runtime scratch, packed copies of frozen weights, the runtime's own code; the log's RAM without a store; "
    "copies of state and replay rows made by save, close, forget, relabel, rollback and a learn that finds the log full; "
    "of replay rows in a file those that changed since the last snapshot; of a method with tasks the state that new ones start from"
)


def ledger(
    steps: Mapping[str, BuiltStep],
    state: State,
    *,
    weight_bytes: int,
    graph_bytes: int,
    replay_bytes: tuple[int, int],
    codebook_bytes: int,
    pending: int,
    target: TensorSpec | None,
) -> dict[str, Any]:
    """Bytes by name.

    Args:
        steps: The lowered steps.
        state: The learner's state.
        weight_bytes: Size of the file of frozen weights.
        graph_bytes: Size of all graph files.
        replay_bytes: Size of the replay memory's arrays, and of its file of rows, if it has one.
        codebook_bytes: Size of the replay codecs' tables.
        pending: Predictions kept for a delayed label.
        target: What the log keeps of a target behind the features (:meth:`edgecl_device.manifest.TargetSpec.stored`), or None.

    Returns:
        ``frozen_weights``, of which ``codebooks``, ``graphs``, ``state``, ``state_second_buffers``, ``adaptation_start`` (what a reset goes
        back to), ``activations_peak``, of which ``kept_for_backward``, of which ``kept_masks``, ``replay``, ``replay_file``,
        ``inputs_outputs``, ``pending_features``: RAM but for ``graphs`` and ``replay_file``;
        ``logged_features_per_update``: features of one sample, a target that is no class index, and a stream's state, as the log holds
        them, to which the store adds its own (``LearnReport.bytes_written`` is what it measured); ``beyond_trunk``: state once, replay with
        its file, and codebooks; ``not_counted``.
    """
    written = {p.name for step in steps.values() for p in step.graph.outputs if p.kind == "state"}
    adapting = [step.graph for name, step in steps.items() if name in (TRACK, ADAPT)]
    adapted = {p.name for graph in adapting for p in graph.outputs if p.kind == "state"}
    state_bytes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    encoded = steps["encode"].graph.outputs
    features = sum(p.spec.nbytes for p in encoded if p.kind == "data" and p.name != "finite")
    stream = sum(p.spec.nbytes for p in encoded if p.kind == "state")
    kept = max((kept_for_backward(step.graph) for step in steps.values()), key=lambda by_type: sum(by_type.values()))
    ports = [p.spec.nbytes for step in steps.values() for p in (*step.graph.inputs, *step.graph.outputs) if p.kind == "data"]
    return {
        "frozen_weights": weight_bytes,
        "codebooks": codebook_bytes,
        "graphs": graph_bytes,
        "state": sum(state_bytes.values()),
        "state_second_buffers": sum(size for name, size in state_bytes.items() if name in written),
        "adaptation_start": sum(size for name, size in state_bytes.items() if name in adapted),
        "activations_peak": max(step.plan.arena_bytes for step in steps.values()),
        "kept_for_backward": sum(kept.values()),
        "kept_masks": sum(kept.get(kind, 0) for kind in MASKS),
        "replay": replay_bytes[0],
        "replay_file": replay_bytes[1],
        "inputs_outputs": sum(ports),
        "pending_features": pending * features,
        "logged_features_per_update": features + stream + (0 if target is None else target.nbytes),
        "beyond_trunk": sum(state_bytes.values()) + sum(replay_bytes) + codebook_bytes,
        "not_counted": NOT_COUNTED,
    }


def ram_bytes(found: Mapping[str, Any]) -> int:
    """RAM of a ledger: the sum over :data:`RAM`."""
    return sum(found[name] for name in RAM)


def state_specs(state: State) -> tuple[TensorSpec, ...]:
    """Specs of every state tensor, in the state's order."""
    return tuple(TensorSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in state.items())


def table_bytes(tables: Iterable[Tensor]) -> int:
    """Bytes of tensors: of frozen tables, or of a state."""
    return sum(table.numel() * table.element_size() for table in tables)
