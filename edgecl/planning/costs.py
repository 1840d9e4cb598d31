"""What a candidate costs: certain lower bounds first, then the ledger of the graphs and files that an export would write."""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgecl.graph.capture import capture, capture_encode
from edgecl.graph.lowering import BuiltStep, build_step
from edgecl.learner import Learner
from edgecl.ledger import ledger, table_bytes
from edgecl.planning.latents import At, Latents, Unpacked
from edgecl.planning.space import Candidate, Depth
from edgecl.profiling import frozen_bytes
from edgecl_device.manifest import ReplaySpec, TensorSpec
from edgecl_device.memory import memory_layout

RAM = ("state", "state_second_buffers", "replay", "activations_peak", "inputs_outputs", "pending_features")
"""Entries of the ledger that ``--ram`` limits."""

FLASH = ("frozen_weights", "graphs", "state")
"""Entries of the ledger that ``--flash`` limits."""

LIMITS = ("ram", "flash", "macs")


@dataclass(frozen=True)
class Limits:
    """What a plan may cost; None is no limit.

    Attributes:
        ram: Most bytes of :data:`RAM`.
        flash: Most bytes of :data:`FLASH`.
        macs: Most multiply-accumulates of one sample: the trunk once, and one update.
    """

    ram: int | None = None
    flash: int | None = None
    macs: int | None = None

    def given(self) -> dict[str, int]:
        """The limits that there are."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def allow(self, costs: Mapping[str, int], but: str | None = None) -> bool:
        """Whether costs by name keep to every limit, or to all but one."""
        return all(costs[name] <= value for name, value in self.given().items() if name != but)


@dataclass(frozen=True)
class Costs:
    """Exact costs of a candidate.

    Attributes:
        ledger: Bytes by name, as in the manifest.
        macs_by_step: Canonical multiply-accumulates of every step.
        capacity_bytes: Of its replay memory, None without one.
        rows: Replay rows that fit into it.
    """

    ledger: dict[str, Any]
    macs_by_step: dict[str, int]
    capacity_bytes: int | None = None
    rows: int = 0

    def totals(self) -> dict[str, int]:
        """What the limits are about."""
        return {
            "ram": sum(self.ledger[name] for name in RAM),
            "flash": sum(self.ledger[name] for name in FLASH),
            "macs": self.macs_by_step["encode"] + self.macs_by_step["learn"],
        }


class Accountant:
    """Costs of candidates; what was found is kept.

    Args:
        x: Spec of one raw sample.
        engine: The runtime on the device.
        pending: Predictions kept for a delayed label.
        latents: Of the samples, for the codecs.
        base: Rows of the base samples among them.
    """

    def __init__(self, x: TensorSpec, engine: str, pending: int, latents: Latents, base: Any) -> None:
        self._x, self._engine, self._pending = x, engine, pending
        self._latents, self._base = latents, base
        self._encode: dict[At, BuiltStep] = {}
        self._exact: dict[Candidate, Costs] = {}

    @property
    def captured(self) -> int:
        """Candidates whose graphs were built."""
        return len(self._exact)

    def bound(self, depth: Depth, candidate: Candidate) -> dict[str, int]:
        """Costs that a candidate has at least, without any of its graphs: its state, its smallest replay memory, its features.

        Raises:
            InputError: when the method cannot work there.
        """
        learner = candidate.learner(depth)
        state = state_bytes(learner)
        replay = 0 if learner.replay is None else smallest(learner.replay, depth.problem.max_classes)
        features = _nbytes(depth.problem.features)
        return {
            "ram": state + replay + self._x.nbytes + (1 + self._pending) * features,
            "flash": state,
            "macs": depth.trunk_macs,
        }

    def tighter(self, depth: Depth, bound: Mapping[str, int]) -> dict[str, int]:
        """A bound with what the trunk's graph adds.

        Raises:
            GraphError: when the trunk cannot be captured.
        """
        encode = self.encode(depth)
        return {
            "ram": bound["ram"] + encode.plan.arena_bytes,
            "flash": bound["flash"] + frozen_bytes({"encode": encode}),
            "macs": encode.canonical.total_macs,
        }

    def encode(self, depth: Depth) -> BuiltStep:
        """The trunk's step, built once a depth."""
        if depth.at not in self._encode:
            self._encode[depth.at] = build_step(capture_encode(depth.trunk, self._x, depth.trunk.model), self._engine)
        return self._encode[depth.at]

    def exact(self, depth: Depth, candidate: Candidate) -> Costs:
        """The ledger of a candidate with its smallest replay memory, from its graphs as they are written.

        Raises:
            GraphError: when a step cannot be captured, lowered or written.
            InputError: when the method cannot work there.
        """
        if candidate not in self._exact:
            self._exact[candidate] = self._count(depth, candidate)
        return self._exact[candidate]

    def _count(self, depth: Depth, candidate: Candidate) -> Costs:
        from edgecl_export.targets import target_of  # flash is what an export writes; see pyproject.toml

        learner = candidate.learner(depth)
        if len(self._base):
            learner.calibrate(Unpacked(depth.problem.features)(torch.tensor(self._latents.at(depth.at)[self._base])))
        steps = {"encode": self.encode(depth), **{name: build_step(capture(learner, name), self._engine) for name in learner.steps}}
        with tempfile.TemporaryDirectory() as folder:
            written = target_of(self._engine).write(steps, Path(folder))
            files = sum(path.stat().st_size for path in Path(folder).iterdir())
        capacity, rows, classes = None, 0, depth.problem.max_classes
        if learner.replay is not None:
            capacity, rows = smallest(learner.replay, classes), least_rows(learner.replay, classes)
        found = ledger(
            steps,
            learner.init(),
            weight_bytes=written.weight_bytes,
            graph_bytes=files - written.weight_bytes,
            replay_bytes=(capacity or 0, 0),
            codebook_bytes=table_bytes(learner.codebooks),
            pending=self._pending,
        )
        return Costs(found, {name: step.canonical.total_macs for name, step in steps.items()}, capacity, rows)


def filled(costs: Costs, candidate: Candidate, depth: Depth, ram: int | None) -> tuple[Candidate, Costs]:
    """A candidate whose replay memory takes what a RAM limit leaves, or its configuration's capacity where there is no limit.

    Neither graphs nor state depend on the rows.

    Args:
        costs: With the smallest memory, within the limit.
        candidate: Whose they are.
        depth: Its place.
        ram: The limit.
    """
    if costs.capacity_bytes is None:
        return candidate, costs
    least = costs.ledger["replay"]
    room = candidate.config.capacity_bytes if ram is None else ram - costs.totals()["ram"] + least
    config = dataclasses.replace(candidate.config, capacity_bytes=max(room, least))
    larger = dataclasses.replace(candidate, config=config)
    spec = larger.learner(depth).replay
    assert spec is not None
    rows, nbytes = memory_layout(spec, depth.problem.max_classes)
    config = dataclasses.replace(config, capacity_bytes=nbytes)
    entries = {**costs.ledger, "replay": nbytes, "beyond_trunk": costs.ledger["beyond_trunk"] + nbytes - least}
    return dataclasses.replace(candidate, config=config), dataclasses.replace(costs, ledger=entries, capacity_bytes=nbytes, rows=rows)


def state_bytes(learner: Learner) -> int:
    """Bytes of a learner's state, without allocating what it makes."""
    with torch.device("meta"):
        return sum(tensor.numel() * tensor.element_size() for tensor in learner.init().values())


def least_rows(spec: ReplaySpec, classes: int) -> int:
    """The smallest memory worth its code: a row for every class, and for every row of an update."""
    return max(spec.rows_per_step, classes)


def smallest(spec: ReplaySpec, classes: int) -> int:
    """Bytes of the smallest memory of :func:`least_rows`, from the layouts of two larger ones.

    >>> spec = ReplaySpec((TensorSpec("z", (4,), "uint8"),), rows_per_step=2, capacity_bytes=0, policy="reservoir", seed=0)
    >>> smallest(spec, classes=10), memory_layout(dataclasses.replace(spec, capacity_bytes=240), classes=10)
    (240, (10, 240))
    """
    rows = least_rows(spec, classes)
    scale = 1024 * (sum(field.nbytes for field in spec.fields) + 64) * (rows + 1)
    some, more = (memory_layout(dataclasses.replace(spec, capacity_bytes=times * scale), classes) for times in (1, 2))
    row = (more[1] - some[1]) // (more[0] - some[0])
    return some[1] - (some[0] - rows) * row


def _nbytes(features: TensorSpec | Mapping[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in ([features] if isinstance(features, TensorSpec) else features.values()))
