"""What a learner costs before anything is exported: MACs by step and phase, memory in bytes, and where a model can be cut."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.codecs.product import MOST_CENTROIDS
from edgecl.graph.capture import capture_encode
from edgecl.graph.cost import Work, work_by_node
from edgecl.graph.lowering import BuiltStep, build
from edgecl.graph.passes import Clean
from edgecl.learner import dtype_name
from edgecl.ledger import ledger, table_bytes
from edgecl.prepare import Prepared
from edgecl.splitting import Split, SplitError, split
from edgecl.trees import flatten_tree
from edgecl_device.manifest import DEFAULT_PENDING, TensorSpec


@dataclass(frozen=True)
class StepProfile:
    """Cost of one step.

    Attributes:
        step: Its name.
        canonical: Multiply-accumulates of the mathematics by phase.
        layers: The same by module path and phase; the method's own algebra has no module and the empty path.
        executed: Multiply-accumulates of the graph that ships, by phase.
        elementwise: Elementwise operations of the graph that ships.
        activation_bytes: Planned peak of its intermediate tensors.
    """

    step: str
    canonical: dict[str, int]
    layers: dict[str, dict[str, int]]
    executed: dict[str, int]
    elementwise: int
    activation_bytes: int

    @property
    def canonical_macs(self) -> int:
        """All phases."""
        return sum(self.canonical.values())

    @property
    def executed_macs(self) -> int:
        """All phases."""
        return sum(self.executed.values())


@dataclass(frozen=True)
class Profile:
    """Cost of a learner.

    Attributes:
        method: Name of the method.
        config: Its hyperparameters.
        features: Shape of each tensor that the trunk hands over, with its name.
        steps: ``encode`` first.
        ledger: Memory in bytes by name, as in the manifest. ``frozen_weights`` is the sum of the distinct frozen tensors:
            the bundle's weight file adds padding. Sizes of graph files are not in it.
        reconstruction: Squared error of the first base samples' latents as replay rows hold them, over their square; None before ``fit``.
        refresh_every: Updates that share one run of the step ``refresh``; 0 without one.
        adapt_every: Samples that share one run of the step ``adapt``.
    """

    method: str
    config: dict[str, Any]
    features: dict[str, tuple[int, ...]]
    steps: tuple[StepProfile, ...]
    ledger: dict[str, Any]
    reconstruction: float | None = None
    refresh_every: int = 0
    adapt_every: int = 1


def profile(prepared: Prepared, engine: str = "onnx", pending: int = DEFAULT_PENDING) -> Profile:
    """Cost of every step and the memory ledger, counted on the graphs that an export would write.

    Args:
        prepared: A learner; it need not have seen base samples and is left as it is. A codec without a range gets a
            made-up one, which changes no count.
        engine: The runtime on the device.
        pending: Predictions that may wait for a delayed label.

    Raises:
        InputError: when there is no such engine.
        GraphError: when a step cannot be captured or lowered, with its place in the model.

    >>> import numpy as np
    >>> from edgecl.prepare import prepare
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> found = profile(prepare(net, at="1", example=np.zeros((1, 4), np.float32), method="ncm", classes=2))
    >>> found.steps[0].step, found.steps[0].canonical, found.ledger["state"]
    ('encode', {'encode': 12}, 40)
    """
    ready = _calibrated(prepared)
    steps = build(ready, engine)
    memory = prepared.memory
    found = ledger(
        steps,
        prepared.state,
        weight_bytes=frozen_bytes(steps),
        graph_bytes=0,
        replay_bytes=(0 if memory is None else memory.nbytes, 0),
        codebook_bytes=table_bytes(ready.learner.codebooks),
        pending=pending,
        target=prepared.learner.problem.target.stored(prepared.learner.problem.max_classes),
    )
    del found["graphs"]
    found["not_counted"] += ", graph files and padding of the weight file (known after export)"
    learner = prepared.learner
    return Profile(
        learner.name,
        learner.config_dict(),
        {name: tuple(spec.shape) for name, spec in flatten_tree({"z": learner.problem.features}).items()},
        tuple(
            StepProfile(name, step.canonical.macs, step.layers, step.executed.macs, step.executed.elementwise, step.plan.arena_bytes)
            for name, step in steps.items()
        ),
        found,
        prepared.reconstruction if prepared.examples else None,
        learner.refresh_every,
        1 if learner.adaptation is None else learner.adaptation.every,
    )


def frozen_bytes(steps: Mapping[str, BuiltStep]) -> int:
    """Bytes of the frozen tensors of all steps; equal ones count once, as they are stored once."""
    sizes = {}
    for step in steps.values():
        for tensor in step.graph.constants().values():
            data = tensor.contiguous().cpu().numpy()
            sizes[hashlib.sha256(data.tobytes()).digest()] = data.nbytes
    return sum(sizes.values())


def _calibrated(prepared: Prepared) -> Prepared:
    if prepared.examples or prepared.memory is None:
        return prepared
    ready = copy.copy(prepared)
    ready.learner = learner = copy.deepcopy(prepared.learner)
    generator = torch.Generator().manual_seed(0)
    features = flatten_tree({"z": learner.problem.features})
    count = max(-(-MOST_CENTROIDS // prod(spec.shape[2:])) for spec in features.values())  # a codec may want as many positions
    made_up = {name.removeprefix("z."): torch.rand(count, *spec.shape[1:], generator=generator) for name, spec in features.items()}
    learner.calibrate(made_up["z"] if list(made_up) == ["z"] else made_up)
    return ready


@dataclass(frozen=True)
class SplitPoint:
    """A place where a model can be cut.

    Attributes:
        at: Name of the last module of the trunk.
        features: Shape of each tensor that crosses the cut.
        trunk_macs: Multiply-accumulates of one pass through the trunk.
        suffix_macs: The same for the rest.
        trunk_parameters: Parameters before the cut.
        suffix_parameters: Parameters behind it.
    """

    at: str
    features: tuple[tuple[int, ...], ...]
    trunk_macs: int
    suffix_macs: int
    trunk_parameters: int
    suffix_parameters: int


def split_points(model: nn.Module, x: Tensor, *, depth: int = 2, progress: Callable[[int, int], None] | None = None) -> list[SplitPoint]:
    """Where a model can be cut, in the order of execution.

    Args:
        model: Any module that ``torch.fx`` can trace.
        x: One input [1, ...] as the model takes it.
        depth: Longest name, in parts: 2 lists ``layer1`` and ``layer1.0`` but not ``layer1.0.conv1``.
        progress: Called with the names tried and in all.

    Returns:
        One point for each cut; of several names for one cut, the shortest. Names where the model cannot be cut (called
        twice, or with nothing behind them) are left out.

    Raises:
        SplitError: when the model cannot be traced at all, or no module of it can be cut at.
        GraphError: when the model cannot be captured, or has an operator that cannot be counted.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(p.at, p.features, p.trunk_macs, p.suffix_macs) for p in split_points(net, torch.zeros(1, 4))]
    [('0', ((1, 3),), 12, 6), ('1', ((1, 3),), 12, 6)]
    """
    whole = copy.deepcopy(model).eval().requires_grad_(False)
    work = _work(whole, x)
    paths = [str((w.node.meta.get("custom") or {}).get("module") or "") for w in work]
    names = [name for name, _ in whole.named_modules() if name and name.count(".") < depth]
    cuts: dict[int, tuple[str, Split]] = {}
    for tried, name in enumerate(names):
        if progress is not None:
            progress(tried, len(names))
        inside = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
        if inside and inside[-1] in cuts:
            continue  # a container comes before its children and has the shorter name
        try:
            parts = split(whole, name)
        except SplitError:
            continue
        # dropout and the like compute nothing in eval mode, yet their name is a place
        end = inside[-1] if inside else len(_work(parts.trunk, x)) - 1
        cuts.setdefault(end, (name, parts))
    if not cuts:
        split(whole, names[0] if names else "")  # raises, and says why
    points = []
    for end, (name, parts) in sorted(cuts.items()):
        before, behind = (sum(w.macs for w in some) for some in (work[: end + 1], work[end + 1 :]))
        points.append(SplitPoint(name, _feature_shapes(parts, x), before, behind, _parameters(parts.trunk), _parameters(parts.suffix)))
    return points


def _work(model: nn.Module, x: Tensor) -> list[Work]:
    """Cost of every operator of a model in the order in which they run."""
    spec = TensorSpec("x", tuple(x.shape), dtype_name(x.dtype))
    return work_by_node(Clean()(capture_encode(model, spec)))


def _feature_shapes(parts: Split, x: Tensor) -> tuple[tuple[int, ...], ...]:
    with torch.no_grad():
        z = parts.trunk(x)
    return tuple(tuple(t.shape) for t in ([z] if isinstance(z, Tensor) else z.values()))


def _parameters(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())
