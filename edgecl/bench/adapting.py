"""What ``edgecl bench tta`` compares, and how each is measured: in batches as published, and sample by sample on the device's loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecl.engine import on_device, parts_on, running_on
from edgecl.learner import Learner, State
from edgecl.methods import METHODS
from edgecl.methods._adapt import AdaptiveLearner
from edgecl.methods._norms import ROWS
from edgecl.methods.tent import Tent
from edgecl.prepare import Prepared, prepare
from edgecl.preprocess import ImageU8
from edgecl.streams import Corrupted, Dataset
from edgecl_device import Learner as DeviceLearner

IMAGES = "input"
"""The cut whose latent is the normalised image."""


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        label: Its name.
        method: Of :data:`edgecl.methods.METHODS`.
        config: Hyperparameters other than the method's own.
        role: ``source`` (predicts, and nothing else), ``control`` (trained on source samples, then only statistics) or ``method``.
        at: The cut.
        warm: The entry whose weights behind the warm-up it starts from; its own name for the one that is warmed up, empty for none.
    """

    label: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    role: str = "method"
    at: str = "net.conv1"
    warm: str = ""


_RELEASED = {"detached": False, "pull": "outputs", "anchor": 0.5}

BATCHES = (
    Entry("source", "bn_stats", {"statistics": "source"}, "source"),
    Entry("affine warm-up, no updates", "affine_warmup", {"lr": 0.0}, "control", warm="affine"),
    Entry("EcoTTA, no updates", "ecotta", {"lr": 0.0}, "control", warm="ecotta"),
    Entry("batch statistics", "bn_stats", {"statistics": "rows"}),
    Entry("TENT", "tent"),
    Entry("EATA", "eata"),
    Entry("CoTTA, 8 views", "cotta", {"views": 8}, at=IMAGES),
    Entry("EcoTTA, released", "ecotta", _RELEASED, warm="ecotta"),
    Entry("EcoTTA, detached", "ecotta", warm="ecotta"),
    Entry("affine warm-up + TENT", "affine_warmup", warm="affine"),
)
"""In batches: the scores of a batch are those before its update."""


def _one_by_one(statistics: str, config: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Lines sample by sample, whose statistics move as ``config`` says."""
    return (
        Entry("source", "bn_stats", {"statistics": "source"}, "source"),
        Entry(f"affine warm-up, {statistics}", "affine_warmup", {"lr": 0.0, **config}, "control", warm="affine"),
        Entry(f"EcoTTA, no updates, {statistics}", "ecotta", {"lr": 0.0, **config}, "control", warm="ecotta"),
        Entry("BN-alpha .1", "bn_stats", {"statistics": "source", "share": 0.1}),
        Entry(statistics, "bn_stats", config),
        Entry("TENT", "tent", config),
        Entry("EATA", "eata", config),
        Entry("EcoTTA, detached", "ecotta", config, warm="ecotta"),
        Entry("affine warm-up + TENT", "affine_warmup", config, warm="affine"),
    )


SINGLES = _one_by_one("EMA .01", {"share": 0.01})
"""In random order: where statistics move, they follow each sample; updates are of the last 64 rows."""

RUNS = _one_by_one("balanced rows", {"policy": "balanced", "statistics": "rows"})
"""In long runs of a class: statistics and updates are of 64 rows that are balanced by the class predicted."""


class Whole(nn.Module):
    """A network behind a module that can be cut at: ``input``, then ``net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.input = nn.Identity()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives."""
        scores: Tensor = self.net(self.input(x))
        return scores


def learner_of(entry: Entry, net: nn.Module, preprocess: ImageU8, data: Dataset, **config: Any) -> Prepared:
    """The entry's learner, before it has seen a sample; ``config`` goes over the entry's."""
    kind = METHODS[entry.method]
    values = {**entry.config, **config}
    if entry.method == "ecotta":
        values["parts"] = tuple(f"net.{name}" for name, _ in net.named_children() if name.startswith("layer"))
    return prepare(
        Whole(net),
        at=entry.at,
        example=data.x_test[:1],
        method=entry.method,
        classes=len(data.class_names),
        config=kind.Config(**values),
        preprocess=preprocess,
        class_names=data.class_names,
    )


def in_batches(
    entry: Entry,
    sized: Mapping[int, Prepared],
    state: State,
    stream: Corrupted,
    batch: int,
    seed: int,
    fresh: bool = True,
    device: str = "cpu",
) -> tuple[dict[str, float], State]:
    """Error in % of each corruption, by scores before each batch's update; and the state behind the stream.

    Args:
        entry: What is measured.
        sized: Its learner by the rows of a batch, for each number of rows that occurs.
        state: Behind ``fit``.
        stream: The images.
        batch: Rows of a batch.
        seed: Of what is drawn.
        fresh: Whether the learner starts anew where the stream says so.
        device: PyTorch's, on which it runs.
    """
    parts = {rows: parts_on(device, (prepared.trunk, prepared.learner)) for rows, prepared in sized.items()}
    start, generator = on_device(device, state), np.random.default_rng(seed)
    state = start
    wrong: dict[str, list[bool]] = {}
    for stretch in stream.stretches:
        state = start if stretch.reset and fresh else state
        for first in range(0, len(stretch.index), batch):
            part = slice(first, first + batch)
            trunk, learner = parts[len(stretch.index[part])]
            with torch.no_grad(), running_on(device):
                z = trunk(torch.from_numpy(stream.images(stretch, part)).to(device))
                scores, state = _updated(entry, learner, state, z, generator)
            missed = scores.argmax(1).cpu().numpy() != stream.dataset.y_test[stretch.index[part]]
            for name, miss in zip(stretch.corruption[part].tolist(), missed.tolist(), strict=True):
                wrong.setdefault(name, []).append(miss)
    return {name: 100 * float(np.mean(found)) for name, found in wrong.items()}, state


def _updated(entry: Entry, learner: Learner, state: State, z: Tensor, generator: np.random.Generator) -> tuple[Tensor, State]:
    if entry.role == "source":
        return learner.predict(state, z)[0]["scores"], state
    wanted = learner.inputs_of("adapt")
    values: dict[str, Any] = {"replay": {"z": z}, "lr": torch.tensor(learner.default_lr)}
    if "draw" in wanted and learner.replay is not None:
        drawn = {draw.name: torch.from_numpy(generator.integers(0, draw.below, draw.shape)) for draw in learner.replay.draws}
        values["draw"] = on_device(z.device, drawn)
    outputs, new = learner.steps["adapt"](state, **{name: values[name] for name in wanted})
    return outputs["scores"], {**state, **new}


def one_by_one(entry: Entry, bundle: Path, stream: Corrupted) -> dict[str, float]:
    """Error in % of each corruption, of the device's loop on the bundle's runtime."""
    wrong: dict[str, list[bool]] = {}
    with DeviceLearner.load(bundle) as learner:
        for sample in stream:
            found = learner.predict(sample.x).label if entry.role == "source" else learner.adapt(sample.x).prediction.label
            wrong.setdefault(stream.corruptions[sample.task - 1], []).append(found != sample.y)
    return {name: 100 * float(np.mean(found)) for name, found in wrong.items()}


def saved_bytes(learner: Any, state: State, z: Tensor) -> int:
    """Bytes of tensors that PyTorch's autograd keeps for the backward pass of an update on rows ``z``, these too; not weights and state."""
    assert isinstance(learner, AdaptiveLearner)
    if not isinstance(learner, Tent):
        return 0
    weights = {name: value.clone().requires_grad_(True) for name, value in learner.parameters(state).items()}
    own = {t.untyped_storage().data_ptr() for t in (*weights.values(), *state.values(), *learner.suffix.state_dict().values())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores, _ = learner.scored(state, z, ROWS, parameters=weights)
        value, _ = learner.objective(scores, state, weights)
    found = sum(kept.values())  # before the graph goes, and storages with it
    del value
    return found
