"""What a candidate costs: certain lower bounds first, then the ledger of the graphs and files that an export would write."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgecl.graph.capture import capture, capture_encode
from edgecl.graph.lowering import BuiltStep, build_step
from edgecl.learner import Learner
from edgecl.ledger import ledger, table_bytes
from edgecl.planning.candidates import Candidate
from edgecl.planning.latents import At, Latents, Unpacked, specs_of
from edgecl.planning.limits import Costs
from edgecl.planning.space import Depth
from edgecl.profiling import frozen_bytes
from edgecl_device.manifest import ReplaySpec, TensorSpec
from edgecl_device.memory import memory_layout


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
        self._exact: dict[str, Costs] = {}

    def bound(self, depth: Depth, candidate: Candidate) -> dict[str, int]:
        """Costs that a candidate has at least, without any of its graphs: its state, its smallest replay memory, its features.

        Raises:
            InputError: when the method cannot work there.
        """
        learner = candidate.learner(depth)
        state = state_bytes(learner)
        replay = 0 if learner.replay is None else least_memory(candidate, learner.replay, depth.problem.max_classes)[1]
        features = sum(spec.nbytes for spec in specs_of(depth.problem.features).values())
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
        key = f"{candidate.family} { ({**dataclasses.asdict(candidate.config), 'capacity_bytes': None}) }"
        if key not in self._exact:
            self._exact[key] = self._count(depth, candidate)
        return self._exact[key]

    def _count(self, depth: Depth, candidate: Candidate) -> Costs:
        from edgecl_export.targets import target_of  # flash is what an export writes; see pyproject.toml

        learner = candidate.learner(depth)
        if len(self._base):
            learner.calibrate(Unpacked(depth.problem.features)(torch.tensor(self._latents.at(depth.at)[self._base])))
        steps = {"encode": self.encode(depth), **{name: build_step(capture(learner, name), self._engine) for name in learner.steps}}
        with tempfile.TemporaryDirectory() as folder:
            written = target_of(self._engine).write(steps, Path(folder))
            files = sum(path.stat().st_size for path in Path(folder).iterdir())
        rows, capacity = 0, None
        if learner.replay is not None:
            rows, capacity = least_memory(candidate, learner.replay, depth.problem.max_classes)
        found = ledger(
            steps,
            learner.init(),
            weight_bytes=written.weight_bytes,
            graph_bytes=files - written.weight_bytes,
            replay_bytes=(capacity or 0, 0),
            codebook_bytes=table_bytes(learner.codebooks),
            pending=self._pending,
            target=depth.problem.target.stored(depth.problem.max_classes),
        )
        return Costs(found, {name: step.canonical.total_macs for name, step in steps.items()}, capacity, rows, learner.refresh_every)


def resized(costs: Costs, candidate: Candidate, depth: Depth, room: int, most_rows: int) -> tuple[Candidate, Costs]:
    """A candidate with a replay memory of another size; neither graphs nor state depend on its rows.

    Args:
        costs: With the smallest memory.
        candidate: Whose they are.
        depth: Its place.
        room: Most bytes of the memory; the smallest one is kept where they do not suffice.
        most_rows: Rows beyond which a memory does not grow.
    """
    spec, classes = candidate.learner(depth).replay, depth.problem.max_classes
    if spec is None or not candidate.sizes_memory:
        return candidate, costs
    least = costs.ledger["replay"]
    most = memory_of(spec, max(most_rows, least_rows(spec, classes)), classes)
    capacity = min(max(room, least), most)
    rows, nbytes = memory_layout(dataclasses.replace(spec, capacity_bytes=capacity), classes)
    config = dataclasses.replace(candidate.config, capacity_bytes=nbytes)
    entries = {**costs.ledger, "replay": nbytes, "beyond_trunk": costs.ledger["beyond_trunk"] + nbytes - least}
    return dataclasses.replace(candidate, config=config), dataclasses.replace(costs, ledger=entries, rows=rows, capacity_bytes=nbytes)


def state_bytes(learner: Learner) -> int:
    """Bytes of a learner's state, without allocating what it makes."""
    with torch.device("meta"):
        return table_bytes(learner.init().values())


def least_rows(spec: ReplaySpec, classes: int) -> int:
    """The smallest memory worth its code: a row for every class, and for every row of an update."""
    return max(spec.rows_per_step, classes)


def least_memory(candidate: Candidate, spec: ReplaySpec, classes: int) -> tuple[int, int]:
    """Rows and bytes of a candidate's smallest memory; of its own, where its configuration cannot size it."""
    if not candidate.sizes_memory:
        return memory_layout(spec, classes)
    rows = least_rows(spec, classes)
    return rows, memory_of(spec, rows, classes)


def memory_of(spec: ReplaySpec, rows: int, classes: int) -> int:
    """Bytes of a memory of so many rows, from the layouts of two larger ones.

    >>> spec = ReplaySpec((TensorSpec("z", (4,), "uint8"),), rows_per_step=2, capacity_bytes=0, policy="reservoir", seed=0)
    >>> memory_of(spec, 10, classes=10), memory_layout(dataclasses.replace(spec, capacity_bytes=240), classes=10)
    (240, (10, 240))
    """
    drawn = sum(draw.tensor.nbytes for draw in spec.draws)
    scale = 2 * ((spec.rows_per_step + 1) * (sum(field.nbytes for field in spec.fields) + 64) + 8 * classes + drawn + 64)
    some, more = (memory_layout(dataclasses.replace(spec, capacity_bytes=times * scale), classes) for times in (1, 2))
    row = (more[1] - some[1]) // (more[0] - some[0])
    return some[1] - (some[0] - rows) * row
