"""From a PyTorch model to a learner that is ready for export: split, choose a method, take in base samples."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from edgecl_device.errors import InputError
from edgecl_device.manifest import Array, ReplaySpec, TensorSpec
from edgecl_device.memory import ReplayMemory
from torch import Tensor, nn

from edgecl.learner import Learner, Problem, State, dtype_name
from edgecl.methods import METHODS
from edgecl.methods._suffix import SuffixLearner
from edgecl.splitting import split

KEPT = 32
"""Latents of base samples kept for the checks at export."""


class Trunk(nn.Module):
    """Preprocessing, then the frozen part of the model."""

    def __init__(self, preprocess: nn.Module | None, model: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Latents of ``x``."""
        return self.model(x if self.preprocess is None else self.preprocess(x))


class Prepared:
    """A learner with its trunk, its state and its replay rows.

    Attributes:
        trunk: Maps a raw sample to its latent ``z``.
        x: Spec of one raw sample, batch dimension of 1 included.
        learner: The method.
        state: Its state after the base samples.
        memory: Its replay memory, or None.
        class_names: Names of the first classes.
        examples: Latents and classes of some base samples, which the checks at export start from.
    """

    def __init__(self, trunk: Trunk, x: TensorSpec, learner: Learner, class_names: Sequence[str] = ()) -> None:
        if len(class_names) > learner.problem.max_classes or len(set(class_names)) != len(class_names):
            raise InputError(f"class_names: must be at most {learner.problem.max_classes} different names, got {list(class_names)}")
        self.trunk = trunk.eval().requires_grad_(False)
        self.x = x
        self.learner = learner
        self.state: State = learner.init()
        self.class_names = tuple(class_names)
        self.examples: list[tuple[Any, int]] = []
        self.memory: ReplayMemory | None = None
        if learner.replay is not None:
            self.memory = ReplayMemory(ReplaySpec(**vars(learner.replay)), learner.problem.max_classes)

    def encode(self, x: Array, batch: int = 64) -> list[Any]:
        """Latents of samples [N, ...], one tree of tensors [1, ...] a sample.

        Args:
            x: Raw samples as the device will get them.
            batch: Samples a pass; 1 for trunks that take single samples only.

        Raises:
            InputError: when shape or dtype differ from the example's.
        """
        if x.shape[1:] != self.x.shape[1:] or x.dtype.name != self.x.dtype:
            raise InputError(f"x: must be {self.x.dtype} [N, {', '.join(map(str, self.x.shape[1:]))}], got {x.dtype} {list(x.shape)}")
        latents: list[Any] = []
        with torch.no_grad():
            for part in torch.tensor(x).split(batch):
                z = self.trunk(part)
                rows = range(len(part))
                latents += [_map(z, lambda t, i=i: t[i : i + 1].clone()) for i in rows]  # type: ignore[misc]
        return latents

    def fit(self, x: Array, y: Array, batch: int = 64, progress: Callable[[int, int], None] | None = None) -> "Prepared":
        """Take in base samples: what the model already knows becomes part of the state and of the replay memory.

        Args:
            x: Raw samples [N, ...].
            y: Classes [N].
            batch: As in :meth:`encode`.
            progress: Called with samples done and in all.

        Raises:
            InputError: when shapes, types or labels do not fit; the state is unchanged then.
        """
        classes = self.learner.problem.max_classes
        y = np.asarray(y)
        if y.shape != (len(x),) or y.dtype.kind not in "iu" or (len(y) and not 0 <= y.min() <= y.max() < classes):
            raise InputError(f"y: must be {len(x)} integers in [0, {classes}), got {y.dtype} {list(y.shape)}")
        latents = self.encode(x, batch)
        if any(not bool(torch.isfinite(t).all()) for z in latents for t in _leaves(z)):
            raise InputError("x: features must be finite; check the model's weights and the preprocessing")
        calibrate = getattr(self.learner, "calibrate", None)
        if calibrate is not None and latents and not self.examples:
            calibrate(_stack(latents))
        self.examples = (self.examples + list(zip(latents, y.tolist(), strict=True)))[:KEPT]
        for i, (z, label) in enumerate(zip(latents, y.tolist(), strict=True)):
            with torch.no_grad():
                outputs, new = self.learner.prime(self.state, z, torch.tensor([label]))
            self.state = {**self.state, **new}
            if self.memory is not None:
                self.memory.offer({f.name: outputs[f"row.{f.name}"][0].numpy() for f in self.memory.spec.fields}, label, -1 - i)
            if progress is not None:
                progress(i + 1, len(latents))
        return self


def prepare(
    model: nn.Module,
    *,
    at: str,
    example: Array,
    method: str = "ridge",
    classes: int,
    config: Any = None,
    preprocess: nn.Module | None = None,
    class_names: Sequence[str] = (),
) -> Prepared:
    """Split a model and put a continual learner behind its frozen part.

    Args:
        model: Any traceable module; copied.
        at: Name of the last module of the frozen trunk.
        example: One raw sample with a batch dimension of 1, as the device will get it.
        method: Name of a method (:data:`edgecl.methods.METHODS`).
        classes: Classes that the learner has room for, new ones included.
        config: The method's ``Config``, or None for its defaults.
        preprocess: Runs before the model, on the device too; for instance :class:`edgecl.preprocess.ImageU8`.
        class_names: Names of the first classes.

    Raises:
        InputError: for an unknown method, an unsuitable example or a suffix of another number of classes.
        SplitError: when the model cannot be cut there.
    """
    if method not in METHODS:
        raise InputError(f"method: must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(example, np.ndarray) or example.ndim == 0 or example.shape[0] != 1:
        got = f"{example.dtype} {list(example.shape)}" if isinstance(example, np.ndarray) else type(example).__name__
        raise InputError(f"example: must be a numpy array with a batch dimension of 1, got {got}; use x[None]")
    parts = split(model, at)
    trunk = Trunk(preprocess, parts.trunk).eval()
    with torch.no_grad():
        z = trunk(torch.tensor(example))
    problem = Problem(_specs(z), classes)
    kind = METHODS[method]
    extra = {"suffix": parts.suffix} if issubclass(kind, SuffixLearner) else {}
    x = TensorSpec("x", example.shape, example.dtype.name)
    return Prepared(trunk, x, kind(problem, config, **extra), class_names)


def _specs(z: Any) -> Any:
    if isinstance(z, Tensor):
        return TensorSpec("z", tuple(z.shape), dtype_name(z.dtype))
    return {key: TensorSpec(f"z.{key}", tuple(t.shape), dtype_name(t.dtype)) for key, t in z.items()}


def _map(z: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return function(z) if isinstance(z, Tensor) else {key: function(t) for key, t in z.items()}


def _leaves(z: Any) -> list[Tensor]:
    return [z] if isinstance(z, Tensor) else list(z.values())


def _stack(latents: Sequence[Any]) -> Any:
    if isinstance(latents[0], Tensor):
        return torch.cat(list(latents))
    return {key: torch.cat([z[key] for z in latents]) for key in latents[0]}
