"""What methods share that adapt to samples without a target: statistics as state, the rows of an update, when it runs, entropy."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgecl.graph.phases import phase
from edgecl.learner import Problem, State, StepResult
from edgecl.methods._features import check_types, require
from edgecl.methods._norms import MOVED, STORED, Statistics
from edgecl.methods._optim import Optimiser
from edgecl.methods._rows import CodedRows
from edgecl.methods._suffix import NORMS, SuffixLearner, zeros
from edgecl_device.adapt_checks import RESETS
from edgecl_device.errors import InputError
from edgecl_device.manifest import WHOLE, AdaptSpec, ReplaySpec
from edgecl_device.memory import whole_bytes


@dataclass(frozen=True)
class AdaptConfig:
    """Hyperparameters of every method that adapts from a memory.

    Attributes:
        rows_per_step: Rows of one update, which are all that the memory holds.
        every: Samples that enter the memory from one update to the next.
        policy: ``ring``, the last rows, or ``balanced``, as many of each class predicted as may be (NOTE's PBRS), for streams with long
            runs of a class.
        codec: ``float32`` or ``uint8``, of the rows; integers are stored as they are.
        statistics: What moves the statistics by which single samples are normalised: ``each`` sample, by ``share``, or the ``rows`` of each
            update, all the way.
        share: Of ``each``.
        reset: When to go back to the start: ``never``, ``every`` so many updates, or ``loss``: when its running mean falls below a bound.
        reset_every: Updates.
        reset_below: Bound of the loss; 0.2 is SAR's.
        seed: Key of the device's generator.
    """

    rows_per_step: int = 64
    every: int = 64
    policy: str = "ring"
    codec: str = "float32"
    statistics: str = "each"
    share: float = 0.05
    reset: str = "never"
    reset_every: int = 100
    reset_below: float = 0.2
    seed: int = 0
    kinds: ClassVar[tuple[str, ...]] = ("each", "rows")

    def __post_init__(self) -> None:
        check_types(self)
        require(self.rows_per_step >= 2, "rows_per_step", "be at least 2, as statistics are of rows", self.rows_per_step, "64 is usual")
        require(self.every >= 1, "every", "be at least 1 sample", self.every, "use rows_per_step for rows that are used once")
        require(self.policy in WHOLE, "policy", f"be one of {', '.join(WHOLE)}", self.policy, "use 'ring'")
        require(self.codec in ("float32", "uint8"), "codec", "be 'float32' or 'uint8'", self.codec, "use 'uint8' to save bytes")
        require(self.statistics in self.kinds, "statistics", f"be one of {', '.join(self.kinds)}", self.statistics, "use 'each'")
        require(0 < self.share <= 1, "share", "be above 0 and at most 1", self.share, "0.05 follows about 20 samples")
        check_reset(self)
        require(0 <= self.seed < 2**64, "seed", "be in [0, 2**64)", self.seed, "0 is as good as any")


@dataclass(frozen=True)
class TrainedConfig(AdaptConfig):
    """The same for methods that take gradient steps.

    Attributes:
        lr: Default learning rate; the device may give another.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        momentum: Of ``momentum``.
        betas: Of ``adam``.
        eps: Of ``adam``.
    """

    lr: float = 1e-3
    optimizer: str = "adam"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def optimiser(self) -> Optimiser:
        """The optimiser that these values describe."""
        return Optimiser(self.optimizer, self.momentum, self.betas, self.eps)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.lr < math.inf, "lr", "be finite and at least 0", self.lr, "1e-3 is usual")
        self.optimiser()


def check_reset(config: Any) -> None:
    """Check when to go back to the start.

    Raises:
        InputError: naming the value that does not fit.
    """
    require(config.reset in RESETS, "reset", f"be one of {', '.join(RESETS)}", config.reset, "use 'never'")
    require(config.reset_every >= 1, "reset_every", "be at least 1 update", config.reset_every, "100 is a start")
    require(0 <= config.reset_below < math.inf, "reset_below", "be finite and at least 0", config.reset_below, "0.2 is SAR's")


class AdaptiveLearner(CodedRows, SuffixLearner):
    """A learner that adapts a suffix to samples without a target.

    State, beside ``count`` and ``param.NAME`` of what is trained: ``stat.NAME.mean`` and ``stat.NAME.var`` [C] of each batch norm. Base
    samples are only counted: adaptation starts with an empty memory.

    Raises:
        InputError: when the suffix has no norm that can adapt, or one that is called never or twice.
    """

    def __init__(self, problem: Problem, config: Any = None, *, suffix: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(problem, config, suffix=suffix, masks=masks)
        self.norms = Statistics(self.suffix)
        self.code_rows(getattr(self.config, "codec", "float32"), self.config)
        with torch.no_grad(), self.norms.using(MOVED, 0.5, reports=True) as found:
            self.suffix(zeros(problem.features))
        missed = [name for name in self.norms.names if f"{name}.mean" not in found]
        require(not missed, "suffix", "call each of its batch norms", missed, "write the model so that its norms are modules that it calls")
        if not self.norms.names and not self.trained:
            raise InputError("suffix: must have a norm to adapt, got none behind the cut; cut the model further up")

    def _patterns(self) -> list[str]:
        """The affine parameters of all norms."""
        return affine_names(self.suffix)

    def init(self) -> State:
        """The suffix's own weights and statistics, no class seen."""
        return {**super().init(), **{f"stat.{name}": value for name, value in self.norms.initial().items()}}

    @property
    def replay(self) -> ReplaySpec | None:
        """As many rows as an update reads."""
        config = self.config
        spec = ReplaySpec(self.row_fields(target=False), config.rows_per_step, 0, config.policy, config.seed)
        return dataclasses.replace(spec, capacity_bytes=whole_bytes(spec, self.problem.max_classes))

    @property
    def adaptation(self) -> AdaptSpec:
        """When the loop updates and resets."""
        config = self.config
        return AdaptSpec(config.every, config.reset, config.reset_every, config.reset_below)

    def step_inputs(self) -> dict[str, Any]:
        """``z``, ``lr``, and ``replay``: rows of codes."""
        count = self.replay.rows_per_step if self.replay is not None else 0
        return {**super().step_inputs(), "replay": self.row_inputs(self.row_fields(target=False), count)}

    def predict(self, state: State, z: Any) -> StepResult:
        """Scores float32 [N, K] with the stored statistics."""
        return {"scores": self.masked(self.scored(state, z, STORED)[0], state).to(torch.float32)}, {}

    def track(self, state: State, z: Any) -> StepResult:
        """Scores float32 [1, K] of a sample, from statistics that it has moved where each does, and its row."""
        each = self.config.statistics == "each"
        with phase("forward"):
            scores, found = self.scored(state, z, MOVED if each else STORED, self.config.share, reports=each)
        outputs = {"scores": self.masked(scores, state).to(torch.float32), **self._row(self._encode(z))}
        return outputs, {f"stat.{name}": value for name, value in found.items()}

    def scored(
        self, state: State, z: Any, mode: str, share: float = 0.0, reports: bool = False, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Scores [N, K] of the suffix, and the statistics that it reports (:meth:`edgecl.methods._norms.Statistics.using`)."""
        values = {**self.statistics(state), **(self.parameters(state) if parameters is None else parameters)}
        with self.norms.using(mode, share, reports) as found:
            scores = self.scores(values, z)
        return scores, dict(found)

    def statistics(self, state: State) -> State:
        """The stored statistics by their names in the suffix."""
        return {name.removeprefix("stat."): value for name, value in state.items() if name.startswith("stat.")}

    def entropy(self, scores: Tensor, state: State) -> Tensor:
        """Entropy [N] of the softmax over the classes seen."""
        log_probability = torch.log_softmax(self.masked(scores, state), 1)
        return (log_probability.exp() * log_probability).sum(1) * -1.0


def affine_names(suffix: nn.Module) -> list[str]:
    """Names of the affine parameters of all norms, in the suffix's order."""
    norms = [f"{path}." for path, module in suffix.named_modules() if isinstance(module, NORMS)]
    return [name for name, _ in suffix.named_parameters() if any(name.rpartition(".")[0] + "." == norm for norm in norms)]
