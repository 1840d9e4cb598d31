"""A task of CLR trained on the workstation, in batches and epochs, as its authors do.

Source: Ge et al. 2023, "CLR: Channel-wise Lightweight Reprogramming for Continual Learning" (ICCV), and its released code: Adam at
1e-3, a tenth of it after every 20 of 60 epochs, batches of 32, norms in training mode. Deviations: the code adds 1e-5 times the sum of
the *unsquared* Euclidean lengths of all trained tensors, whose gradient has the same size for a tensor near zero as for a large one; an
L2 penalty is of squares, and :attr:`Recipe.squared` is true. Batches are of nearly equal size, so that none has a single sample. The
code's stop after 21 epochs without improvement on test data is left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgecl.given import Samples, check_names
from edgecl.learner import State
from edgecl.methods._features import check_types, require
from edgecl.methods._losses import losses
from edgecl.methods.clr import Clr
from edgecl.prepare import Prepared, stacked
from edgecl.targets import target_arrays
from edgecl_device.checks import as_path
from edgecl_device.errors import InputError
from edgecl_device.manifest import Array
from edgecl_device.snapshot import Snapshot


@dataclass(frozen=True)
class Recipe:
    """How a task is trained.

    Attributes:
        epochs: Passes over its samples.
        batch: Samples a step, at most.
        lr: Of Adam.
        every: Epochs after which ``factor`` is taken.
        factor: Of the learning rate.
        penalty: Factor of the L2 term.
        squared: Whether that is the sum of squared lengths; else of lengths, as in the released code.
        momentum: Share of a batch's mean and variance in the running ones.
        seed: Order of the samples.
    """

    epochs: int = 60
    batch: int = 32
    lr: float = 1e-3
    every: int = 20
    factor: float = 0.1
    penalty: float = 1e-5
    squared: bool = True
    momentum: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("epochs", 1), ("batch", 2), ("every", 1), ("seed", 0)):
            value = getattr(self, name)
            require(value >= least, name, f"be at least {least}", value, "leave it out for the authors' value")
        require(0 <= self.lr < math.inf, "lr", "be finite and at least 0", self.lr, "1e-3 is the authors'")
        require(0 < self.factor <= 1, "factor", "be in (0, 1]", self.factor, "0.1 is the authors'")
        require(0 <= self.penalty < math.inf, "penalty", "be finite and at least 0", self.penalty, "1e-5 is the authors'")
        require(0 <= self.momentum <= 1, "momentum", "be in [0, 1]", self.momentum, "0.1 is PyTorch's")


def train_task(
    prepared: Prepared,
    x: Samples,
    y: Array,
    recipe: Recipe | None = None,
    start: State | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> State:
    """The state of a task trained on its samples; set ``prepared.state`` to it to export it as the first task.

    Args:
        prepared: A learner of the method ``clr``; left as it is.
        x: Raw samples [N, ...], at least 2.
        y: Targets [N, ...].
        recipe: How; the authors' by default.
        start: State to start from; that of a new task by default.
        progress: Called with epochs done and in all.

    Raises:
        InputError: when the learner is of another method, samples or targets do not fit, or the state does not stay finite.
    """
    learner, recipe = prepared.learner, recipe or Recipe()
    if not isinstance(learner, Clr):
        raise InputError(f"prepared: must be of the method clr, got {learner.name}; prepare(..., method='clr')")
    latents = prepared.encode(x)
    problem = learner.problem
    targets = target_arrays(y, problem.target, problem.max_classes, len(latents))
    require(len(latents) >= 2, "x", "hold at least 2 samples", len(latents), "norms are trained with the statistics of a batch")
    state = learner.init() if start is None else dict(start)
    with torch.no_grad():
        for latent, one in zip(latents, targets, strict=True):
            state |= learner.prime(state, latent, torch.tensor(one))[1]
    return _trained(learner, state, stacked(latents), torch.cat([torch.tensor(one) for one in targets]), recipe, progress)


def write_task(prepared: Prepared, state: State, path: str | Path, class_names: Sequence[str] = ()) -> int:
    """Write a task's state to a file that :meth:`edgecl_device.Learner.add_task` takes; returns its bytes.

    Args:
        prepared: The learner whose bundle the device has.
        state: What :func:`train_task` returned.
        path: The file.
        class_names: Names of the task's first classes.

    Raises:
        InputError: when the state is no state of this learner, names do not fit, or the file cannot be written.
    """
    specs = {name: (tuple(value.shape), value.dtype) for name, value in prepared.learner.init().items()}
    if {name: (tuple(value.shape), value.dtype) for name, value in state.items()} != specs:
        raise InputError(f"state: must be a state of {prepared.learner.name}, {sorted(specs)}, got {sorted(state)}; pass train_task's")
    most = prepared.learner.problem.max_classes
    check_names("class_names", class_names, most)
    counts = state["count"].to(torch.int64).tolist() if "count" in state else [0] * most
    tensors = {f"state.{name}": value.detach().numpy() for name, value in state.items()}
    names = [*class_names, *[None] * (most - len(class_names))]
    blob = Snapshot(tensors, {"class_names": names, "class_counts": counts, "health": {}}).pack()
    try:
        as_path("path", path).write_bytes(blob)
    except OSError as error:
        raise InputError(f"path: {path} cannot be written ({error.strerror}); choose another place") from error
    return len(blob)


def _trained(learner: Clr, state: State, z: Any, target: Tensor, recipe: Recipe, progress: Callable[[int, int], None] | None) -> State:
    weights = {name: value.clone().requires_grad_(True) for name, value in learner.parameters(state).items()}
    optimiser = torch.optim.Adam(weights.values(), recipe.lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, recipe.every, recipe.factor)
    generator = torch.Generator().manual_seed(recipe.seed)
    allowed = state["count"] > 0 if learner.masks_unseen else None
    parts = -(-len(target) // recipe.batch)
    for epoch in range(recipe.epochs):
        for rows in torch.tensor_split(torch.randperm(len(target), generator=generator), parts):
            batch = z[rows] if isinstance(z, Tensor) else {name: part[rows] for name, part in z.items()}
            scores, found = learner.in_training(weights, state, batch)
            lengths = torch.stack([(value * value).sum() for value in weights.values()])
            penalty = (lengths if recipe.squared else lengths.clamp_min(1e-24).sqrt()).sum() * recipe.penalty
            loss = losses(learner.problem.target, scores, target[rows], allowed).mean() + penalty
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            state |= learner.tracked(state, found, recipe.momentum)
            for name, mask in learner.masks.items():
                weights[name].data = torch.where(mask, weights[name].data, state[f"param.{name}"])
        schedule.step()
        if progress is not None:
            progress(epoch + 1, recipe.epochs)
    state |= {f"param.{name}": value.detach() for name, value in weights.items()}
    ok = all(bool(torch.isfinite(value).all()) for value in state.values())
    require(ok, "lr", "keep the state finite in training", recipe.lr, "it became infinite or NaN; lower it")
    return state
