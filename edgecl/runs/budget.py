"""What every learner will cost, counted on its graphs before anything is trained, and whether the budget allows it."""

import dataclasses
from typing import Any

import torch
from torch import nn

from edgecl.int8 import calibration_of
from edgecl.learner import update_macs
from edgecl.ledger import RAM, ram_bytes
from edgecl.options import place
from edgecl.prepare import Prepared, prepare
from edgecl.profiling import Profile, profile, split_points
from edgecl.runs.config import Budget, LearnerConfig, RunConfig
from edgecl.runs.methods import method_config
from edgecl.runs.model import with_label
from edgecl.splitting import SplitError
from edgecl.streams import Dataset
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import Array


def prepared_of(config: RunConfig, entry: LearnerConfig, net: nn.Module, data: Dataset, base: Array, **changes: Any) -> Prepared:
    """A learner of the configuration, before it has seen a sample.

    Args:
        config: The whole run's.
        entry: The learner's.
        net: The network.
        data: The data set.
        base: Samples [N, ...] of the base set, on which a trunk in int8 is calibrated.
        changes: Replace hyperparameters, or ``at``.
    """
    at = place(changes.pop("at", entry.at))
    values = method_config(f"learner.{entry.method}.config", entry.method, entry.config)
    named: dict[str, Any] = {"classes": config.model.classes or len(data.class_names), "class_names": data.class_names}
    int8: dict[str, Any] = {} if entry.trunk_dtype is None else {"trunk_dtype": "int8", "calibration": calibration_of(base)}
    return prepare(
        net,
        at=at,
        example=data.x[:1],
        method=entry.method,
        target=data.target,
        config=dataclasses.replace(values, **changes),
        preprocess=config.preprocess(),
        **(named if data.kind == "class" else {}),
        **int8,
    )


def used(found: Profile) -> dict[str, int]:
    """What the limits of the budget are about."""
    return {
        "beyond_trunk": found.ledger["beyond_trunk"],
        "ram": ram_bytes(found.ledger),
        "update_macs": update_macs({step.step: step.canonical_macs for step in found.steps}, found.refresh_every, found.adapt_every),
    }


def exceeded(budget: Budget, found: Profile) -> list[str]:
    """Limits that a learner exceeds."""
    return [name for name, value in used(found).items() if (most := getattr(budget, name)) is not None and value > most]


def check_budget(config: RunConfig, entry: LearnerConfig, label: str, net: nn.Module, data: Dataset, base: Array) -> Profile:
    """The cost of a learner that keeps to the budget.

    Raises:
        InputError: when it does not, with the ledger's figures and the nearest change that would.
    """
    with with_label(label):
        found = profile(prepared_of(config, entry, net, data, base), config.device.engine, config.device.pending)
        over = exceeded(config.budget, found)
        if not over:
            return found
        figures = used(found)
        parts = [f"budget.{name}: must be at least {figures[name]:,}, got {getattr(config.budget, name):,}" for name in over]
        ledger = ", ".join(f"{name} {found.ledger[name]:,}" for name in RAM)
        cost = f"ledger: {ledger} bytes; {figures['update_macs']:,} MACs an update"
        raise InputError(f"{'; '.join(parts)} ({cost}); {_mend(config, entry, net, data, base, found)}")


def _mend(config: RunConfig, entry: LearnerConfig, net: nn.Module, data: Dataset, base: Array, found: Profile) -> str:
    """The nearest change that fits: fewer replay rows, else the next cut further down."""
    budget, figures = config.budget, used(found)
    capacity = found.config.get("capacity_bytes")
    if isinstance(capacity, int) and exceeded(budget, found) != ["update_macs"]:
        limits = {"beyond_trunk": budget.beyond_trunk, "ram": budget.ram}
        room = min(most - (figures[name] - found.ledger["replay"]) for name, most in limits.items() if most is not None)
        if room > 0 and (fitting := _tried(config, entry, net, data, base, capacity_bytes=min(room, capacity))) is not None:
            return f"set config.capacity_bytes = {fitting.config['capacity_bytes']}, or raise the budget"
    for at in _cuts_behind(config, entry, net, data):
        fitting = _tried(config, entry, net, data, base, at=at)
        if fitting is not None:
            bytes_, macs = (used(fitting)[name] for name in ("beyond_trunk", "update_macs"))
            return f"cut at {at!r} ({bytes_:,} bytes beyond the trunk, {macs:,} MACs an update), or raise the budget"
    return "raise the budget, or take another method"


def _tried(config: RunConfig, entry: LearnerConfig, net: nn.Module, data: Dataset, base: Array, **changes: Any) -> Profile | None:
    try:
        found = profile(prepared_of(config, entry, net, data, base, **changes), config.device.engine, config.device.pending)
    except EdgeclError:  # not every cut suits every method, nor every capacity a memory
        return None
    return None if exceeded(config.budget, found) else found


def _cuts_behind(config: RunConfig, entry: LearnerConfig, net: nn.Module, data: Dataset) -> list[str]:
    """Cuts further down than the learner's own, in the order of execution."""
    preprocess, x = config.preprocess(), torch.tensor(data.x[:1])
    try:
        with torch.no_grad():
            points = [point.at for point in split_points(net, x if preprocess is None else preprocess(x))]
    except SplitError:
        return []
    return points[points.index(entry.at) + 1 :] if entry.at in points else points
