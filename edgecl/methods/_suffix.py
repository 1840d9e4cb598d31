"""What methods that train a part of the network share: the suffix as state, masked cross-entropy, one update."""

import copy
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.learner import UNSEEN, Learner, Problem, State, StepResult, mask_unseen, one_hot
from edgecl.methods._features import check_types, require
from edgecl_device.errors import InputError

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class SuffixLearner(Learner):
    """A learner that predicts with the suffix of a network.

    Trained parameters are state, named ``param.NAME``; everything else in the suffix is frozen, batch norm with its
    stored statistics. Class counts mask classes that have not been seen.

    Args:
        problem: The task.
        config: Hyperparameters.
        suffix: Maps the features to scores float32 [N, max_classes]; copied.
        masks: bool tensors by parameter name, of its shape: only where true is a weight updated.

    Raises:
        InputError: when the suffix does not give ``max_classes`` scores, or a mask or pattern fits no parameter.
    """

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(problem, config)
        self.suffix = copy.deepcopy(suffix).eval().requires_grad_(False)
        if masks is not None and not isinstance(masks, Mapping):
            raise InputError(f"masks: must be a mapping of parameter names to bool tensors, got {type(masks).__name__}; pass a dict")
        self.masks = dict(masks or {})
        scores = self.suffix(_zeros(problem.features))
        if tuple(scores.shape) != (1, problem.max_classes):
            raise InputError(
                f"suffix: must return scores [1, {problem.max_classes}], got {list(scores.shape)}; "
                "give the model's last layer one output a class with edgecl.widen_head"
            )
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
        return {**weights, "count": torch.zeros(self.problem.max_classes)}

    def prime(self, state: State, z: Any, target: Tensor) -> StepResult:
        """Count a base sample that the network was already trained on."""
        return {}, {"count": state["count"] + one_hot(target, self.problem.max_classes).reshape(-1)}

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores of the suffix, float32 [1, K]."""
        return {"scores": mask_unseen(self.scores(self.parameters(state), z), state["count"]).to(torch.float32)}, {}

    def parameters(self, state: State) -> dict[str, Tensor]:
        """The trained tensors by their names in the suffix."""
        return {name: state[f"param.{name}"] for name in self.trained}

    def scores(self, parameters: dict[str, Tensor], z: Any) -> Tensor:
        """The suffix with these parameters: float32 [N, K]."""
        scores: Tensor = torch.func.functional_call(self.suffix, parameters, (z,))
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


def cross_entropy(scores: Tensor, target: Tensor, allowed: Tensor) -> Tensor:
    """Cross-entropy of each row, [N], over the classes that ``allowed`` (bool [K] or [N, K]) leaves.

    Written out: the loss that ships with PyTorch translates to ONNX with another gradient at batch sizes above one.
    """
    return soft_cross_entropy(scores, one_hot(target, scores.shape[1]), allowed)


def soft_cross_entropy(scores: Tensor, truth: Tensor, allowed: Tensor) -> Tensor:
    """The same for targets that are shares of classes, float32 [N, K]."""
    log_probability = torch.log_softmax(torch.where(allowed, scores, UNSEEN), 1)
    return -(log_probability * truth).sum(1)


def _zeros(features: Any) -> Any:
    if isinstance(features, Mapping):
        return {key: _zeros(value) for key, value in features.items()}
    return torch.zeros(features.shape, dtype=getattr(torch, features.dtype))
