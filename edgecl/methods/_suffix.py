"""What methods that train a part of the network share: the suffix as state, masked scores, checks."""

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.graph.phases import value_and_gradient
from edgecl.learner import Learner, Problem, State, StepResult, mask_unseen, one_hot
from edgecl.methods._features import check_types, require
from edgecl.onednn import without_onednn
from edgecl_device.errors import InputError
from edgecl_device.manifest import TargetSpec

_WIDEN = "give the model's last layer one output a class with edgecl.widen_head"
_HEADS = {
    "class": _WIDEN,
    "multilabel": _WIDEN,
    "vector": "give the model's last layer one output a value, or set target=Vector(size) to its outputs",
    "map": "give the model's last layer one channel a class",
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class SuffixLearner(Learner):
    """A learner that predicts with the suffix of a network.

    Trained parameters are state, named ``param.NAME``; everything else in the suffix is frozen, batch norm with its
    stored statistics. For targets of one class, a sample or a pixel, ``count`` float32 [K] (samples, or pixels, by class) masks
    the classes that have not been seen.

    Args:
        problem: The task.
        config: Hyperparameters.
        suffix: Maps the features to scores float32 [N, max_classes], for maps [N, max_classes, H, W]; copied.
        masks: bool tensors by parameter name, of its shape: only where true is a weight updated.

    Raises:
        InputError: when the suffix does not give such scores, or a mask or pattern fits no parameter.
    """

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(problem, config)
        self.suffix = copy.deepcopy(suffix).eval().requires_grad_(False)
        if masks is not None and not isinstance(masks, Mapping):
            raise InputError(f"masks: must be a mapping of parameter names to bool tensors, got {type(masks).__name__}; pass a dict")
        self.masks = dict(masks or {})
        self._lstm = any(isinstance(part, nn.LSTM) for part in self.suffix.modules())
        scores = self.suffix(zeros(problem.features))
        wanted = problem.target.scores(problem.max_classes).shape
        if tuple(scores.shape) != wanted:
            raise InputError(f"suffix: must return scores {list(wanted)}, got {list(scores.shape)}; {_HEADS[problem.target.kind]}")
        parameters = dict(self.suffix.named_parameters())
        self.trained = [name for name in parameters if any(fnmatchcase(name, p) for p in self._patterns())]
        if not self.trained and hasattr(self.config, "trainable"):
            raise InputError(
                f"trainable: must name a parameter, got {self.config.trainable!r} on a suffix with {sorted(parameters) or 'none'}; "
                "give a pattern that matches, or cut the model further up"
            )
        for name, mask in self.masks.items():
            if name not in self.trained or mask.shape != parameters[name].shape or mask.dtype != torch.bool:
                raise InputError(f"masks: {name!r} must be a bool tensor of a trained parameter's shape; trained are {self.trained}")

    def _patterns(self) -> list[str]:
        """Patterns of the trained parameters' names; by default all but the affine parameters of norms."""
        wanted = getattr(self.config, "trainable", ())
        if wanted is None:
            norms = {f"{path}." for path, module in self.suffix.named_modules() if isinstance(module, NORMS)}
            return [name for name, _ in self.suffix.named_parameters() if not name.startswith(tuple(norms))]
        names = [name for name, _ in self.suffix.named_parameters()]
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(f"trainable: {pattern!r} matches no parameter of the suffix; it has {names}")
        return list(wanted)

    def init(self) -> State:
        """The suffix's own weights, no class seen."""
        weights = {f"param.{name}": self.suffix.get_parameter(name).detach().clone() for name in self.trained}
        return {**weights, "count": torch.zeros(self.problem.max_classes)} if self.masks_unseen else weights

    def prime(self, state: State, z: Any, target: Tensor, weight: Tensor | None = None) -> StepResult:
        """Count a base sample that the network was already trained on, with whatever weight: one is refused here."""
        self.refuse_weight(weight)
        return {}, self.counted(state, target)

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores of the suffix, float32 [1, K, ...]."""
        return {"scores": self.masked(self.scores(self.parameters(state), z), state).to(torch.float32)}, {}

    @property
    def masks_unseen(self) -> bool:
        """Whether classes are counted and unseen ones masked."""
        return self.problem.target.kind in ("class", "map")

    def counted(self, state: State, target: Tensor) -> State:
        """``count`` after a sample [1, ...], or nothing where nothing is counted."""
        if not self.masks_unseen:
            return {}
        hot = one_hot(target.reshape(-1), self.problem.max_classes)
        spec: TargetSpec = self.problem.target
        if spec.ignore is not None:
            hot = hot * (target.reshape(-1, 1) != spec.ignore).to(torch.float32)
        return {"count": state["count"] + (hot.sum(0) if spec.kind == "map" else hot.reshape(-1))}

    def masked(self, scores: Tensor, state: State) -> Tensor:
        """Scores, unseen classes masked."""
        return mask_unseen(scores, state["count"]) if self.masks_unseen else scores

    def parameters(self, state: State) -> dict[str, Tensor]:
        """The trained tensors by their names in the suffix."""
        return {name: state[f"param.{name}"] for name in self.trained}

    def descend(self, state: State, loss: Any, lr: Tensor) -> tuple[Tensor, Any, State]:
        """Loss, its auxiliary result, and the new weights and slots after one step of the optimiser that the configuration describes."""
        optimiser, parameters = self.config.optimiser(), self.parameters(state)
        value, auxiliary, gradients = value_and_gradient(loss, parameters, optimiser.seed(lr))
        new, slots = optimiser.update(parameters, gradients, state, lr, self.masks)
        return value, auxiliary, {**{f"param.{name}": tensor for name, tensor in new.items()}, **slots}

    def scores(self, parameters: dict[str, Tensor], z: Any) -> Tensor:
        """The suffix with these parameters: float32 [N, K, ...]."""
        return self.called(self.suffix, parameters, z)

    def called(self, module: nn.Module, parameters: dict[str, Tensor], *inputs: Any) -> Tensor:
        """A module, of which the suffix is all or a part, with these parameters.

        An LSTM runs without oneDNN, whose own keeps nothing for a gradient where the caller has switched autograd off.
        """
        with without_onednn() if self._lstm else nullcontext():
            scores: Tensor = torch.func.functional_call(module, parameters, inputs)
        return scores


def check_training(config: Any) -> None:
    """Check the hyperparameters that every trained method has, and the plain types of all of them.

    Raises:
        InputError: naming the first that does not fit.
    """
    check_types(config)
    require(0 <= config.lr < math.inf, "lr", "be finite and at least 0", config.lr, "0.01 is a good start")
    patterns = config.trainable
    ok = patterns is None or (isinstance(patterns, tuple) and all(isinstance(p, str) for p in patterns))
    require(ok, "trainable", "be None or a tuple of patterns", patterns, "use ('fc.*',) for one")


def zeros(features: Any) -> Any:
    """Zeros [1, ...] in the shape of a latent."""
    if isinstance(features, Mapping):
        return {key: zeros(value) for key, value in features.items()}
    return torch.zeros(features.shape, dtype=getattr(torch, features.dtype))
