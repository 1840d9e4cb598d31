"""What methods with a replay memory share: rows of coded latents, their inputs, and the classes that a loss runs over."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgecl.codecs import CODECS
from edgecl.graph.phases import phase
from edgecl.learner import Problem, State, StepResult, one_hot
from edgecl.methods._features import SMALLEST_NORM, require
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


class ReplayLearner(SuffixLearner):
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
        self._names = list(features)
        self.codecs = {name: CODECS[self.config.codec].of(self.config) for name in self._names}
        self._rows = {name: self.codecs[name].row_spec(spec) for name, spec in features.items()}

    def calibrate(self, latents: Any) -> None:
        """Fit the codecs on latents [N, ...] of base samples."""
        for name, part in self._parts(latents).items():
            self.codecs[name].fit(part)

    def reconstruction(self, latents: Any) -> float:
        """Squared error of decoded latents [N, ...] over their square."""
        with torch.no_grad():
            return float(self._error(latents, self._decode(self._encode(latents))))

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """Those of the codecs."""
        return tuple(table for codec in self.codecs.values() for table in codec.constants())

    @property
    def row_fields(self) -> tuple[TensorSpec, ...]:
        """Fields of a row: codes, and the target where it is no class index."""
        fields = [TensorSpec(f"z.{name}" if name else "z", row.shape, row.dtype) for name, row in self._rows.items()]
        stored = self.problem.target.stored(self.problem.max_classes)
        return tuple(fields + ([] if stored is None else [stored]))

    def step_inputs(self) -> dict[str, Any]:
        """Those of the suffix; ``replay``: rows, their targets, and 1 for a real row or 0 for filler; ``draw``: random integers."""
        memory = self.replay
        rows = memory.rows_per_step
        specs = {f.name: TensorSpec(f.name, (rows, *f.shape), f.dtype) for f in memory.fields}
        target = specs.pop("target", TensorSpec("target", (rows,), "int64"))
        z = self._whole({name: specs.pop(f"z.{name}" if name else "z") for name in self._names})
        replay = {"z": z, **specs, "target": target, "weight": TensorSpec("weight", (rows,), "float32")}
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

    def _filled(self, rows: Any, code: Any, real: Tensor) -> Any:
        """Rows with this sample's code in place of filler: of zeros a suffix may make NaN, which no weight of zero takes away."""
        own = self._parts(code)
        return self._whole(
            {
                name: torch.where((real > 0).reshape(-1, *[1] * (part.dim() - 1)), part, own[name])
                for name, part in self._parts(rows).items()
            }
        )

    def _error(self, z: Any, decoded: Any) -> Tensor:
        """Squared error over squared length, float32 []."""
        pairs = [(part, self._parts(decoded)[name]) for name, part in self._parts(z).items()]
        error = torch.stack([((part - other) * (part - other)).sum() for part, other in pairs]).sum()
        return error / torch.stack([(part * part).sum() for part, _ in pairs]).sum().clamp_min(SMALLEST_NORM)

    def _parts(self, z: Any) -> dict[str, Tensor]:
        return {"": z} if isinstance(z, Tensor) else dict(z)

    def _whole(self, parts: dict[str, Any]) -> Any:
        return parts[""] if self._names == [""] else parts

    def _encode(self, z: Any) -> Any:
        with phase("replay_encode"):
            return self._whole({name: self.codecs[name].encode(part) for name, part in self._parts(z).items()})

    def _decode(self, code: Any) -> Any:
        with phase("replay_decode"):
            return self._whole({name: self.codecs[name].decode(part) for name, part in self._parts(code).items()})

    def _join(self, first: Any, rest: Any) -> Any:
        parts = self._parts(rest)
        return self._whole({name: torch.cat([part, parts[name]]) for name, part in self._parts(first).items()})

    def _row(self, code: Any) -> dict[str, Tensor]:
        return {f"row.z.{name}" if name else "row.z": part for name, part in self._parts(code).items()}
