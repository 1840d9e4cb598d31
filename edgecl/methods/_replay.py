"""What methods with a replay memory share: rows of coded latents, their inputs, and the classes that a loss runs over."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.codecs import CODECS
from edgecl.learner import Problem, State, StepResult, one_hot
from edgecl.methods._features import require
from edgecl.methods._rows import CodedRows
from edgecl.methods._suffix import SuffixLearner
from edgecl_device.manifest import ReplaySpec, TensorSpec
from edgecl_device.memory import POLICIES


def check_rows(config: Any) -> None:
    """Check the hyperparameters of a replay memory.

    Raises:
        InputError: naming the first that does not fit.
    """
    require(config.rows_per_step >= 1, "rows_per_step", "be at least 1", config.rows_per_step, "8 is a good start")
    require(config.codec in CODECS, "codec", f"be one of {', '.join(CODECS)}", config.codec, "use 'uint8'")
    for codec in CODECS.values():
        codec.of(config)  # checks what it takes of these values
    require(config.policy in POLICIES, "policy", f"be one of {', '.join(POLICIES)}", config.policy, "use 'largest-class'")
    require(config.loss in ("er", "er-ace"), "loss", "be 'er' or 'er-ace'", config.loss, "use 'er'")
    require(config.window >= 1, "window", "be at least 1 sample", config.window, "50 is a good start")


class ReplayLearner(CodedRows, SuffixLearner):
    """A learner whose replay rows are latents in one of the codecs (:mod:`edgecl.codecs`); what it learns and predicts from is decoded.

    ``prime`` counts a base sample and returns its row. A subclass says in ``replay`` what else a row holds, and in ``AGES`` the name of
    the state that has for each class the samples since it was last seen, float32 [K].
    """

    AGES = "age"
    replay: ReplaySpec

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(problem, config, suffix=suffix, masks=masks)
        features = {"": problem.features} if isinstance(problem.features, TensorSpec) else problem.features
        for spec in features.values():
            require(spec.dtype == "float32", spec.name, "be float32 features", spec.dtype, "convert the model with float()")
        self.code_rows(self.config.codec, self.config)

    def step_inputs(self) -> dict[str, Any]:
        """Those of the suffix; ``replay``: rows, their targets, and 1 for a real row or 0 for filler; ``draw``: random integers."""
        memory = self.replay
        rows = memory.rows_per_step
        inputs = self.row_inputs(memory.fields, rows)
        target = inputs.pop("target", TensorSpec("target", (rows,), "int64"))
        replay = {**inputs, "target": target, "weight": TensorSpec("weight", (rows,), "float32")}
        return {**super().step_inputs(), "replay": replay, "draw": {draw.name: draw.tensor for draw in memory.draws}}

    def prime(self, state: State, z: Any, target: Tensor, weight: Tensor | None = None) -> StepResult:
        """Count a base sample and return its replay row."""
        _, new = super().prime(state, z, target, weight)
        return self._row(self._encode(z)), new

    @property
    def _ages(self) -> bool:
        return self.problem.target.kind == "class"

    def _aged(self, state: State, target: Tensor) -> State:
        """Samples since each class was last seen, this one included."""
        if not self._ages:
            return {}
        return {self.AGES: torch.where(one_hot(target, self.problem.max_classes).reshape(-1) > 0, 0.0, state[self.AGES] + 1.0)}

    def _allowed(self, counted: State, rows: int) -> Tensor | None:
        """Classes that the loss of each of 1 + rows runs over: seen ones, for the new sample under ``er-ace`` the current ones."""
        if not counted:
            return None
        seen = counted["count"] > 0
        if not self._ages:
            return seen
        current = seen if self.config.loss == "er" else counted[self.AGES] < self.config.window
        current = torch.where(current.to(torch.float32).sum() < 2, seen, current)  # over one class its gradient is zero
        return torch.cat([current.unsqueeze(0), seen.unsqueeze(0).expand(rows, -1)])
